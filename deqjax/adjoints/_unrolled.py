"""Gradients through the iterates themselves."""

from collections.abc import Callable

import equinox as eqx
import optimistix as optx
from jaxtyping import PyTree

from ..solvers._base import check_count
from ._loop import SolverLoop, as_inputs, detach, solve


class UnrolledAdjoint(optx.AbstractAdjoint):
    r"""The exact gradient of the steps taken, by backpropagation through them.

    Differentiates z_N as the function of θ and z₀ that the solver computes, converged
    or not.

    **Cost:** one evaluation with pull-back per step, and the recomputation that the
    checkpoints ask for (O(N log N) in all with the default). **Memory:** `checkpoints`
    states of the solver and one step's activations; static loops of up to 8 steps are
    unrolled and keep every step's activations unless `checkpoints` is given.

    Reverse mode only; long loops cannot be differentiated twice or in forward mode.
    Use `ImplicitAdjoint` for those.

    Args:
        checkpoints: number of states to keep; None: from `max_steps`.

    Raises:
        ValueError: if `checkpoints` is not a positive integer.

    Example:
        >>> import deqjax, jax, jax.numpy as jnp
        >>> f = lambda z, a: 0.5 * z + a
        >>> solver = deqjax.Picard(rtol=None, atol=None)
        >>> solve = lambda a: deqjax.fixed_point(f, jnp.zeros(()), a, solver=solver,
        ...     adjoint=deqjax.UnrolledAdjoint(), max_steps=3).value
        >>> float(jax.grad(solve)(3.0))  # 1 + 1/2 + 1/4
        1.75

    References:
        Q. Wang, P. Moin, G. Iaccarino (2009), Minimal repetition dynamic checkpointing
        algorithm for unsteady adjoint calculation, doi:10.1137/080727890.
    """

    checkpoints: int | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        if self.checkpoints is not None:
            check_count("checkpoints", self.checkpoints, 1)

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree,
        tags: frozenset[object],
    ) -> PyTree:
        named = as_inputs(inputs)
        loop = SolverLoop(named, "checkpointed", self.checkpoints)
        value, extras = solve(primal_fn, named, loop)
        return value, tuple(detach(extras))
