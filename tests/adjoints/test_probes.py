"""The probes of all adjoints: under jit, vmap and with several layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from deqjax.linear import GMRES
from tests import helpers
from tests.helpers import dense, problem

TIGHT = deqjax.Picard(1e-14, 1e-14)

# name -> (adjoint with a probe, the matrix S in λ = Sᵀ z̄, products of the solve)
BIASED = {
    "jfb": (lambda q: deqjax.JFBAdjoint(probe=q), (1, 1.0), 0),
    "neumann": (lambda q: deqjax.NeumannAdjoint(4, 0.7, probe=q), (4, 0.7), 3),
    "phantom": (lambda q: deqjax.PhantomAdjoint(4, 0.7, probe=q), (4, 0.7), 3),
}


def squares(p, adjoint, solver=TIGHT, steps=300):
    """(args, probe) -> half the sum of squares of the solution, whose z̄ is z*."""

    def run(args, probe):
        sol = deqjax.fixed_point(
            p.fn, p.z0, args, solver=solver, adjoint=adjoint(probe), max_steps=steps
        )
        return 0.5 * jnp.sum(sol.value**2)

    return run


def stats_of(run, args, probe=None):
    probe = deqjax.BackwardStats() if probe is None else probe
    return jax.jit(jax.grad(run, argnums=1))(args, probe)


@pytest.mark.parametrize("name", BIASED)
def test_residual_of_a_biased_gradient(name, x64):
    adjoint, series, products = BIASED[name]
    p = problem("tanh")
    ref, v = dense(p), np.asarray(helpers.settle(p))
    stats = stats_of(squares(p, adjoint), p.args)
    left = v - (np.eye(4) - ref.jacobian).T @ (ref.terms(*series).T @ v)
    size = np.linalg.norm(left)
    np.testing.assert_allclose(stats.residual, size, rtol=1e-5)
    np.testing.assert_allclose(
        stats.relative_residual, size / np.linalg.norm(v), rtol=1e-5
    )
    assert float(stats.num_products) == products
    assert float(stats.forward_residual) <= 1e-12
    # There is no tolerance to meet.
    assert np.isnan(stats.converged)
    assert np.isnan(stats.drift)


@pytest.mark.parametrize("name", ["implicit", *BIASED])
def test_a_forward_solve_that_has_not_converged_shows(name, x64):
    adjoint = BIASED.get(name, (lambda q: deqjax.ImplicitAdjoint(probe=q),))[0]
    p, solver = problem("tanh"), deqjax.Picard(None, None)
    stats = stats_of(squares(p, adjoint, solver, 2), p.args)
    z = helpers.picard(p, 2)[-1]
    want = np.linalg.norm(p.fn(z, p.args) - z)
    assert want > 1e-2
    np.testing.assert_allclose(stats.forward_residual, want, rtol=1e-6)


@pytest.mark.parametrize("last", [None, 3])
@pytest.mark.parametrize("solver", ["static", "tested"])
def test_unrolled_steps_are_counted(last, solver, x64):
    p, static = problem("tanh"), solver == "static"
    solver = deqjax.Picard(None, None) if static else deqjax.Picard(1e-3, 1e-4)
    adjoint = lambda q: deqjax.UnrolledAdjoint(last=last, probe=q)
    run = squares(p, adjoint, solver, 12)
    stats = stats_of(run, p.args)
    sol = deqjax.fixed_point(p.fn, p.z0, p.args, solver=solver, max_steps=12)
    # Of a tested solve, the evaluation that tests the answer is pulled back too.
    want = int(sol.stats["num_steps"]) if last is None else last + (not static)
    assert float(stats.num_products) == want
    np.testing.assert_allclose(stats.forward_residual, sol.stats["residual"], rtol=1e-6)
    for name in ("residual", "relative_residual", "converged", "drift"):
        assert np.isnan(getattr(stats, name))
    # The probe changes nothing else.
    plain = jax.jit(jax.grad(squares(p, lambda _: adjoint(None), solver, 12)))
    with_probe = jax.jit(jax.grad(run))
    probe = deqjax.BackwardStats()
    assert helpers.error(with_probe(p.args, probe), plain(p.args, probe)) <= 1e-14


def test_every_lane_of_vmap_has_its_own_record(x64):
    p = problem("tanh")
    w, x = p.args
    xs = jnp.stack([x, 0 * x, 3 * x])
    adjoints = [
        lambda q: deqjax.ImplicitAdjoint(GMRES(1e-3), probe=q),
        lambda q: deqjax.NeumannAdjoint(2, probe=q),
        lambda q: deqjax.PhantomAdjoint(2, probe=q),
        lambda q: deqjax.UnrolledAdjoint(last=2, probe=q),
    ]

    def all_of(x, probes):
        return sum(
            squares(p, adjoint, deqjax.Picard(1e-6, 1e-6))((w, x), probe)
            for adjoint, probe in zip(adjoints, probes, strict=True)
        )

    stats = jax.grad(all_of, argnums=1)
    probes = lambda shape: [deqjax.BackwardStats(shape) for _ in adjoints]
    together = jax.jit(jax.vmap(stats))(xs, probes((3,)))
    alone = jax.jit(stats)
    for i in range(3):
        one = alone(xs[i], probes(()))
        for mine, its in zip(together, one, strict=True):
            for name in ("relative_residual", "forward_residual", "converged"):
                np.testing.assert_allclose(
                    getattr(mine, name)[i], getattr(its, name), rtol=1e-4, atol=1e-9
                )
    # The lane whose answer and cotangent are 0 has nothing to solve.
    assert float(together[0].residual[1]) == 0
    assert len(set(together[1].residual.tolist())) == 3


def test_layers_report_to_their_own_probes(x64):
    p = problem("tanh")

    def layered(args, probes):
        w, x = args
        z = p.z0 + x
        adjoints = [
            deqjax.ImplicitAdjoint(GMRES(0.5), probe=probes[0]),
            deqjax.NeumannAdjoint(3, probe=probes[1]),
            deqjax.JFBAdjoint(probe=probes[2]),
        ]
        for adjoint in adjoints:
            z = deqjax.fixed_point(
                p.fn, p.z0, (w, z), solver=TIGHT, adjoint=adjoint, max_steps=300
            ).value
        return jnp.sum(z)

    probes = [deqjax.BackwardStats() for _ in range(3)]
    stats = jax.jit(jax.grad(layered, argnums=1))(p.args, probes)
    assert float(stats[0].converged) == 1
    assert 0 < float(stats[0].relative_residual) <= 0.5
    assert [float(s.num_products) for s in stats[1:]] == [2, 0]

    # The last layer is solved for z̄ = 1: what it leaves is known.
    w, x = p.args
    for _ in range(2):
        x = helpers.settle(p._replace(args=(w, x)))
    ref = dense(p._replace(args=(w, x)))
    left = np.linalg.norm(ref.jacobian.T @ np.ones(4))
    np.testing.assert_allclose(stats[2].residual, left, rtol=1e-6)


@pytest.mark.parametrize("name", [*BIASED, "unrolled"])
def test_a_probe_that_is_not_given_costs_nothing(name):
    make = BIASED.get(name, (lambda q: deqjax.UnrolledAdjoint(probe=q),))[0]
    p = problem("tanh")

    def flops(probe):
        run = squares(p, lambda _: make(probe), deqjax.Picard(None, None), 3)
        gradient = jax.jit(jax.grad(lambda a: run(a, None)))
        return gradient.lower(p.args).compile().cost_analysis()["flops"]

    assert flops(None) == flops(deqjax.BackwardStats())
