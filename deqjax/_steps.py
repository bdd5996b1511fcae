"""Maps that are told the number of their step.

f(z, args, n) is another map in every step n: with an embedding of n, or noise from a
key that n is folded into. The number travels within the arguments of the map, so that
whoever evaluates it, forwards or backwards, says at which step that is.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree


class Numbered(eqx.Module):
    """Arguments of a map that is told its step.

    Attributes:
        args: the arguments without it.
        first: the number of the first step of the solve.
        step: the number to be told.
    """

    args: PyTree
    first: Int[Array, ""]
    step: Int[Array, ""]


def at_step(args: PyTree, steps: Int[Array, ""] | int) -> PyTree:
    """The arguments of an evaluation after `steps` whole steps of the solve."""
    if not isinstance(args, Numbered):
        return args
    return Numbered(args.args, args.first, args.first + jnp.asarray(steps, jnp.int32))
