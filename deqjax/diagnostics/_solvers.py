"""Solvers compared on the user's own map."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._checks import check_count
from .._fixed_point import fixed_point
from ..solvers import Anderson, Broyden, NewtonKrylov, Picard
from ._report import AbstractReport, Table, bars, octets, seconds
from ._state import canonical_state
from ._timing import measure, named


class SolverReport(AbstractReport):
    """Solvers side by side, as measured by `solver_report`.

    Attributes:
        names: of the solvers; the entries of all arrays are in this order.
        num_steps: of the solve.
        num_evals: evaluations of fn; NaN for solvers that do not count them.
        residual: the largest ‖f(z) − z‖₂ of the batch.
        relative_residual: the largest ‖f(z) − z‖₂ / ‖f(z)‖₂.
        converged: the part of the problems that have converged, 0 to 1.
        seconds: of one solve, the median.
        compile_seconds: to trace and compile.
        memory: bytes of temporary memory by the compiler's account, NaN where it gives
            none.
    """

    names: tuple[str, ...] = eqx.field(static=True)
    num_steps: Float[Array, " solvers"]
    num_evals: Float[Array, " solvers"]
    residual: Float[Array, " solvers"]
    relative_residual: Float[Array, " solvers"]
    converged: Float[Array, " solvers"]
    seconds: Float[Array, " solvers"]
    compile_seconds: Float[Array, " solvers"]
    memory: Float[Array, " solvers"]

    def table(self) -> Table:
        rows = []
        for i, name in enumerate(self.names):
            evals = float(self.num_evals[i])
            rows.append(
                [
                    name,
                    int(self.num_steps[i]),
                    None if np.isnan(evals) else int(evals),
                    self.residual[i],
                    self.relative_residual[i],
                    f"{100 * float(self.converged[i]):.3g} %",
                    seconds(self.seconds[i]),
                    seconds(self.compile_seconds[i]),
                    octets(self.memory[i]),
                ]
            )
        head = ["solver", "steps", "evaluations", "residual", "relative"]
        head += ["converged", "time", "compile time", "memory"]
        return Table("Solvers", head, rows)

    def plot(self, ax: Any = None) -> Any:
        """The time of one solve; solvers that did not converge are marked.

        Args:
            ax: matplotlib axes; by default those of a new figure.
        """
        names = [
            name if float(part) == 1 else f"{name}\n(not converged)"
            for name, part in zip(self.names, self.converged, strict=True)
        ]
        return bars(ax, names, 1e3 * np.asarray(self.seconds), "time of a solve [ms]")


def solver_report(
    fn: Callable[[Any, Any], Any],
    z0: PyTree,
    args: PyTree = None,
    *,
    solvers: Mapping[str, Any] | Sequence[Any] | None = None,
    max_steps: int = 64,
    repeats: int = 5,
    batch_ndim: int = 0,
) -> SolverReport:
    """Solve one problem by several solvers, and measure steps, residuals and time.

    Every solver gets the same start and `max_steps`. Each is compiled into a program of
    its own, run once to warm up, then `repeats` times.

    **Cost:** per solver one compilation and 1 + `repeats` solves.

    Args:
        fn: `fn(z, args) -> z`.
        z0: the start: a pytree of real arrays.
        args: passed to fn.
        solvers: a dictionary from names to what `deqjax.fixed_point` takes as `solver`,
            or a sequence of those. Default: Picard, Anderson, Broyden and NewtonKrylov
            with their own tolerances.
        max_steps: most steps of every solver.
        repeats: timed runs, of which the median is reported.
        batch_ndim: of the default solvers; solvers that are given have their own.

    Returns:
        A `SolverReport`.

    Raises:
        ValueError, TypeError: if an argument is not valid or an array is being traced.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> f = lambda z, a: jnp.tanh(0.9 * z + a)
        >>> report = deqjax.diagnostics.solver_report(
        ...     f, jnp.zeros(3), jnp.ones(3),
        ...     solvers={"plain": deqjax.Picard(), "fast": deqjax.Anderson()})
        >>> report.names, report.converged.tolist()
        (('plain', 'fast'), [1.0, 1.0])
    """
    check_count("max_steps", max_steps, 1)
    check_count("repeats", repeats, 1)
    z0 = canonical_state(fn, z0, args, batch_ndim, "z0")

    def defaults() -> dict[str, Any]:
        kinds = (Picard, Anderson, Broyden, NewtonKrylov)
        return {k.__name__: k(batch_ndim=batch_ndim) for k in kinds}

    chosen = named("solvers", solvers, defaults)
    arrays, static = eqx.partition((fn, args), eqx.is_array)
    rows = []
    for solver in chosen.values():

        def solve(z0: PyTree, arrays: PyTree, solver: Any = solver) -> Any:
            fn, args = eqx.combine(arrays, static)
            sol = fixed_point(fn, z0, args, solver=solver, max_steps=max_steps)
            kept = ("num_steps", "num_evals", "residual", "relative_residual")
            stats = {k: sol.stats[k] for k in (*kept, "converged") if k in sol.stats}
            return sol.value, stats

        (_, stats), cost = measure(solve, z0, arrays, repeats=repeats)
        worst = lambda k, stats=stats: np.max(np.asarray(stats[k], np.float64))
        rows.append(
            [
                worst("num_steps"),
                worst("num_evals") if "num_evals" in stats else np.nan,
                worst("residual"),
                worst("relative_residual"),
                np.mean(np.asarray(stats["converged"], np.float64)),
                cost.seconds,
                cost.compile_seconds,
                cost.memory,
            ]
        )
    columns = [jnp.asarray(c, jnp.float32) for c in np.array(rows).T]
    return SolverReport(tuple(chosen), *columns)
