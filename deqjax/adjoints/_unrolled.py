"""Gradients through the iterates themselves."""

from collections.abc import Callable

import equinox as eqx
import optimistix as optx
from jaxtyping import PyTree

from .._checks import check_count, whole
from .._upstream import Inputs
from ..solvers._base import AbstractSolver
from ._cotangents import constant
from ._detach import detach
from ._loop import SolverLoop, as_inputs, companion, solve
from ._stats import BackwardStats, check_probe
from ._truncated import reported, truncated


class UnrolledAdjoint(optx.AbstractAdjoint):
    r"""The exact gradient of the steps taken, by backpropagation; biased if truncated.

    Differentiates z_N as the function of θ and z₀ that the solver computes.

    With `last=k`, only the last k of the steps that led to the answer are
    differentiated, and where they begin is taken as a constant (truncated
    backpropagation). This is biased, unless there were no more than k steps: at a fixed
    point of Picard iteration the gradient is that of `NeumannAdjoint` with k terms. In
    a tested solve every lane of a `jax.vmap` has its own last k steps.

    **Cost:** one evaluation with pull-back per step, and the recomputation that the
    checkpoints ask for (O(N log N) in all with the default). With `last=k`: N − k
    evaluations to come to those steps again, and k evaluations with pull-back (one more
    in a tested solve, of the evaluation that tested the answer and made `aux`).
    **Memory:** `checkpoints` states of the solver and one step's activations; static
    loops of up to 8 steps (`last`: of which up to 8 are differentiated) are unrolled
    and keep every step's activations unless `checkpoints` is given.

    Reverse mode only; long loops cannot be differentiated twice or in forward mode.
    Use `ImplicitAdjoint` for those.

    **Not converged:** the gradient is exact for the steps taken all the same (of the
    truncated sum as for the whole). Where an iterate is not finite, neither is it.

    Args:
        checkpoints: number of states to keep; None: from the number of steps.
        last: how many steps to differentiate; None: all.
        probe: a `BackwardStats` whose gradient is the record of the backward pass:
            `num_products` is the number of steps pulled back, `forward_residual` the
            residual that the solver reports.

    Raises:
        ValueError, TypeError: if an argument is not valid; with `last`, if the solver
            tests problems of a batch (`batch_ndim`), which end at different steps.

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

    checkpoints: int | None = eqx.field(default=None, static=True, converter=whole)
    last: int | None = eqx.field(
        default=None, kw_only=True, static=True, converter=whole
    )
    probe: BackwardStats | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        if self.checkpoints is not None:
            check_count("checkpoints", self.checkpoints, 1)
        if self.last is not None:
            check_count("last", self.last, 1)
        check_probe(self.probe)

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree,
        tags: frozenset[object],
    ) -> PyTree:
        named = as_inputs(inputs)
        if self.last is not None:
            _check_alone(named)
            value, extras = truncated(
                primal_fn, named, self.last, self.checkpoints, self.probe
            )
            return value, tuple(detach(value, extras))
        loop = SolverLoop(named, "checkpointed", self.checkpoints)
        value, extras = solve(primal_fn, named, loop)
        if self.probe is not None:
            entries = {
                "num_products": extras.num_steps,
                "forward_residual": extras.stats.get("residual"),
            }
            (value, aux), fixed = eqx.partition(
                (value, extras.aux), eqx.is_inexact_array
            )
            out = reported(((value, aux), self.probe), constant(entries))
            value, aux = eqx.combine(out, fixed)
            extras = extras._replace(aux=aux)
        return value, tuple(detach(value, extras, exact=companion(extras)))


def _check_alone(inputs: Inputs) -> None:
    solver = inputs.solver
    tested = isinstance(solver, AbstractSolver) and not solver.static
    limited = getattr(inputs.options.get("step_budget"), "ndim", 0) > 0
    if limited or (tested and solver.batch_ndim > 0):
        raise ValueError(
            "`last` cuts off the gradient at a step that is the same for all problems, "
            f"but with `batch_ndim={solver.batch_ndim}` a tested solve ends at another "
            "step for each. Use `jax.vmap` over a solver with `batch_ndim=0`, a solve "
            "of static length (`rtol=None, atol=None`), or "
            "`PhantomAdjoint(num_steps, beta=1.0)`."
        )
