"""What all deqjax solvers share: the stopping rule and the record of a solve."""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, Generic

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from .. import _tree
from .._checks import check_beta as check_beta, check_count as check_count
from .._types import Aux, Counts, Flags, Options, Reals, State, Tolerance, Y

# The relative tolerance of solvers that are given none, by the dtype of the state. In
# half precision it is a few units in the last place: rounding keeps the residual from
# falling much further. The absolute tolerance is a hundredth of it.
_DEFAULT_RTOL = {"float64": 1e-8, "float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}


class Progress(eqx.Module):
    """The best evaluated iterate of each problem, and how its solve stands.

    What is a number per problem is kept in two arrays, so that bringing it up to date
    takes two small kernels, and not one for each number.

    Attributes:
        value: the best iterate seen (smallest residual), or the converged one.
        aux: what the map returned beside its value there.
        sizes: `residual`, `norm` and `last_residual`.
        counts: `num_steps`, `best_step`, and 0 or 1 for `converged` and `failed`.
    """

    value: PyTree
    aux: PyTree
    sizes: Float[Array, "*batch 3"]
    counts: Int[Array, "*batch 4"]

    @staticmethod
    def start(value: PyTree, z: PyTree, aux_struct: PyTree, batch_ndim: int):
        """The record before the first evaluation; `z` gives batch and dtype."""
        shape = _tree.batch_shape(z, batch_ndim)
        if batch_ndim > 0 and _tree.batch_shape(aux_struct, batch_ndim) not in (
            (),
            shape,
        ):
            raise ValueError(
                f"With `batch_ndim={batch_ndim}` every leaf of `aux` needs the leading "
                f"axes {shape} of the iterate, since the best iterates of different "
                "problems belong to different evaluations."
            )
        # Made from the norm of z, not from its shape: on a mesh with explicit axes
        # this gives the record the sharding of the batch.
        zero = jnp.zeros_like(_tree.norm(z, batch_ndim))
        nan, count = jnp.full_like(zero, jnp.nan), zero.astype(jnp.int32)
        aux = _tree.zeros_like(aux_struct)
        sizes, counts = jnp.stack([nan] * 3, -1), jnp.stack([count] * 4, -1)
        return Progress(value, aux, sizes, counts)

    @property
    def residual(self) -> Reals:
        """‖f(value) − value‖₂."""
        return self.sizes[..., 0]

    @property
    def norm(self) -> Reals:
        """‖f(value)‖₂."""
        return self.sizes[..., 1]

    @property
    def last_residual(self) -> Reals:
        """The residual of the iterate evaluated last."""
        return self.sizes[..., 2]

    @property
    def num_steps(self) -> Counts:
        """Steps taken while the problem was active."""
        return self.counts[..., 0]

    @property
    def best_step(self) -> Counts:
        """Steps that lead from the start to `value`."""
        return self.counts[..., 1]

    @property
    def converged(self) -> Flags:
        """The stopping rule holds at `value`."""
        return self.counts[..., 2] > 0

    @property
    def failed(self) -> Flags:
        """The iteration met a residual that is not finite and cannot go on."""
        return self.counts[..., 3] > 0

    def active(self, options: Options) -> Flags:
        """Which problems may take another step."""
        active = ~(self.converged | self.failed)
        if "step_budget" in options:
            active = active & (self.num_steps < options["step_budget"])
        return active


def within_budget(steps: Int[Array, "..."], options: Options) -> Flags | None:
    """Which problems of a static solve take another step; None: all, or none.

    A single budget is the length of the loop.
    """
    budget = options.get("step_budget")
    return None if budget is None or budget.ndim == 0 else steps < budget


class Measured(eqx.Module):
    """What a map may return as its `aux`: the norms to be tested in place of its own.

    For maps that are iterated for the sake of another equation.

    Attributes:
        residual: in place of ‖f(z) − z‖.
        norm: in place of ‖f(z)‖.
    """

    residual: Reals
    norm: Reals


class AbstractSolver(
    optx.AbstractFixedPointSolver[Y, Aux, State], Generic[Y, Aux, State]
):
    """A fixed-point solver with the stopping rule and the statistics of deqjax.

    The one stopping rule, per problem and in the 2-norm:

        ‖f(z) − z‖ ≤ atol + rtol ‖f(z)‖

    A tolerance "auto" is that of the coarsest dtype in the state. With
    `rtol=None, atol=None` nothing is tested, and exactly `max_steps` steps are taken in
    a loop of static length.
    """

    # optimistix has floats alone; None is for a solve without a test.
    rtol: eqx.AbstractVar[Tolerance]  # pyright: ignore[reportIncompatibleVariableOverride]
    atol: eqx.AbstractVar[Tolerance]  # pyright: ignore[reportIncompatibleVariableOverride]
    min_steps: eqx.AbstractVar[int]
    batch_ndim: eqx.AbstractVar[int]

    # Of the stopping rule; optimistix asks every solver for it.
    norm: ClassVar[Callable[[PyTree], Array]] = staticmethod(optx.two_norm)

    known_options: ClassVar[frozenset[str]] = frozenset({"step_budget", "record"})

    def __check_init__(self):
        for name, tol in (("rtol", self.rtol), ("atol", self.atol)):
            if tol is None or isinstance(tol, Array) or tol == "auto":
                continue
            if isinstance(tol, bool) or not (
                isinstance(tol, int | float) and math.isfinite(tol) and tol >= 0
            ):
                raise ValueError(
                    f'`{name}` must be a non-negative number, "auto" for that of the '
                    f"dtype, or None for a solve without a test; got {tol!r}."
                )
        if (self.rtol is None) != (self.atol is None):
            raise ValueError(
                f"`rtol` and `atol` must both be tolerances, or both None for a loop "
                f"of static length; got rtol={self.rtol!r}, atol={self.atol!r}."
            )
        check_count("batch_ndim", self.batch_ndim, 0)
        check_count("min_steps", self.min_steps, 0)

    @property
    def static(self) -> bool:
        """Whether the solve tests nothing and takes exactly `max_steps` steps."""
        return self.rtol is None

    def tolerances(self, z: PyTree) -> tuple[float | Array, float | Array] | None:
        """`rtol` and `atol` for the state z, of which the dtypes count; None: no test.

        The coarsest dtype decides: the norms are those of the whole state.
        """
        if self.rtol is None or self.atol is None:
            return None
        dtypes = [leaf.dtype for leaf in jtu.tree_leaves(z)]
        coarsest = max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps))
        known = _DEFAULT_RTOL.get(coarsest.name, 4 * float(jnp.finfo(coarsest).eps))
        rtol = known if isinstance(self.rtol, str) else self.rtol
        return rtol, known / 100 if isinstance(self.atol, str) else self.atol

    def passes(self, residual: Reals, norm: Reals, z: PyTree) -> Flags:
        """The stopping rule; false where a norm is not finite (∞ ≤ ∞ is true).

        z is the state, for tolerances that its dtype decides.

        Squares of numbers around 1e-19 in float32 are lost, and a residual of 0 may be
        one of that size. So a tolerance below what norms resolve is never met.
        """
        tolerances = self.tolerances(z)
        if tolerances is None:
            return jnp.zeros_like(norm, dtype=bool)
        rtol, atol = tolerances
        tol = atol + rtol * norm
        resolved = 2.0**10 * math.sqrt(float(jnp.finfo(norm.dtype).tiny))
        return (jnp.maximum(residual, resolved) <= tol) & jnp.isfinite(norm)

    def observe(
        self,
        progress: Progress,
        active: Flags,
        value: PyTree,
        z: PyTree,
        f: PyTree,
        aux: PyTree,
        *,
        recovers: bool | Flags = False,
    ) -> Progress:
        """Enter an evaluation f = fn(z) of the active problems into the record.

        `value` is what to keep should z be the best iterate. The record carries no
        derivative: norms have none at 0.
        """
        f, z = lax.stop_gradient((f, z))
        if isinstance(aux, Measured):
            residual, norm = lax.stop_gradient((aux.residual, aux.norm))
        else:
            residual = _tree.norm(_tree.subtract(f, z), self.batch_ndim)
            norm = _tree.norm(f, self.batch_ndim)
        finite = jnp.isfinite(residual) & jnp.isfinite(norm)
        first = progress.num_steps == 0
        enough = progress.num_steps >= self.min_steps
        converged = self.passes(residual, norm, z) & enough
        improved = first | (finite & ~(progress.residual <= residual)) | converged
        take = active & improved
        failed = active & ~finite & ~jnp.asarray(recovers)
        old = progress
        sizes = jnp.stack(
            [
                jnp.where(take, residual, old.residual),
                jnp.where(take, norm, old.norm),
                jnp.where(active, residual, old.last_residual),
            ],
            -1,
        )
        counts = jnp.stack(
            [
                old.num_steps + active.astype(jnp.int32),
                jnp.where(take, old.num_steps, old.best_step),
                (old.converged | (active & converged)).astype(jnp.int32),
                (old.failed | failed).astype(jnp.int32),
            ],
            -1,
        )
        value = _tree.where(take, value, old.value)
        return Progress(value, _tree.where(take, aux, old.aux), sizes, counts)

    def verdict(self, progress: Progress) -> tuple[Array, optx.RESULTS]:
        """Whether all problems are done, and with what result."""
        done = jnp.all(progress.converged | progress.failed)
        result = optx.RESULTS.where(
            done & jnp.any(progress.failed),
            optx.RESULTS.nonfinite,
            optx.RESULTS.successful,
        )
        return done, result

    def outcome(self, y: Y, state: State) -> optx.RESULTS:
        """The result of a static solve: successful if it stayed finite."""
        finite = _tree.all_finite(lax.stop_gradient(y))
        return optx.RESULTS.where(
            finite, optx.RESULTS.successful, optx.RESULTS.nonfinite
        )

    @property
    def returns_best(self) -> bool:
        """Whether the answer is the best iterate evaluated, and not the last one."""
        return not self.static

    def steps_to_answer(self, state: State) -> Counts:
        """The steps that lead from the start to the answer, per problem."""
        keeps: Any = state  # its `Progress`
        return (
            keeps.progress.best_step if self.returns_best else self.steps_taken(state)
        )

    @abc.abstractmethod
    def last_residual(self, y: Y, state: State) -> Reals:
        """The residual of the iterate evaluated last, to be recorded."""

    @abc.abstractmethod
    def steps_taken(self, state: State) -> Counts:
        """The steps that each problem has taken."""


def statistics(
    residual: Reals,
    norm: Reals,
    converged: Flags,
    num_steps: Counts | None,
    num_evals: Array | None,
) -> dict[str, Any]:
    """The statistics of a solve; see `deqjax.fixed_point`."""
    tiny = jnp.finfo(norm.dtype).tiny
    return {
        "num_steps": num_steps,
        "num_evals": num_evals,
        "residual": residual,
        "relative_residual": residual / jnp.maximum(norm, tiny),
        "converged": converged,
    }
