"""A batch sharded over devices: loops that hardly communicate, on any kind of axes."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

import deqjax
from tests.adjoints.test_mesh import COLLECTIVE, called_by_loops, case, spread
from tests.helpers import OK, SOLVERS, error, norm_map

pytestmark = pytest.mark.optimised

# The linear solves of NewtonKrylov ask the devices whether any system goes on.
names = ["picard", "anderson", "broyden", "reversible"]


def program(name, tol):
    solver = SOLVERS[name](tol, tol, batch_ndim=1)

    def run(args, z0):
        sol = deqjax.fixed_point(norm_map, z0, args, solver=solver, max_steps=20)
        return sol.value, sol.stats["residual"], sol.result == OK

    return jax.jit(run)


@pytest.mark.parametrize("name", names)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("tol", [1e-3, None], ids=["tested", "static"])
def test_problems_of_a_sharded_batch_stay_where_they_are(name, kind, tol):
    assert jax.device_count() > 1
    w, x = case()
    want = program(name, tol)((w, x), 0 * x)
    mesh, rows, whole = spread(kind)
    with jax.set_mesh(mesh):
        args = jax.device_put(w, whole), jax.device_put(x, rows)
        z0 = jax.device_put(0 * x, rows)
        compiled = program(name, tol).lower(args, z0).compile()
        got = compiled(args, z0)
    assert bool(got[2]) == bool(want[2])
    assert error(got[0], want[0]) <= 1e-5
    assert got[0].sharding.is_equivalent_to(rows, 2)
    assert got[1].sharding.is_equivalent_to(rows, 1)
    found = re.findall(rf"= (.*) {COLLECTIVE}\(", called_by_loops(compiled.as_text()))
    if tol is None:
        assert not found
    else:
        # Whether all are done: one scalar, asked at most twice in a step of two parts.
        assert all(re.match(r"\(?(pred|s32)\[\]", shape) for shape, _ in found), found
        assert len(found) <= (2 if name == "reversible" else 1), found


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_newtons_method_on_a_sharded_batch(kind):
    w, x = case()
    want = program("newton", 1e-3)((w, x), 0 * x)
    mesh, rows, whole = spread(kind)
    with jax.set_mesh(mesh):
        args = jax.device_put(w, whole), jax.device_put(x, rows)
        got = program("newton", 1e-3)(args, jax.device_put(0 * x, rows))
    assert bool(got[2])
    assert error(got[0], want[0]) <= 1e-5
    assert got[0].sharding.is_equivalent_to(rows, 2)


def test_a_problem_with_a_sharded_axis_is_solved_alike():
    """One problem, its state spread: rings are not flattened, sums are over devices."""
    w, x = case()
    for solver in (deqjax.Anderson(1e-4, 1e-6), deqjax.Broyden(1e-4, 1e-6)):
        solve = lambda args, z0, solver=solver: (
            deqjax.fixed_point(norm_map, z0, args, solver=solver).value
        )
        want = solve((w, x), 0 * x)
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh, rows, whole = spread(kind)
            with jax.set_mesh(mesh):
                args = jax.device_put(w, whole), jax.device_put(x, rows)
                got = jax.jit(solve)(args, jax.device_put(jnp.zeros_like(x), rows))
            assert error(got, want) <= 1e-3
            assert got.sharding.is_equivalent_to(rows, 2)
