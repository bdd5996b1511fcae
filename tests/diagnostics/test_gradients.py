"""The gradients of adjoints against dense ones of NumPy, and what they cost."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax.diagnostics import gradient_report, solver_report
from tests import helpers


def exact(p, z):
    """d ½‖z*‖² / d(w, x) of the tanh map, in NumPy."""
    w, _ = (np.asarray(a, np.float64) for a in p.args)
    z = np.asarray(z, np.float64)
    slope = 1 - z**2
    j = slope[:, None] * w.T
    adjoint = slope * np.linalg.solve((np.eye(len(z)) - j).T, z)
    return np.concatenate([np.outer(z, adjoint).reshape(-1), adjoint])


TIGHT = deqjax.Anderson(rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("reference", ["dense", "GMRES"])
def test_errors_and_angles_are_those_of_a_dense_computation(reference, x64):
    p = helpers.problem("tanh", 5)
    adjoints = {
        "implicit": deqjax.ImplicitAdjoint(deqjax.linear.GMRES(rtol=1e-12)),
        "jfb": deqjax.JFBAdjoint(),
    }
    got = gradient_report(
        p.fn,
        p.z0,
        p.args,
        solver=TIGHT,
        adjoints=adjoints,
        dense_limit=5 if reference == "dense" else 4,
        repeats=1,
    )
    z = helpers.settle(p)
    want = exact(p, z)
    assert got.reference == reference
    np.testing.assert_allclose(got.reference_norm, np.linalg.norm(want), rtol=1e-9)
    assert float(got.error[0]) < 1e-9

    slope = 1 - np.asarray(z) ** 2
    step = slope * np.asarray(z)
    jfb = np.concatenate([np.outer(z, step).reshape(-1), step])
    norm = np.linalg.norm
    np.testing.assert_allclose(
        got.error[1], norm(jfb - want) / norm(want), rtol=1e-6, atol=1e-6
    )
    cosine = jfb @ want / norm(jfb) / norm(want)
    np.testing.assert_allclose(got.angle[1], np.degrees(np.arccos(cosine)), atol=1e-6)
    np.testing.assert_allclose(got.ratio[1], norm(jfb) / norm(want), rtol=1e-6)
    assert float(got.num_products[0]) >= 2
    assert float(got.num_products[1]) <= 1
    assert np.all(np.asarray(got.seconds) > 0)
    assert got.seconds.shape == (2,)
    assert np.all(np.asarray(got.compile_seconds) > np.asarray(got.seconds))


class Cell(eqx.Module):
    weight: jnp.ndarray
    name: str = "cell"

    def __call__(self, z, args):
        return {"z": jnp.tanh(self.weight @ z["z"] + args)}


def test_the_reference_is_beyond_an_early_stop_and_knows_modules():
    cell = Cell(0.4 * jnp.eye(3) + 0.1)
    early = deqjax.Picard(rtol=None, atol=None)
    got = gradient_report(
        cell,
        {"z": jnp.zeros(3)},
        jnp.array([0.3, -0.2, 0.5]),
        solver=early,
        adjoints=[deqjax.UnrolledAdjoint(), deqjax.UnrolledAdjoint()],
        max_steps=2,
        repeats=1,
        loss=lambda z: jnp.sum(z["z"]),
    )
    assert got.names == ("UnrolledAdjoint", "UnrolledAdjoint 2")
    assert float(got.error[0]) > 0.1
    assert float(got.reference_residual) < 1e-6
    text = str(got)
    assert "dense solve" in text
    assert "UnrolledAdjoint 2" in text
    assert "°" in text


def test_a_pair_has_its_own_solver():
    p = helpers.problem("tanh", 3)
    pair = (deqjax.Reversible(), deqjax.ReversibleAdjoint())
    got = gradient_report(
        p.fn, p.z0, p.args, adjoints={"reversible": pair}, repeats=1, max_steps=80
    )
    assert float(got.error[0]) < 1e-2


def test_solvers_side_by_side():
    p = helpers.problem("tanh", 4)
    # The second one may not take enough steps.
    solvers = {
        "picard": deqjax.Picard(rtol=1e-4, atol=1e-5),
        "short": deqjax.Picard(rtol=1e-12, atol=0.0),
    }
    got = solver_report(p.fn, p.z0, p.args, solvers=solvers, max_steps=20, repeats=2)
    sol = deqjax.fixed_point(p.fn, p.z0, p.args, solver=solvers["picard"], max_steps=20)
    assert got.names == ("picard", "short")
    assert int(got.num_steps[0]) == int(sol.stats["num_steps"])
    assert int(got.num_evals[0]) == int(sol.stats["num_evals"])
    np.testing.assert_allclose(got.residual[0], sol.stats["residual"], rtol=1e-5)
    assert got.converged.tolist() == [1.0, 0.0]
    assert int(got.num_steps[1]) == 20
    assert np.all(np.asarray(got.seconds) > 0)
    assert "picard" in str(got)
    assert "100 %" in str(got)
    assert "0 %" in str(got)


def test_batches_are_counted_per_problem():
    p = helpers.batched()
    solver = deqjax.Picard(rtol=1e-4, atol=1e-6, batch_ndim=1)
    got = solver_report(p.fn, p.z0, p.args, solvers=[solver], max_steps=8, repeats=1)
    sol = deqjax.fixed_point(p.fn, p.z0, p.args, solver=solver, max_steps=8)
    part = float(jnp.mean(sol.stats["converged"].astype(jnp.float32)))
    assert 0 < part < 1
    assert float(got.converged[0]) == part
    np.testing.assert_allclose(got.residual[0], jnp.max(sol.stats["residual"]))


def test_bad_arguments():
    f = lambda z, a: 0.5 * z
    with pytest.raises(ValueError, match="to differentiate by"):
        gradient_report(f, jnp.ones(2))
    with pytest.raises(ValueError, match="`repeats`"):
        gradient_report(f, jnp.ones(2), jnp.ones(2), repeats=0)
    for report, name in ((gradient_report, "adjoints"), (solver_report, "solvers")):
        with pytest.raises(ValueError, match=f"`{name}` must not be empty"):
            report(f, jnp.ones(2), jr.normal(jr.key(0), (2,)), **{name: {}})
