"""Equilibria as steady states of differential equations."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax.nn import DEQ, NeuralODE, SteadyStateODE
from tests import helpers
from tests.helpers import OK, error, weigh

diffrax = pytest.importorskip("diffrax", reason="diffrax is an optional extra")


class Cell(eqx.Module):
    w: jax.Array

    def __call__(self, z, x, *, key=None):
        return jnp.tanh(z @ self.w + x)


class Linear(eqx.Module):
    """z ↦ w z + x: the ODE's solution is known."""

    w: jax.Array

    def __call__(self, z, x, *, key=None):
        return self.w @ z + x


x = np.linspace(-1, 1, 4)


def cell():
    return Cell(helpers.weights(jr.key(0), 4))


def test_the_ode_is_the_one_stated_and_has_its_gradient(x64):
    # z(T) = A⁻¹ (e^{TA} − I) x for A = w − I and z(0) = 0.
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)) / 4)
    a = jnp.asarray(x)

    @jax.jit
    def got(w):
        ode = NeuralODE(Linear(w), end_time=1.5, rtol=1e-10, atol=1e-12)
        return weigh(ode(a))

    @jax.jit
    def want(w):
        b = w - jnp.eye(4)
        change = jax.scipy.linalg.expm(1.5 * b) - jnp.eye(4)
        return weigh(jnp.linalg.solve(b, change @ a))

    assert error(got(w), want(w)) <= 1e-8
    assert error(jax.grad(got)(w), jax.grad(want)(w)) <= 1e-7


def test_at_long_times_the_state_is_the_equilibrium_with_its_gradient(x64):
    a = jnp.asarray(x)

    def gradients(cell):
        ode = NeuralODE(cell, end_time=60.0, rtol=1e-9, atol=1e-12)
        adjoint = deqjax.ImplicitAdjoint(deqjax.linear.GMRES(1e-12))
        steady = SteadyStateODE(cell, rtol=1e-9, atol=1e-12, adjoint=adjoint)
        solver = deqjax.Picard(1e-13, 1e-13)
        deq = ode.deq(solver=solver, adjoint=adjoint, max_steps=300)
        assert isinstance(deq, DEQ)
        layers = (ode, steady, deq)
        return [
            eqx.filter_value_and_grad(lambda layer: weigh(layer(a)))(layer)
            for layer in layers
        ]

    (v1, g1), (v2, g2), (v3, g3) = eqx.filter_jit(gradients)(cell())
    assert error((v1, v2), (v3, v3)) <= 1e-7
    assert error((g1.cell.w, g2.cell.w), (g3.cell.w, g3.cell.w)) <= 1e-6


def test_steady_states_are_found_where_picard_diverges():
    # The eigenvalues of ∂f/∂z are −3.
    layer = SteadyStateODE(Linear(-3.0 * jnp.eye(4)), rtol=1e-5, atol=1e-6)
    a = jnp.asarray(x, jnp.float32)
    sol = layer.solve(a)
    assert sol.result == OK
    assert bool(sol.stats["converged"])
    assert error(sol.value, a / 4) <= 1e-4
    assert float(sol.stats["residual"]) <= 1e-5 * float(jnp.linalg.norm(a)) + 1e-6
    assert 0 < float(sol.stats["time"]) < 1000
    assert int(sol.stats["num_ode_steps"]) > 0
    picard = DEQ(layer.cell, solver=deqjax.Picard(1e-5, 1e-6)).solve(a)
    assert picard.result != OK


def test_a_state_that_is_not_steady_is_not_called_so():
    layer = SteadyStateODE(Linear(1.5 * jnp.eye(4)), max_steps=40)
    sol = layer.solve(jnp.asarray(x, jnp.float32))
    assert sol.result != OK
    assert not bool(sol.stats["converged"])


@pytest.mark.parametrize("kind", [NeuralODE, SteadyStateODE])
def test_states_of_any_dtype(kind, dtype):
    tol = {"rtol": 3e-2, "atol": 3e-2} if dtype.itemsize == 2 else {"rtol": 1e-4}
    layer = kind(jax.tree.map(lambda a: a.astype(dtype), cell()), **tol)
    z = layer(jnp.asarray(x, dtype))
    assert z.dtype == dtype
    start = {"end_time": 1.0} if kind is NeuralODE else {}
    want = kind(cell(), **start)(jnp.asarray(x, cell().w.dtype))
    assert error(z.astype(want.dtype), want) <= (0.1 if dtype.itemsize == 2 else 1e-3)


def test_float32_under_x64_stays_float32(x64):
    single = jax.tree.map(lambda a: a.astype(jnp.float32), cell())
    for layer in (NeuralODE(single), SteadyStateODE(single)):
        assert layer(jnp.asarray(x, jnp.float32)).dtype == jnp.float32


def test_euler_steps_are_those_of_damped_picard(x64):
    layer = NeuralODE(cell(), solver=diffrax.Euler(), dt0=0.25, end_time=2.0)
    a = jnp.asarray(x)
    solver = deqjax.Picard(None, None, beta=0.25)
    want = layer.deq(solver=solver, max_steps=8)(a)
    assert error(layer(a), want) <= 1e-12
    steady = SteadyStateODE(cell(), solver=diffrax.Euler(), dt0=0.5, rtol=1e-6)
    assert error(steady(a), layer.deq(solver=deqjax.Picard(1e-9, 1e-9))(a)) <= 1e-4


def test_compiled_and_eager_agree_and_a_loss_falls():
    a, target = jnp.asarray(x, jnp.float32), jnp.array([0.2, -0.1, 0.3, 0.1])
    for layer in (NeuralODE(cell(), rtol=1e-3), SteadyStateODE(cell())):
        loss = lambda layer: jnp.sum((layer(a) - target) ** 2)
        step = eqx.filter_value_and_grad(loss)
        eager, compiled = step(layer), eqx.filter_jit(step)(layer)
        assert error(compiled, eager) <= 1e-4
        step, losses = eqx.filter_jit(step), []
        for _ in range(6):
            value, slope = step(layer)
            losses.append(float(value))
            layer = eqx.apply_updates(layer, jax.tree.map(lambda g: -0.5 * g, slope))
        assert losses[-1] <= 0.9 * losses[0]


def test_vmap_integrates_each_member_by_itself():
    layer = SteadyStateODE(cell(), rtol=1e-5, atol=1e-6)
    batch = jnp.stack([jnp.asarray(x, jnp.float32), jnp.ones(4)])
    got = eqx.filter_jit(jax.vmap(layer))(batch)
    want = DEQ(layer.cell, solver=deqjax.Picard(1e-6, 1e-6, batch_ndim=1))(batch)
    assert error(got, want) <= 1e-4


@pytest.mark.parametrize("kind", [NeuralODE, SteadyStateODE])
def test_without_diffrax_the_error_says_what_to_install(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=rf"`{kind.__name__}`.*deqjax\[ode\]"):
        kind(cell())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda c: NeuralODE(3), "`cell` must be callable.*int"),
        (lambda c: NeuralODE(c, end_time=0.0), "`end_time`.*0.0"),
        (lambda c: NeuralODE(c, max_steps=0), "`max_steps`.*0"),
        (lambda c: NeuralODE(c, solver=diffrax.Euler()), "`dt0`.*Euler"),
        (lambda c: SteadyStateODE(c, solver=diffrax.Euler()), "`dt0`.*Euler"),
        (lambda c: NeuralODE(c, dt0=-1.0), "`dt0`.*-1.0"),
        (lambda c: NeuralODE(c, solver=diffrax.Euler), "`solver`.*an instance"),
        (lambda c: SteadyStateODE(c, rtol=-1.0), "`rtol`.*-1.0"),
        (
            lambda c: SteadyStateODE(c, adjoint=deqjax.UnrolledAdjoint()),
            "`adjoint` must be an implicit one.*UnrolledAdjoint",
        ),
    ],
)
def test_arguments_are_refused_by_name(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make(cell())
