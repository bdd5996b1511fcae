"""Deep equilibrium layers."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax.nn import DEQ, RevDEQ
from tests import helpers
from tests.helpers import OK, error, identical, weigh

SETTINGS = {"solver": deqjax.Picard(1e-13, 1e-13), "max_steps": 300}


class Cell(eqx.Module):
    """tanh(w z + u x), with dropout on its input if it gets a key."""

    w: jax.Array
    u: jax.Array

    def __init__(self, n=4):
        self.w = helpers.weights(jr.key(0), n)
        self.u = jr.normal(jr.key(1), (n, n))

    def __call__(self, z, x, *, key=None):
        h = x @ self.u
        if key is not None:
            h = h * jr.bernoulli(key, 0.5, h.shape).astype(h.dtype)
        return jnp.tanh(z @ self.w + h)


class Started(Cell):
    """A cell with its own start, of another shape than the input."""

    def __call__(self, z, x, *, key=None):
        return super().__call__(z, x[:4])

    def initial_state(self, x):
        return 0.1 * x[:4]


x = np.linspace(-1, 1, 4, dtype=np.float32)


def test_the_output_is_the_fixed_point_of_the_cell(x64):
    cell = Cell()
    a = jnp.asarray(x, jnp.float64)
    z = DEQ(cell, **SETTINGS)(a)
    assert error(cell(z, a), z) <= 1e-12


def test_gradients_reach_the_cell_and_the_input(x64):
    cell, a = Cell(), jnp.asarray(x, jnp.float64)
    adjoint = deqjax.ImplicitAdjoint(deqjax.linear.GMRES(1e-13))

    @eqx.filter_jit
    def gradient(cell, a):
        run = lambda ca: weigh(DEQ(ca[0], adjoint=adjoint, **SETTINGS)(ca[1]))
        return eqx.filter_grad(run)((cell, a))

    def fn(z, args):
        return jnp.tanh(z @ args[0] + args[2] @ args[1])

    p = helpers.Problem(fn, jnp.zeros(4), (cell.w, cell.u, a))
    got, got_a = gradient(cell, a)
    assert error((got.w, got.u, got_a), helpers.dense(p).gradient) <= 1e-9


def test_the_start_is_zero_the_cells_own_or_the_one_given():
    a = jnp.asarray(x)
    once = {"solver": deqjax.Picard(None, None), "max_steps": 1}
    cell, started = Cell(), Started()
    assert error(DEQ(cell, **once)(a), cell(jnp.zeros(4), a)) <= 1e-6
    longer = jnp.concatenate([a, a])
    want = started(0.1 * a, longer)
    assert error(DEQ(started, **once)(longer), want) <= 1e-6
    given = jnp.ones(4)
    assert error(DEQ(cell, **once)(a, z0=given), cell(given, a)) <= 1e-6
    assert error(DEQ(started, **once)(longer, z0=given), started(given, longer)) <= 1e-6


def test_one_key_serves_a_whole_solve(x64):
    cell, a, key = Cell(), jnp.asarray(x, jnp.float64), jr.key(7)
    sol = DEQ(cell, **SETTINGS).solve(a, key=key)
    assert sol.result == OK
    assert error(cell(sol.value, a, key=key), sol.value) <= 1e-12
    other = DEQ(cell, **SETTINGS)(a, key=jr.key(8))
    assert error(other, sol.value) >= 1e-2


def test_max_steps_may_be_given_at_the_call():
    deq = DEQ(Cell(), solver=deqjax.Picard(None, None), max_steps=2)
    a = jnp.asarray(x)
    assert int(deq.solve(a).stats["num_steps"]) == 2
    assert int(deq.solve(a, max_steps=3).stats["num_steps"]) == 3
    want = DEQ(Cell(), solver=deq.solver, max_steps=3)(a)
    assert identical(deq(a, max_steps=3), want)


def test_solve_passes_aux_options_and_throw_on():
    cell = Cell()
    fn = lambda z, a: (cell(z, a), jnp.sum(z))
    a = jnp.asarray(x)
    deq = DEQ(fn, solver=deqjax.Picard(1e-5, 1e-6))
    sol = deq.solve(a, has_aux=True, options={"record": True})
    np.testing.assert_allclose(sol.aux, jnp.sum(sol.value), rtol=1e-6)
    assert sol.stats["residual_history"].shape == (64,)
    with pytest.raises(RuntimeError, match="maximum number of steps"):
        deq.solve(a, has_aux=True, throw=True, max_steps=2)


def test_jit_and_vmap_of_the_layer():
    deq = DEQ(Cell(), solver=deqjax.Picard(1e-6, 1e-6))
    batch = jnp.stack([jnp.asarray(x), 2 * jnp.asarray(x)])
    got = eqx.filter_jit(jax.vmap(deq))(batch)
    assert error(got, jnp.stack([deq(a) for a in batch])) <= 1e-5


@pytest.mark.parametrize("num_steps", [2, 10], ids=["unrolled", "loop"])
def test_reversible_layer_takes_its_steps_and_differentiates_them(num_steps, x64):
    cell, a = Cell(), jnp.asarray(x, jnp.float64)
    deq = RevDEQ(cell, num_steps=num_steps, beta=0.75)
    assert int(deq.solve(a).stats["num_evals"]) == 2 * num_steps

    def plain(cell):
        fn = lambda z, a: cell(z, a)
        return weigh(helpers.reversible(fn, jnp.zeros(4), a, num_steps, 0.75))

    run = lambda cell: weigh(RevDEQ(cell, num_steps=num_steps, beta=0.75)(a))
    got = eqx.filter_jit(eqx.filter_grad(run))(cell)
    want = eqx.filter_jit(eqx.filter_grad(plain))(cell)
    assert (
        error(deq(a), helpers.reversible(cell, jnp.zeros(4), a, num_steps, 0.75))
        < 1e-12
    )
    assert error(got, want) <= 1e-9


def test_layers_are_modules_whose_leaves_are_those_of_the_cell():
    layers = (DEQ(Cell()), RevDEQ(Cell()))
    for deq in layers:
        leaves = jax.tree.leaves(eqx.filter(deq, eqx.is_inexact_array))
        assert sorted(leaf.shape for leaf in leaves) == [(4, 4), (4, 4)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DEQ(3), "`cell` must be callable.*int"),
        (lambda: DEQ(Cell(), max_steps=0), "`max_steps`.*0"),
        (lambda: RevDEQ(Cell(), num_steps=0), "`num_steps`.*0"),
        (lambda: RevDEQ(Cell(), beta=1.0), "`beta`.*1.0"),
    ],
)
def test_arguments_are_refused_by_name(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()


def wide(z, x, *, key=None):
    """A cell with 5 hidden units for inputs of 3."""
    return jnp.tanh(jnp.ones((5, 5)) @ z + jnp.ones((5, 3)) @ x)


def returns_wide(z, x, *, key=None):
    return jnp.ones(5)


def keyless(z, x):
    return 0.5 * z + x


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: DEQ(wide)(jnp.ones(3)), r"inside the `cell`"),
        (lambda: DEQ(wide)(jnp.ones(3)), r"zeros.*\(3,\).*`z0=`.*`start=`.*initial_st"),
        (lambda: DEQ(returns_wide)(jnp.ones(3)), "`fn` is the `cell` of the layer"),
        (lambda: DEQ(returns_wide)(jnp.ones(3)), r"`z0=`.*`start=`.*`initial_state"),
        (lambda: DEQ(wide)(jnp.ones(3), z0=jnp.ones(4)), r"state of its own.*\(3,\)"),
        (lambda: DEQ(keyless)(jnp.ones(3), key=jr.key(0)), "let the cell take `key="),
        (
            lambda: DEQ(wide).iterates(jnp.ones(3), at=(1,)),
            r"zeros.*\(3,\).*`z0=`.*`start=`.*initial_state",
        ),
    ],
)
def test_an_error_of_the_cell_names_the_argument_that_helps(run, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        run()
    text = "\n".join([str(caught.value), *caught.value.__notes__])
    assert re.search(words, text, re.DOTALL)


def test_other_errors_are_left_as_they_are():
    with pytest.raises(ValueError, match="unknown entries") as caught:
        DEQ(keyless)(jnp.ones(3), options={"what": 1})
    assert not getattr(caught.value, "__notes__", ())


def test_hidden_sizes_of_their_own_are_solved_for():
    assert DEQ(wide)(0.1 * jnp.ones(3), z0=jnp.zeros(5)).shape == (5,)
