"""An iteration followed over many steps, in parts that go on from one another."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._fixed_point import fixed_point
from ..adjoints import UnrolledAdjoint
from ..solvers import Reversible


class Orbits(NamedTuple):
    """What was seen of the orbits of a batch.

    Attributes:
        residual: (depths, *batch), relative.
        score: (depths, *batch); NaN without a read-out.
        step_length: (window, *batch), ‖z_k − z_{k−1}‖ in the window at the end.
        distance: (window, *batch), ‖z_k − z_w‖, z_w being where the window begins.
        end: z_N.
    """

    residual: Array
    score: Array
    step_length: Array
    distance: Array
    end: PyTree


class _Point(NamedTuple):
    """Where an orbit is: the iterate, its companion, and the number of steps so far."""

    z: PyTree
    y: PyTree
    step: Array


def follow(
    solver: Any,
    stops: tuple[int, ...],
    window: int,
    has_step: bool,
    read_out: Callable | None,
    z0: PyTree,
    fn: Callable,
    args: PyTree,
) -> Orbits:
    """Follow an iteration to the last of `stops`."""
    k = solver.batch_ndim
    norm = lambda z: _tree.norm(z, k)
    pairs = isinstance(solver, Reversible)

    def advance(point: _Point, steps: int) -> _Point:
        options: dict[str, Any] = {"companion": point.y} if pairs else {}
        if has_step:
            options["first_step"] = point.step
        sol = fixed_point(
            fn,
            point.z,
            args,
            solver=solver,
            adjoint=UnrolledAdjoint(),
            max_steps=steps,
            has_step=has_step,
            options=options,
        )
        y = sol.state.companion if pairs else None
        return _Point(sol.value, y, point.step + steps)

    def look(point: _Point) -> tuple[Array, Array]:
        f = fn(point.z, args, point.step) if has_step else fn(point.z, args)
        gap, size = norm(_tree.subtract(f, point.z)), norm(f)
        residual = jnp.where(gap == 0, 0, gap / jnp.where(size > 0, size, 1))
        if read_out is None:
            return residual, jnp.full_like(residual, jnp.nan)
        return residual, jnp.asarray(read_out(point.z)).astype(residual.dtype)

    end = stops[-1]
    begin = end - window
    point = _Point(z0, z0 if pairs else None, jnp.array(0, jnp.int32))
    seen = {0: look(point)} if stops[0] == 0 else {}
    here, origin, parts = 0, z0, []

    def one(carry: tuple[_Point, PyTree], _: None) -> tuple[Any, Any]:
        point, origin = carry
        new = advance(point, 1)
        length = norm(_tree.subtract(new.z, point.z))
        return (new, origin), (length, norm(_tree.subtract(new.z, origin)))

    for stop in sorted({*stops, begin} - {0}):
        if stop <= begin:
            point = advance(point, stop - here)
        else:
            carry, part = lax.scan(one, (point, origin), length=stop - here)
            point = carry[0]
            parts.append(part)
        if stop in stops:
            seen[stop] = look(point)
        if stop == begin:
            origin = point.z
        here = stop
    columns = zip(*seen.values(), strict=True)
    residual, score = (jnp.stack(column) for column in columns)
    lengths, distances = (
        jnp.concatenate(column) for column in zip(*parts, strict=True)
    )
    return Orbits(residual, score, lengths, distances, point.z)
