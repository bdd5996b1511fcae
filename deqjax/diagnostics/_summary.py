"""A solution in words."""

from typing import Any

import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jax.core import Tracer

from ._report import show


def summary(sol: optx.Solution) -> str:
    """The statistics of a solution of `deqjax.fixed_point`, as text to be printed.

    Args:
        sol: the solution; its numbers must be known, as they are outside of `jax.jit`.

    Returns:
        A line each for the result, the problems that have converged, the residuals
        (the largest, and for a batch the median), and the evaluations and steps.
        Statistics that the solution does not have are left out.

    Raises:
        TypeError: if `sol` is no solution, or is being traced.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> f = lambda z, a: 0.5 * z + a
        >>> sol = deqjax.fixed_point(f, jnp.zeros(2), jnp.ones(2))
        >>> print(deqjax.summary(sol).splitlines()[0])
        result       successful
    """
    if not isinstance(sol, optx.Solution):
        raise TypeError(
            "`sol` must be a solution of `deqjax.fixed_point`; got "
            f"{type(sol).__name__}."
        )
    stats = {k: v for k, v in sol.stats.items() if v is not None}
    if any(isinstance(v, Tracer) for v in (*stats.values(), *jtu.tree_leaves(sol))):
        raise TypeError(
            "`sol` is being traced and has no numbers yet: return it from `jax.jit` "
            "and call `summary` outside."
        )
    lines = [("result", _result(sol.result))]
    if "converged" in stats:
        flags = np.asarray(stats["converged"])
        # A solve without a test succeeds if it stays finite.
        passed = np.asarray(sol.result == optx.RESULTS.successful)
        untested = passed.all() and not flags.any()
        lines.append(("converged", "not tested" if untested else _converged(flags)))
    for key, name in (("residual", "residual"), ("relative_residual", "relative")):
        if key in stats:
            lines.append((name, _spread(np.asarray(stats[key], np.float64))))
    for key, name in (("num_evals", "evaluations"), ("num_steps", "steps")):
        if key in stats:
            value = np.asarray(stats[key])
            text = str(int(np.max(value)))
            if value.ndim:
                text += f" (slowest problem; median {show(np.median(value))})"
            if key == "num_steps" and "max_steps" in stats:
                text += f" of at most {show(stats['max_steps'])}"
            lines.append((name, text))
    return "\n".join(f"{name:<11}  {text}" for name, text in lines)


def _result(result: Any) -> str:
    good = np.asarray(result == optx.RESULTS.successful)
    if good.ndim:
        return f"{int(good.sum())} of {good.size} successful"
    return "successful" if good else " ".join(optx.RESULTS[result].split())


def _converged(flags: np.ndarray) -> str:
    if flags.ndim == 0:
        return "yes" if flags else "no"
    text = f"{int(flags.sum())} of {flags.size} problems"
    failed = np.argwhere(~flags)
    if 0 < len(failed) <= 8:
        names = (",".join(map(str, i)) for i in failed)
        text += f" (not: {'; '.join(names)})"
    return text


def _spread(values: np.ndarray) -> str:
    if values.ndim == 0 or values.size == 0:
        return show(values) if values.size else "–"
    # A NaN is the worst of all.
    return f"{np.max(values):.4g} (largest), {np.median(values):.4g} (median)"
