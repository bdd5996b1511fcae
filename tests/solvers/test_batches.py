"""Independent problems along leading axes, under vmap, and on several devices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import deqjax
from tests import helpers
from tests.helpers import OK, SOLVERS, batched, error, identical, row

solvers = pytest.mark.parametrize("name", SOLVERS)


def solve(p, solver, **kwargs):
    return deqjax.fixed_point(p.fn, p.z0, p.args, solver=solver, **kwargs)


@solvers
def test_problems_of_a_batch_are_solved_as_if_alone(name):
    # One is a constant map: Newton's method takes as many steps for the others.
    p = batched(gains=(0.0, 0.6, 0.85, 0.95))
    whole = solve(p, SOLVERS[name](1e-4, 1e-6, batch_ndim=1), max_steps=100)
    assert whole.result == OK
    steps = [int(n) for n in whole.stats["num_steps"]]
    assert len(set(steps)) > 1
    evals = 0
    for i in range(4):
        alone = solve(row(p, i), SOLVERS[name](1e-4, 1e-6), max_steps=100)
        assert error(whole.value[i], alone.value) <= 1e-6
        assert steps[i] == int(alone.stats["num_steps"])
        np.testing.assert_allclose(
            whole.stats["residual"][i], alone.stats["residual"], rtol=0.02
        )
        evals = max(evals, int(alone.stats["num_evals"]))
    assert int(whole.stats["num_evals"]) == evals


@solvers
@pytest.mark.parametrize("tol", [1e-4, None], ids=["tested", "static"])
def test_vmap_means_the_same_as_batch_ndim(name, tol):
    p = batched()
    w, x, gain = p.args

    def one(x, gain, z):
        q = p._replace(z0=z, args=(w, x, gain))
        sol = solve(q, SOLVERS[name](tol, tol), max_steps=60)
        return sol.value, sol.stats["num_steps"], sol.result == OK

    value, steps, ok = jax.jit(jax.vmap(one))(x, gain, p.z0)
    whole = solve(p, SOLVERS[name](tol, tol, batch_ndim=1), max_steps=60)
    assert error(value, whole.value) <= 1e-6
    assert np.array_equal(steps, np.broadcast_to(whole.stats["num_steps"], (4,)))
    assert bool(jnp.all(ok))


@solvers
def test_vmap_evaluates_as_often_as_the_slowest_problem(name):
    p, counter = batched(), helpers.Counter()
    w, x, gain = p.args
    single = jnp.zeros(())

    def fn(z, args):
        # Counts once per evaluation of the whole batch: it sees nothing batched.
        jax.debug.callback(lambda _: counter._evaluations.append(1), single)
        return p.fn(z, args)

    def one(x, gain, z):
        q = p._replace(fn=fn, z0=z, args=(w, x, gain))
        return solve(q, SOLVERS[name](1e-4, 1e-6), max_steps=60).stats["num_evals"]

    evals = jax.jit(jax.vmap(one))(x, gain, p.z0)
    assert counter.evaluations == int(jnp.max(evals))


@solvers
@pytest.mark.parametrize("tol", [1e-4, None], ids=["tested", "static"])
def test_a_nan_batch_mate_changes_nothing(name, tol):
    p, keep = batched(), np.array([0, 1, 3])
    solver = SOLVERS[name](tol, tol, batch_ndim=1)
    clean = solve(p, solver, max_steps=60)
    spoiled = solve(p._replace(z0=p.z0.at[2].set(jnp.nan)), solver, max_steps=60)
    assert identical(spoiled.value[keep], clean.value[keep])
    assert identical(spoiled.stats["residual"][keep], clean.stats["residual"][keep])
    assert spoiled.result == optx.RESULTS.nonfinite
    tested = tol is not None
    converged = [tested, tested, False, tested]
    assert list(np.asarray(spoiled.stats["converged"])) == converged


@solvers
def test_a_batch_of_pytrees_may_have_two_axes(name):
    def fn(z, x):
        return {"a": jnp.tanh(0.5 * z["a"] + z["b"][..., None]), "b": 0.5 * z["b"] + x}

    x = jnp.linspace(0.1, 0.6, 6).reshape(2, 3)
    z0 = {"a": jnp.zeros((2, 3, 1)), "b": jnp.zeros((2, 3))}
    solver = SOLVERS[name](1e-5, 1e-6, batch_ndim=2)
    sol = deqjax.fixed_point(fn, z0, x, solver=solver)
    assert sol.result == OK
    assert sol.stats["converged"].shape == (2, 3)
    assert error(sol.value["b"], 2 * x) <= 1e-4


@solvers
@pytest.mark.parametrize("tol", [1e-4, None], ids=["tested", "static"])
def test_batch_axes_must_agree(name, tol):
    z0 = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"batch_ndim=1.*'b'"):
        deqjax.fixed_point(
            lambda z, _: z, z0, solver=SOLVERS[name](tol, tol, batch_ndim=1)
        )


def test_aux_of_a_batch_needs_its_axes():
    fn = lambda z, _: (0.5 * z, jnp.sum(z, 0))
    with pytest.raises(ValueError, match="`aux`"):
        deqjax.fixed_point(
            fn, jnp.ones((2, 3)), has_aux=True, solver=deqjax.Picard(batch_ndim=1)
        )


@solvers
def test_a_batch_stays_sharded(name):
    devices = jax.devices()
    assert len(devices) == 2
    mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
    shard = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    p = batched()
    w, x, gain = p.args
    place = lambda a: jax.device_put(a, shard)

    @eqx.filter_jit
    def run(solver, z, args):
        return solve(p._replace(z0=z, args=args), solver)

    for tol in (1e-4, None):
        solver = SOLVERS[name](tol, tol, batch_ndim=1)
        sol = run(solver, place(p.z0), (w, place(x), place(gain)))
        plain = solve(p, solver)
        assert error(sol.value, plain.value) <= 1e-6
        assert sol.value.sharding.is_equivalent_to(shard, 2)
        assert sol.stats["residual"].sharding.is_equivalent_to(shard, 1)
        assert sol.result == OK
