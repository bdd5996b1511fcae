"""The only door to what equinox and optimistix do not export as public API."""

from typing import Any

import jax
from equinox.internal import (
    Static as Static,
    nondifferentiable as nondifferentiable,
    nondifferentiable_backward as nondifferentiable_backward,
    unvmap_any as unvmap_any,
    unvmap_max as unvmap_max,
    while_loop as while_loop,
)
from jax import lax
from jax.core import Tracer
from jaxtyping import Array
from optimistix._misc import wrap_jaxpr as wrap_jaxpr

# Loops of static length up to this one are unrolled if they are backpropagated through:
# equinox's checkpointed loop took 1.7 times the time (8 Picard steps on an MLP), and
# three times the time to compile; `lax.scan` up to 1.7 times the memory.
UNROLL = 8


def in_shard_map() -> bool:
    """Whether what is being traced is the program of one device."""
    return len(jax.sharding.get_abstract_mesh().manual_axes) > 0


def varying_axes(x: Any) -> frozenset[str]:
    """The axes of a `jax.shard_map` along which x differs, if that keeps track."""
    if not isinstance(x, Tracer):
        return frozenset()
    aval: Any = x.aval
    if hasattr(aval, "vma"):  # up to JAX 0.9
        return aval.vma
    return aval.manual_axis_type.varying


def pvary(x: Array, axes: tuple[str, ...]) -> Array:
    """x, which is the same on all devices along these axes, as if it were not."""
    of_version: Any = lax  # `pcast` from JAX 0.9 on, `pvary` before
    if hasattr(lax, "pcast"):
        return of_version.pcast(x, axes, to="varying")
    return of_version.pvary(x, axes)


def bind(eqn: Any, inputs: list[Any]) -> list[Any]:
    """Evaluate one equation of a jaxpr."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    # A pair up to JAX 0.9, a dictionary from then on.
    functions, params = ((), bound) if isinstance(bound, dict) else bound
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return outputs if eqn.primitive.multiple_results else [outputs]
