"""Solves that go on from the states in which another one has ended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from tests import helpers
from tests.helpers import error, identical, problem, weigh

pytestmark = pytest.mark.optimised

STATIC = deqjax.Reversible(None, None, beta=0.8)
EXACT = {"reversible": deqjax.ReversibleAdjoint(), "unrolled": deqjax.UnrolledAdjoint()}


def solve(p, args, z0, steps, companion=None, **kwargs):
    options = None if companion is None else {"companion": companion}
    kwargs = {"solver": STATIC, "options": options, **kwargs}
    return deqjax.fixed_point(
        helpers.pair(p), z0, args, max_steps=steps, has_aux=True, **kwargs
    )


def segments(p, args, z0, lengths, **kwargs):
    z, y = z0, None
    for steps in lengths:
        sol = solve(p, args, z, steps, y, **kwargs)
        z, y = sol.value, sol.state.companion
    return sol


def long(p, args, z0, **kwargs):
    return solve(p, args, z0, 9, **kwargs)


@pytest.mark.parametrize("name", EXACT)
def test_segments_are_one_long_solve(name, x64):
    p, adjoint = problem("tree"), EXACT[name]

    def run(method):
        def loss(args, z0):
            sol = method(args, z0)
            # The companion of the answer has a gradient of its own.
            return weigh(sol.value) + weigh(sol.state.companion) ** 2, sol

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(p.args, p.z0)

    one = run(lambda a, z: long(p, a, z, adjoint=adjoint))
    parts = run(lambda a, z: segments(p, a, z, (2, 3, 4), adjoint=adjoint))
    (want, sol), gradient = one
    (value, resumed), of_parts = parts
    same = [sol.value, sol.state.companion], [resumed.value, resumed.state.companion]
    if name == "reversible":
        assert identical(*same)
    # Steps of an unrolled program are compiled together.
    assert error(*same) <= 1e-14
    assert error(value, want) <= 1e-14
    assert error(of_parts, gradient) <= 1e-13


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_those_of_one_long_solve_to_the_bit(dtype):
    p = problem("tanh")
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    args, z0 = cast(p.args), cast(p.z0)
    for run in (lambda f: f, jax.jit):
        one = run(lambda: long(p, args, z0))()
        parts = run(lambda: segments(p, args, z0, (1, 5, 3)))()
        assert identical(one.value, parts.value)
        assert identical(one.state.companion, parts.state.companion)


def test_a_gradient_that_is_cut_is_that_of_the_last_segment(x64):
    p = problem("tanh")
    before = solve(p, p.args, p.z0, 5)

    def loss(a):
        first = solve(p, a, p.z0, 5)
        z, y = jax.lax.stop_gradient((first.value, first.state.companion))
        return weigh(solve(p, a, z, 4, y).value)

    def textbook(a):
        beta, (y, z) = 0.8, (before.state.companion, before.value)
        for _ in range(4):
            y = helpers.mix(beta, y, p.fn(z, a))
            z = helpers.mix(beta, z, p.fn(y, a))
        return weigh(z)

    got, want = (jax.jit(jax.grad(f))(p.args) for f in (loss, textbook))
    assert error(got, want) <= 1e-13


def test_the_reverse_sweep_ends_at_the_states_that_it_was_resumed_from():
    p = problem("tanh")

    def loss(a, probe, shift):
        first = solve(p, a, p.z0, 3)
        y = first.state.companion + shift
        adjoint = deqjax.ReversibleAdjoint(probe=probe)
        return weigh(solve(p, a, first.value, 6, y, adjoint=adjoint).value)

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    for shift in (0.0, 0.7):
        g, stats = gradient(p.args, deqjax.BackwardStats(), shift)
        assert float(stats.drift) == 0
        assert 0 < float(stats.repair) < 0.5
        assert np.all(np.isfinite(helpers.flat(g)))


def test_second_derivatives_go_through_segments(x64):
    p = problem("tanh")
    along = jax.tree.map(jnp.ones_like, p.args)

    def curvature(method):
        loss = lambda a: weigh(method(a).value)
        return jax.jit(lambda a: jax.jvp(jax.grad(loss), (a,), (along,))[1])(p.args)

    got = curvature(lambda a: segments(p, a, p.z0, (4, 5)))
    assert error(got, curvature(lambda a: long(p, a, p.z0))) <= 1e-12


def test_a_tested_solve_can_be_resumed_too(x64):
    """From the pair whose z passed the test: the answer satisfies it at once."""
    p = problem("tanh")
    tested = deqjax.Reversible(1e-6, 1e-8, beta=0.8)
    first = solve(p, p.args, p.z0, 60, solver=tested)
    assert bool(first.stats["converged"])
    again = solve(p, p.args, first.value, 60, first.state.companion, solver=tested)
    assert int(again.stats["num_steps"]) == 1
    assert identical(again.value, first.value)
    # And from there to a closer one, with the gradient of all steps.
    closer = deqjax.Reversible(1e-12, 1e-13, beta=0.8)

    def loss(a):
        sol = solve(p, a, p.z0, 60, solver=tested)
        sol = solve(p, a, sol.value, 200, sol.state.companion, solver=closer)
        return weigh(sol.value)

    assert error(jax.jit(jax.grad(loss))(p.args), helpers.dense(p).gradient) <= 1e-9


def test_batches_are_resumed_each_from_its_own_states(x64):
    p = helpers.batched()
    one = deqjax.Reversible(None, None, batch_ndim=1)
    value = lambda a: segments(p, a, p.z0, (2, 3), solver=one).value
    want = solve(p, p.args, p.z0, 5, solver=one).value
    assert identical(jax.jit(value)(p.args), want)


@pytest.mark.parametrize(
    ("companion", "words"),
    [
        (lambda z: (z, z), "tree structure of `z0`"),
        (lambda z: z[:-1], "shape of `z0`.*z0"),
        (lambda z: z.astype("bfloat16"), "dtype of `z0`.*bfloat16"),
        (lambda z: 1.0, "shape|dtype"),
    ],
)
def test_a_companion_that_does_not_fit_is_refused(companion, words):
    p = problem("tanh")
    with pytest.raises(ValueError, match=words):
        solve(p, p.args, p.z0, 3, companion(p.z0))


def test_only_the_reversible_solver_has_a_companion():
    p = problem("tanh")
    with pytest.raises(ValueError, match="unknown entries .*companion"):
        solve(p, p.args, p.z0, 3, p.z0, solver=deqjax.Picard())
