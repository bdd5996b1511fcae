"""Gradients through the iterates themselves."""

import equinox as eqx

from .._checks import check_count, whole
from .._problem import Problem, Solved
from ..solvers._drive import drive
from ._base import AbstractAdjoint
from ._cotangents import constant
from ._detach import detach
from ._stats import BackwardStats, check_probe
from ._truncated import reported, truncated


class UnrolledAdjoint(AbstractAdjoint):
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

    def solve(self, problem: Problem) -> Solved:
        if self.last is not None:
            _check_alone(problem)
            return detach(truncated(problem, self.last, self.checkpoints, self.probe))
        solved = drive(problem, kind="checkpointed", checkpoints=self.checkpoints)
        if self.probe is not None:
            entries = {
                "num_products": solved.num_steps,
                "forward_residual": solved.stats.get("residual"),
            }
            found = solved.value, solved.aux, solved.companion
            found, fixed = eqx.partition(found, eqx.is_inexact_array)
            out = reported((found, self.probe), constant(entries))
            value, aux, companion = eqx.combine(out, fixed)
            solved = solved._replace(value=value, aux=aux, companion=companion)
        return detach(solved, exact=True)


def _check_alone(problem: Problem) -> None:
    batch_ndim, static = problem.batch_ndim, getattr(problem.solver, "static", False)
    limited = getattr(problem.options.get("step_budget"), "ndim", 0) > 0
    if limited or (batch_ndim > 0 and not static):
        raise ValueError(
            "`last` cuts off the gradient at a step that is the same for all problems, "
            f"but with `batch_ndim={batch_ndim}` a tested solve ends at another "
            "step for each. Use `jax.vmap` over a solver with `batch_ndim=0`, a solve "
            "of static length (`rtol=None, atol=None`), or "
            "`PhantomAdjoint(num_steps, beta=1.0)`."
        )
