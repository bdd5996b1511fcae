"""What the probe of a backward pass reports."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import deqjax
from deqjax.linear import GMRES
from tests import helpers
from tests.helpers import problem

SOLVER = deqjax.Picard(1e-14, 1e-14)


def measured(args, probe, *, rtol=1e-2, solver=SOLVER, p=None):
    """The sum of squares of the solution of a linear problem, with a probe."""
    p = problem("linear") if p is None else p
    adjoint = deqjax.ImplicitAdjoint(GMRES(rtol), probe=probe)
    sol = deqjax.fixed_point(
        p.fn, p.z0, args, solver=solver, adjoint=adjoint, max_steps=300
    )
    return jnp.sum(sol.value**2)


def residual_by_hand(p, gradient):
    """z = z w + x: the gradient for x is λ with (I − w) λ = b, b = 2 z*."""
    w, x = (np.asarray(a) for a in p.args)
    b = 2 * np.linalg.solve((np.eye(len(x)) - w).T, x)
    r = b - (np.eye(len(x)) - w) @ np.asarray(gradient[1])
    return np.linalg.norm(r), np.linalg.norm(r) / np.linalg.norm(b)


@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-12])
def test_the_residual_is_the_true_one(rtol, x64):
    p = problem("linear")
    run = jax.jit(jax.grad(lambda a, q: measured(a, q, rtol=rtol), argnums=(0, 1)))
    gradient, stats = run(p.args, deqjax.BackwardStats())
    size, relative = residual_by_hand(p, gradient)
    if rtol > 1e-10:
        np.testing.assert_allclose(stats.residual, size, rtol=1e-5)
        np.testing.assert_allclose(stats.relative_residual, relative, rtol=1e-5)
    assert relative <= rtol
    assert float(stats.relative_residual) <= rtol
    assert float(stats.converged) == 1
    assert 2 <= float(stats.num_products) <= 4 + 1  # One measures the residual.
    assert np.isnan(stats.drift)


def test_what_the_probe_holds_does_not_matter(x64):
    p = problem("linear")
    other = jax.tree.map(lambda x: x + 7, deqjax.BackwardStats())
    run = jax.jit(jax.value_and_grad(measured, argnums=(0, 1)))
    first, second = run(p.args, deqjax.BackwardStats()), run(p.args, other)
    assert helpers.error(first[0], second[0]) == 0
    assert helpers.error(first[1][0], second[1][0]) == 0
    assert float(first[1][1].residual) == float(second[1][1].residual)


def test_lanes_of_vmap_have_their_own_probes_or_sum_up(x64):
    p = problem("linear")
    w, x = p.args
    xs = jnp.stack([x, 3 * x])
    grad = jax.grad(lambda x, probe: measured((w, x), probe), argnums=1)
    own = jax.jit(jax.vmap(grad))(xs, deqjax.BackwardStats(batch_shape=(2,)))
    alone = [grad(x, deqjax.BackwardStats()) for x in xs]
    for i in range(2):
        np.testing.assert_allclose(own.residual[i], alone[i].residual, rtol=1e-4)
        assert float(own.num_products[i]) == float(alone[i].num_products)

    def both(probe):
        return jnp.sum(jax.vmap(lambda x: measured((w, x), probe))(xs))

    total = jax.jit(jax.grad(both))(deqjax.BackwardStats())
    want = sum(float(a.residual) for a in alone)
    np.testing.assert_allclose(total.residual, want, rtol=1e-4)
    assert float(total.converged) == 2


def test_entries_of_a_batched_solve_are_per_problem_or_the_worst(x64):
    p = helpers.batched()
    solver = deqjax.Picard(1e-12, 1e-12, batch_ndim=1)

    def stats(batch_shape):
        def loss(args, probe):
            adjoint = deqjax.ImplicitAdjoint(GMRES(0.3, batch_ndim=1), probe=probe)
            sol = deqjax.fixed_point(
                p.fn, p.z0, args, solver=solver, adjoint=adjoint, max_steps=300
            )
            # The first problem does not count: nothing is to be solved for it.
            return jnp.sum(sol.value[1:] ** 2)

        probe = deqjax.BackwardStats(batch_shape=batch_shape)
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(p.args, probe)[1]

    each, worst = stats((4,)), stats(())
    assert each.residual.shape == (4,)
    assert float(each.residual[0]) == 0
    np.testing.assert_array_equal(each.converged, np.ones(4))
    assert len(set(each.num_products.tolist())) == 1
    for name in ("residual", "relative_residual", "num_products"):
        want = float(jnp.max(getattr(each, name)))
        np.testing.assert_allclose(getattr(worst, name), want, rtol=1e-5)
    assert float(worst.converged) == 1


def test_a_probe_used_twice_collects_the_sum(x64):
    p = problem("linear")
    once = jax.jit(jax.grad(measured, argnums=(0, 1)))
    twice = jax.jit(
        jax.grad(lambda a, q: measured(a, q) + measured(a, q), argnums=(0, 1))
    )
    probe = deqjax.BackwardStats()
    single, double = once(p.args, probe)[1], twice(p.args, probe)[1]
    assert float(double.num_products) == 2 * float(single.num_products)


def test_a_solver_without_a_count_leaves_it_nan(x64):
    p = problem("linear")

    def run(args, probe):
        adjoint = deqjax.ImplicitAdjoint(lx.LU(), probe=probe)
        sol = deqjax.fixed_point(
            p.fn, p.z0, args, solver=SOLVER, adjoint=adjoint, max_steps=300
        )
        return jnp.sum(sol.value**2)

    stats = jax.jit(jax.grad(run, argnums=(0, 1)))(p.args, deqjax.BackwardStats())[1]
    assert np.isnan(stats.num_products)
    assert float(stats.converged) == 1
    assert float(stats.relative_residual) <= 1e-14


def test_the_drift_of_a_reversible_pass(x64):
    p = problem("tanh")
    p = p._replace(z0=p.z0 + 0.3)
    beta, steps = 0.5, 8
    solver = deqjax.Reversible(None, None, beta=beta)

    def run(args, probe):
        adjoint = deqjax.ReversibleAdjoint(probe=probe)
        return helpers.loss(p, solver=solver, adjoint=adjoint, max_steps=steps)(args)

    stats = jax.jit(jax.grad(run, argnums=(0, 1)))(p.args, deqjax.BackwardStats())[1]
    assert float(stats.drift) == 0
    # Roundings at the least, of units of which 192 make up the modulus.
    assert 1 / 255 <= float(stats.repair) <= 0.5
    for name in ("residual", "relative_residual", "num_products", "converged"):
        assert np.isnan(getattr(stats, name))


def test_no_probe_costs_nothing():
    p = problem("linear")
    plain = jax.jit(jax.grad(lambda a: measured(a, None, solver=deqjax.Picard())))
    probed = jax.jit(
        jax.grad(lambda a: measured(a, deqjax.BackwardStats(), solver=deqjax.Picard()))
    )
    flops = [
        f.lower(p.args).compile().cost_analysis()["flops"] for f in (plain, probed)
    ]
    assert flops[0] == flops[1]


def test_a_probe_differentiated_alone_is_filled_too(x64):
    p = problem("linear")
    alone = jax.jit(jax.grad(measured, argnums=1))(p.args, deqjax.BackwardStats())
    both = jax.jit(jax.grad(measured, (0, 1)))(p.args, deqjax.BackwardStats())[1]
    assert float(alone.converged) == 1
    assert float(alone.num_products) == float(both.num_products)
    np.testing.assert_allclose(alone.residual, both.residual, rtol=1e-6)


def test_a_probe_that_does_not_fit():
    def loss(probe):
        sol = deqjax.fixed_point(
            lambda z, a: 0.5 * z + a,
            jnp.zeros((4, 2)),
            1.0,
            solver=deqjax.Picard(batch_ndim=1),
            adjoint=deqjax.ImplicitAdjoint(probe=probe),
        )
        return jnp.sum(sol.value)

    with pytest.raises(ValueError, match=r"`BackwardStats\(\(4,\)\)`"):
        jax.grad(loss)(deqjax.BackwardStats((3,)))


def test_linear_solvers_take_over_the_problems_of_the_batch():
    def loss(a, probe, linear_solver, batch_ndim):
        sol = deqjax.fixed_point(
            lambda z, a: a * jnp.roll(z, 1, -1) + 1.0,
            jnp.zeros((3, 5)),
            a,
            solver=deqjax.Picard(batch_ndim=batch_ndim),
            adjoint=deqjax.ImplicitAdjoint(linear_solver, probe=probe),
        )
        return jnp.sum(jnp.arange(5.0) ** 2 * sol.value)

    a, probe = jnp.array([[0.0], [0.1], [0.8]]), deqjax.BackwardStats((3,))
    run = jax.grad(loss, argnums=(0, 1))
    for solver in (GMRES(1e-2), deqjax.linear.Neumann(1e-2)):
        _, stats = run(a, probe, solver, 1)
        # The first has J = 0: nothing but rounding is left, whatever the others need.
        assert stats.relative_residual[0] < 1e-6 < stats.relative_residual[1]
        assert stats.converged.all()
    with pytest.raises(ValueError, match="`linear_solver` has batch_ndim=1"):
        run(a, probe, GMRES(batch_ndim=1), 0)
