"""What more steps of an iteration do to its answer."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .. import _tree
from .._checks import check_count
from ..solvers import Picard, Reversible
from ._orbits import Orbits, follow
from ._report import AbstractReport, Table, axes, problem_names
from ._state import batch_of, canonical_state

# Where an answer differs by less from its start, it says little about its input.
_HARDLY_MOVED = 0.01


class DepthReport(AbstractReport):
    """An iteration by its number of steps; see `depth_report`.

    Attributes:
        depths: numbers of steps, 0 being the start.
        residual: ‖f(z_k) − z_k‖₂ / ‖f(z_k)‖₂ at every depth.
        score: what `read_out` makes of z_k; NaN without one.
        verdict: index into `DepthReport.kinds` of how the iteration ends.
        period: steps of a cycle; 0 where there is none.
        moved: ‖z_N − z₀‖₂ over the larger of ‖z_N‖₂ and ‖z₀‖₂.
        start_residual: the last residual from every start, the given one first.
        start_score: the last score from every start.
        start_distance: ‖z_N from that start − z_N‖₂ / ‖z_N‖₂.
        tolerance: the relative residual, and distance, that counts as none.
    """

    depths: Int[Array, " depths"]
    residual: Float[Array, "depths *batch"]
    score: Float[Array, "depths *batch"]
    verdict: Int[Array, "*batch"]
    period: Int[Array, "*batch"]
    moved: Float[Array, "*batch"]
    start_residual: Float[Array, "starts *batch"]
    start_score: Float[Array, "starts *batch"]
    start_distance: Float[Array, "starts *batch"]
    tolerance: Float[Array, ""]

    kinds: ClassVar[tuple[str, ...]] = ("settles", "cycles", "drifts", "diverges")

    @property
    def verdicts(self) -> list[str]:
        """One sentence per problem of the batch."""
        kinds, periods = (np.ravel(x).tolist() for x in (self.verdict, self.period))
        return [_sentence(k, p) for k, p in zip(kinds, periods, strict=True)]

    @property
    def path_independent(self) -> Bool[Array, "*batch"]:
        """Whether all starts end in one state, up to the tolerance."""
        return jnp.all(self.start_distance <= self.tolerance, axis=0)

    @property
    def best_start(self) -> Int[Array, "*batch"]:
        """The start whose last residual is the smallest, 0 being the given one."""
        return jnp.argmin(
            jnp.where(jnp.isnan(self.start_residual), jnp.inf, self.start_residual),
            axis=0,
        )

    @property
    def best_score(self) -> Float[Array, "*batch"]:
        """The last score from the best start."""
        index = self.best_start[None]
        return jnp.take_along_axis(self.start_score, index, axis=0)[0]

    @property
    def hardly_moved(self) -> Bool[Array, "*batch"]:
        """Whether z_N differs from z₀ by less than a hundredth."""
        return self.moved < _HARDLY_MOVED

    def table(self) -> Table:
        scored = bool(np.any(np.isfinite(self.score)))
        rows = []
        for i, depth in enumerate(np.asarray(self.depths).tolist()):
            residual = np.asarray(self.residual[i], np.float64)
            row = [depth, np.median(residual), np.max(residual)]
            rows.append([*row, np.mean(self.score[i])] if scored else row)
        head = ["steps", "residual, median", "largest"] + ["score, mean"] * scored
        return Table("Depth", head, rows, self._notes(scored))

    def _notes(self, scored: bool) -> list[str]:
        size = self.verdict.size
        counts = np.bincount(np.ravel(self.verdict), minlength=len(self.kinds))
        found = [f"{n} {k}" for n, k in zip(counts, self.kinds, strict=True) if n]
        notes = [f"Of {size} problems: {', '.join(found)}."]
        periods = sorted({p for p in np.ravel(self.period).tolist() if p})
        if periods:
            notes.append(f"Periods of the cycles: {', '.join(map(str, periods))}.")
        if bool(np.any(self.hardly_moved)):
            names = problem_names(self.moved.shape)
            still = np.flatnonzero(np.ravel(self.hardly_moved)).tolist()
            named = ", ".join(names[i] for i in still[:8])
            which = f" ({named}{', …' * (len(still) > 8)})" if size > 1 else ""
            notes.append(
                f"Alarm: the answers of {len(still)} problems{which} differ from their "
                f"start by less than {_HARDLY_MOVED:.0%}. Does the map see its input?"
            )
        if len(self.start_residual) > 1:
            same = int(np.sum(self.path_independent))
            others = len(self.start_residual) - 1
            notes.append(
                f"From {others} other starts: {same} of {size} problems end in the "
                f"same state (to {float(self.tolerance):.3g})."
            )
            if scored:
                notes.append(
                    f"Score of the given start: {np.mean(self.start_score[0]):.4g}; of "
                    f"the start with the smallest residual: "
                    f"{np.mean(self.best_score):.4g}."
                )
        return notes

    def plot(self, ax: Any = None) -> Any:
        """The residual against depth, and the mean score on an axis of its own.

        Args:
            ax: matplotlib axes; by default those of a new figure.
        """
        ax = axes(ax)
        rows = np.asarray(self.residual, np.float64).reshape(len(self.depths), -1)
        rows = np.where(rows > 0, rows, np.nan)
        ax.plot(self.depths, rows, color="tab:blue", alpha=0.25, lw=0.8)
        ax.plot(self.depths, np.median(rows, axis=1), color="tab:blue")
        ax.set_yscale("log")
        ax.set_xlabel("steps")
        ax.set_ylabel("relative residual", color="tab:blue")
        score = np.asarray(self.score, np.float64).reshape(len(self.depths), -1)
        if np.any(np.isfinite(score)):
            twin = ax.twinx()
            twin.plot(self.depths, np.mean(score, axis=1), color="tab:orange")
            twin.set_ylabel("mean score", color="tab:orange")
        return ax


def _sentence(kind: int, period: int) -> str:
    return (
        "settles",
        f"cycles with a period of {period} steps",
        "drifts: neither settles nor returns",
        "diverges: the states are not finite",
    )[kind]


class _Plan(NamedTuple):
    """How a solve is cut into parts."""

    solver: Any
    stops: tuple[int, ...]
    window: int
    has_step: bool
    read_out: Callable | None


def depth_report(
    fn: Callable[..., Any],
    z0: PyTree,
    args: PyTree = None,
    *,
    read_out: Callable[[Any], Any] | None = None,
    solver: Any = None,
    max_steps: int = 64,
    depths: Sequence[int] | None = None,
    num_starts: int = 0,
    start_scale: float = 1.0,
    tolerance: float = 1e-3,
    has_step: bool = False,
    key: PRNGKeyArray | None = None,
) -> DepthReport:
    r"""Residual and accuracy against depth from one solve, and where it leads.

    For models that are run deeper than they were trained. One solve of `max_steps`
    steps is stopped at `depths`; at each of them the residual and `read_out` of the
    iterate are noted. The window of the last N / 4 steps (at least 4, at most 64)
    decides the verdict:

    - **settles**: the relative residual of z_N is at most `tolerance`, or all steps in
      the second half of the window are shorter than 0.9 times the longest in the first;
    - **cycles**: an iterate comes back to where the window began: their distance falls
      below a tenth of the largest one in the window, after `period` steps;
    - **drifts**: neither; quasi-periodic and chaotic iterations are among these;
    - **diverges**: an iterate is not finite.

    A model is **path-independent** for a problem if other starts, drawn from a normal
    distribution around z₀, lead to the same state. Where they do not, the start whose
    residual ends up smallest is often the one with the right answer.

    **Cost:** (1 + `num_starts`) solves and, at each depth, one evaluation more.
    **Memory:** one solve's, whatever the depth.

    Args:
        fn: `fn(z, args) -> z`; with `has_step`, `fn(z, args, step) -> z`.
        z0: the start: a pytree of real arrays.
        args: passed to fn.
        read_out: `read_out(z)`: a number per problem, of the shape of the batch; 1.0
            where the answer is right, say. None: no scores.
        solver: `deqjax.Picard` or `deqjax.Reversible`, as the model is solved with; its
            `batch_ndim` says which axes index problems, its tolerances are not used.
            Default: `deqjax.Picard()`.
        max_steps: N, the largest depth.
        depths: increasing numbers of steps up to `max_steps` at which to look. Default:
            0, 1, 2, 4, … and `max_steps`.
        num_starts: how many other starts to try.
        start_scale: standard deviation of the other starts around z₀.
        tolerance: the relative residual of an answer that has settled, and the relative
            distance within which two answers are the same.
        has_step: see `deqjax.fixed_point`.
        key: decides the other starts. Default: `jax.random.key(0)`.

    Returns:
        A `DepthReport`.

    Raises:
        ValueError, TypeError: if an argument is not valid, or an array is being traced.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> turn = lambda z, a: jnp.stack([-z[1], z[0]])
        >>> report = deqjax.diagnostics.depth_report(turn, jnp.array([1.0, 0.0]))
        >>> report.verdicts
        ['cycles with a period of 4 steps']

    References:
        C. Anil, A. Pokle, K. Liang, J. Treutlein, Y. Wu, S. Bai, J. Z. Kolter,
        R. Grosse (2022), Path independent equilibrium models can better exploit
        test-time computation, doi:10.48550/arXiv.2211.09961.
    """
    solver = _untested(Picard() if solver is None else solver)
    max_steps = check_count("max_steps", max_steps, 4)
    num_starts = check_count("num_starts", num_starts, 0)
    for name, value in (("tolerance", tolerance), ("start_scale", start_scale)):
        if isinstance(value, bool) or not (
            isinstance(value, int | float) and value > 0 and math.isfinite(value)
        ):
            raise ValueError(f"`{name}` must be a positive number; got {value!r}.")
    stops = _stops(depths, max_steps)
    one = (lambda z, args: fn(z, args, jnp.array(0, jnp.int32))) if has_step else fn
    k = solver.batch_ndim
    z0 = canonical_state(one if callable(fn) else fn, z0, args, k, "z0")
    batch = batch_of(z0, k)
    if read_out is not None:
        shape = jax.eval_shape(read_out, z0).shape
        if shape != batch:
            raise ValueError(
                f"`read_out` must return one number per problem, of shape {batch} "
                f"(`batch_ndim` of the solver is {k}); got shape {shape}."
            )
    window = min(64, max(4, max_steps // 4))
    plan = _Plan(solver, stops, window, bool(has_step), read_out)
    keys = jr.split(jr.key(0) if key is None else key, max(num_starts, 1))
    arrays, static = eqx.partition((fn, args), eqx.is_array)
    run = eqx.filter_jit(lambda z, arrays: _run(plan, z, eqx.combine(arrays, static)))
    first = run(z0, arrays)
    moved = _relative(
        _tree.norm(_tree.subtract(first.end, z0), k),
        jnp.maximum(_tree.norm(first.end, k), _tree.norm(z0, k)),
    )
    ends = [(first.residual[-1], first.score[-1], jnp.zeros_like(moved))]
    for start_key in keys[:num_starts]:
        noise = _tree.draw(jr.normal, start_key, z0)
        start = jtu.tree_map(lambda a, n: a + start_scale * n, z0, noise)
        other = run(start, arrays)
        distance = _tree.norm(_tree.subtract(other.end, first.end), k)
        distance = _relative(distance, _tree.norm(first.end, k))
        ends.append((other.residual[-1], other.score[-1], distance))
    starts = [jnp.stack(column) for column in zip(*ends, strict=True)]
    verdict, period = _judge(first, float(tolerance))
    return DepthReport(
        depths=jnp.asarray(stops, jnp.int32),
        residual=first.residual,
        score=first.score,
        verdict=jnp.asarray(verdict, jnp.int32),
        period=jnp.asarray(period, jnp.int32),
        moved=moved,
        start_residual=starts[0],
        start_score=starts[1],
        start_distance=starts[2],
        tolerance=jnp.asarray(tolerance, first.residual.dtype),
    )


def _run(plan: _Plan, z0: PyTree, problem: tuple[Callable, PyTree]) -> Orbits:
    return follow(*plan, z0, *problem)


def _judge(orbits: Orbits, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """The verdict and the period of every problem, from the end of its orbit."""
    steps = np.asarray(orbits.step_length, np.float64)
    away = np.asarray(orbits.distance, np.float64)
    last = np.asarray(orbits.residual[-1], np.float64)
    half = len(steps) // 2
    finite = np.isfinite(last) & np.all(np.isfinite(steps), axis=0)
    with np.errstate(invalid="ignore"):
        falls = np.max(steps[half:], axis=0) < 0.9 * np.max(steps[:half], axis=0)
        settles = (last <= tolerance) | falls
        back = away <= 0.1 * np.max(away, axis=0)
    # Back at the first step means that it has hardly left.
    cycles = np.any(back[1:], axis=0) & ~back[0]
    period = np.where(cycles, np.argmax(back, axis=0) + 1, 0)
    verdict = np.where(settles, 0, np.where(cycles, 1, 2))
    verdict = np.where(finite, verdict, 3)
    return verdict, np.where(verdict == 1, period, 0)


def _relative(a: Array, b: Array) -> Array:
    """a / b; 0 where both are 0."""
    return jnp.where(a == 0, 0, a / jnp.where(b > 0, b, 1))


def _untested(solver: Any) -> Picard | Reversible:
    if not getattr(solver, "plain", False):
        raise TypeError(
            "`solver` must be a `deqjax.Picard` or a `deqjax.Reversible`, whose solves "
            f"can be stopped and resumed; got {type(solver).__name__}."
        )
    return solver.without_test()


def _stops(depths: Sequence[int] | None, max_steps: int) -> tuple[int, ...]:
    if depths is None:
        doubling = [2**i for i in range(max_steps.bit_length()) if 2**i < max_steps]
        return (0, *doubling, max_steps)
    found = tuple(check_count("depths", d, 0) for d in depths)
    grows = all(a < b for a, b in itertools.pairwise(found))
    if not found or not grows or found[-1] > max_steps:
        raise ValueError(
            "`depths` must be increasing numbers of steps up to `max_steps` = "
            f"{max_steps}; got {found}."
        )
    return found if found[-1] == max_steps else (*found, max_steps)
