"""The only door to what equinox and optimistix do not export as public API.

`optimistix` hands an adjoint a pure function and the tuple of its inputs
(`_iterate.py`, `iterative_solve`); `Inputs` and `Outputs` name the places of those
tuples, so that nothing else in deqjax depends on their order.
"""

from typing import Any, NamedTuple

from equinox.internal import (
    Static as Static,
    nondifferentiable as nondifferentiable,
    nondifferentiable_backward as nondifferentiable_backward,
    unvmap_any as unvmap_any,
    unvmap_max as unvmap_max,
    while_loop as while_loop,
)

# Loops of static length up to this one are unrolled if they are backpropagated through:
# equinox's checkpointed loop took 1.7 times the time (8 Picard steps on an MLP), and
# three times the time to compile; `lax.scan` up to 1.7 times the memory.
UNROLL = 8


def bind(eqn: Any, inputs: list[Any]) -> list[Any]:
    """Evaluate one equation of a jaxpr."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    # A pair up to JAX 0.9, a dictionary from then on.
    functions, params = ((), bound) if isinstance(bound, dict) else bound
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return outputs if eqn.primitive.multiple_results else [outputs]


class Inputs(NamedTuple):
    """What optimistix passes to `AbstractAdjoint.apply` as `inputs`."""

    fn: Any
    solver: Any
    y0: Any
    args: Any
    options: Any
    max_steps: Any
    f_struct: Any
    aux_struct: Any
    tags: Any


class Extras(NamedTuple):
    """What optimistix's primal function returns beside the solution."""

    num_steps: Any
    result: Any
    dynamic_state: Any
    static_state: Any
    aux: Any
    stats: Any


class Carry(NamedTuple):
    """What optimistix carries through the loop that the adjoint supplies."""

    y: Any
    num_steps: Any
    state: Any
    aux: Any
    terminate: Any
    result: Any
