"""A batch sharded over devices: the same gradients, and loops without communication."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import deqjax
from tests.helpers import error, norm_map, weigh

pytestmark = pytest.mark.optimised

COLLECTIVE = r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"


def case(batch=4, width=12):
    x = jnp.sin(jnp.arange(batch * width, dtype=jnp.float32)).reshape(batch, width)
    w = jnp.cos(jnp.arange(width * width, dtype=jnp.float32)).reshape(width, width)
    return w / 10, x


def solve(fn, z0, args, probe, *, solver, steps):
    adjoint = deqjax.ReversibleAdjoint(probe=probe)
    return deqjax.fixed_point(
        fn, z0, args, solver=solver, adjoint=adjoint, max_steps=steps
    )


def program(tol, steps):
    solver = deqjax.Reversible(tol, tol, beta=0.8, batch_ndim=1)

    def loss(args, z0, probe):
        value = solve(norm_map, z0, args, probe, solver=solver, steps=steps).value
        return weigh(value)

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def spread(kind):
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(kind,))
    rows, whole = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
    return mesh, rows, whole


def called_by_loops(text):
    """The text of all computations of an HLO module that loop bodies reach."""
    parts = dict(
        re.findall(
            r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}",
            text,
            re.MULTILINE | re.DOTALL,
        )
    )
    todo = re.findall(r"body=%?([\w.\-]+)", text)
    assert todo
    seen = set()
    while todo:
        name = todo.pop()
        if name in parts and name not in seen:
            seen.add(name)
            todo += re.findall(r"%([\w.\-]+)", parts[name])
    return "\n".join(parts[name] for name in seen)


def test_the_reader_of_programs_sees_a_collective_in_a_loop():
    _, rows, _ = spread(AxisType.Auto)
    body = lambda _, x: x - jnp.mean(x, 0)
    run = jax.jit(lambda x: jax.lax.fori_loop(0, 9, body, x), out_shardings=rows)
    x = jax.device_put(case()[1], rows)
    text = run.lower(x).compile().as_text()
    assert re.search(COLLECTIVE, called_by_loops(text))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("tol", "steps"), [(None, 3), (None, 20), (1e-3, 20)], ids=["few", "loop", "tested"]
)
def test_a_sharded_batch_has_the_same_gradient(kind, tol, steps):
    assert jax.device_count() > 1
    w, x = case()
    want = program(tol, steps)((w, x), 0 * x, deqjax.BackwardStats((len(x),)))
    mesh, rows, whole = spread(kind)
    with jax.set_mesh(mesh):
        args = jax.device_put(w, whole), jax.device_put(x, rows)
        probe = jax.device_put(deqjax.BackwardStats((len(x),)), rows)
        z0 = jax.device_put(0 * x, rows)
        compiled = program(tol, steps).lower(args, z0, probe).compile()
        got = compiled(args, z0, probe)
    np.testing.assert_array_equal(got[2].drift, np.zeros(len(x)))
    assert error(got[:2], want[:2]) <= 2e-6
    assert got[1].sharding.is_equivalent_to(rows, 2)
    if tol is None and steps > 8:
        check_loops(compiled.as_text())


def check_loops(text):
    """The loops communicate nothing but what the pull-back of f itself does."""
    found = re.findall(rf"= (.*) {COLLECTIVE}\(", called_by_loops(text))
    # The gradient for w, a sum over the batch.
    assert all(shape.startswith("f32[12,12]") for shape, _ in found)
    assert len(found) <= 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_one_problem_with_a_sharded_axis_adds_no_communication_to_the_loops(kind):
    w, x = case()
    mesh, rows, whole = spread(kind)
    solver = deqjax.Reversible(None, None, beta=0.8)

    def loss(args, z0, probe):
        value = solve(norm_map, z0, args, probe, solver=solver, steps=20).value
        return weigh(value)

    run = jax.jit(jax.grad(loss, (0, 1, 2)))
    with jax.set_mesh(mesh):
        args = jax.device_put(w, whole), jax.device_put(x, rows)
        z0 = jax.device_put(0 * x, rows)
        compiled = run.lower(args, z0, deqjax.BackwardStats()).compile()
        *_, stats = compiled(args, z0, deqjax.BackwardStats())
    assert float(stats.drift) == 0
    check_loops(compiled.as_text())
