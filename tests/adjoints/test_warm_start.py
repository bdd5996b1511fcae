"""λ as the gradient of an additive zero, and as the start of the next solve."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import deqjax
from deqjax.linear import GMRES, Neumann
from tests import helpers
from tests.helpers import dense, error, problem, weigh

SOLVER = deqjax.Picard(1e-14, 1e-14)


def loss(p, linear_solver, batch_ndim=0):
    """(args, zero added to f, start of the adjoint system, probe) -> a scalar."""
    solver = deqjax.Picard(1e-14, 1e-14, batch_ndim=batch_ndim)

    def run(args, zero, guess, probe):
        fn = lambda z, args: jax.tree.map(jnp.add, p.fn(z, args), zero)
        adjoint = deqjax.ImplicitAdjoint(linear_solver, initial=guess, probe=probe)
        sol = deqjax.fixed_point(
            fn, p.z0, args, solver=solver, adjoint=adjoint, max_steps=400
        )
        return weigh(sol.value)

    return run


@pytest.mark.parametrize(
    "linear_solver", [GMRES(1e-9), Neumann(1e-9)], ids=["gmres", "neumann"]
)
def test_lambda_starts_the_next_backward_pass(linear_solver, x64):
    p, probe = problem("tree"), deqjax.BackwardStats()
    gradient = jax.jit(jax.grad(loss(p, linear_solver), argnums=(0, 1, 3)))
    zero = jax.tree.map(jnp.zeros_like, p.z0)
    want, adjoint, cold = gradient(p.args, zero, zero, probe)

    # λ = (I − J)⁻ᵀ z̄, dense.
    ref = dense(p)
    z = helpers.settle(p)
    ct = helpers.flat(jax.grad(weigh)(z))
    by_hand = np.linalg.solve((np.eye(len(ct)) - ref.jacobian).T, ct)
    assert error(jnp.asarray(helpers.flat(adjoint)), by_hand) <= 1e-7

    again, _, warm = gradient(p.args, zero, adjoint, probe)
    assert error(again, want) <= 1e-7
    assert float(warm.converged) == 1
    assert float(warm.num_products) == 1
    assert float(cold.num_products) >= 5

    # A little later in training: fewer products, and the answer of the new problem.
    moved = jax.tree.map(lambda a: a + 1e-4 * jnp.cos(a), p.args)
    later, _, near = gradient(moved, zero, adjoint, probe)
    assert error(later, dense(p._replace(args=moved)).gradient) <= 1e-6
    assert 1 < float(near.num_products) < float(cold.num_products)


def test_a_start_that_is_not_finite_is_none(x64):
    p = helpers.batched()
    gradient = jax.jit(jax.grad(loss(p, GMRES(1e-9, batch_ndim=1), 1), argnums=(0, 3)))
    zero = jnp.zeros_like(p.z0)
    probe = deqjax.BackwardStats((4,))
    lost = zero.at[1].set(jnp.nan).at[2].set(jnp.inf)
    got, stats = gradient(p.args, zero, lost, probe)
    np.testing.assert_array_equal(stats.converged, np.ones(4))
    assert error(got, dense(p).gradient) <= 1e-7


@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_the_start_is_scaled_as_the_cotangent_is(scale):
    p, zero = problem("tanh"), jnp.zeros(4)
    scale = jnp.float32(scale)

    def run(zero, guess, probe):
        return scale * loss(p, GMRES(1e-4))(p.args, zero, guess, probe)

    gradient = jax.jit(jax.grad(run, argnums=(0, 2)))
    adjoint, cold = gradient(zero, zero, deqjax.BackwardStats())
    again, warm = gradient(zero, adjoint, deqjax.BackwardStats())
    assert float(warm.num_products) == 1 < float(cold.num_products)
    assert error(again / scale, adjoint / scale) <= 1e-5


def test_solvers_that_take_no_start_ignore_it(x64):
    p, zero = problem("tanh"), jnp.zeros(4)
    run = loss(p, lx.LU())
    got = jax.jit(jax.grad(run))(p.args, zero, zero + 1, None)
    assert error(got, dense(p).gradient) <= 1e-9


def test_the_start_has_no_derivative(x64):
    p, zero = problem("tanh"), jnp.zeros(4)
    got = jax.grad(loss(p, GMRES(1e-9)), argnums=2)(p.args, zero, zero + 1, None)
    assert not np.any(got)


def test_a_start_of_another_structure_is_refused():
    p, zero = problem("tanh"), jnp.zeros(4)
    with pytest.raises(ValueError, match=r"`initial`.*structure.*\(5,\)"):
        loss(p, None)(p.args, zero, jnp.zeros(5), None)


def test_a_start_without_a_type_of_its_own(x64):
    """Weakly typed, as what `jax.numpy.full` makes of a Python number."""
    run = loss(problem("tanh"), GMRES(1e-12))
    args, zero = problem("tanh").args, jnp.zeros(problem("tanh").z0.shape)
    probe = deqjax.BackwardStats()
    want = jax.grad(run)(args, zero, zero, probe)
    got = jax.grad(run)(args, zero, jnp.full(zero.shape, 2.0), probe)
    assert error(got, want) <= 1e-9
