"""Intermediate iterates in the loss."""

import functools as ft
import itertools
import operator as op
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jax import lax
from jaxtyping import Array, Float, PyTree

from .. import _tree
from .._checks import check_count
from .._fixed_point import fixed_point
from ..adjoints import JFBAdjoint, ReversibleAdjoint, UnrolledAdjoint
from ..solvers import Anderson, Reversible
from ..solvers._base import AbstractSolver


def correction_points(
    fn: Callable[[Any, Any], Any],
    z0: PyTree,
    args: PyTree = None,
    *,
    at: Sequence[int],
    solver: Any = None,
    adjoint: optx.AbstractAdjoint | None = None,
    max_steps: int = 64,
    options: dict[str, Any] | None = None,
) -> tuple[tuple[PyTree, ...], optx.Solution]:
    r"""Iterates on the way to a fixed point, to be given losses of their own.

    Point k is what the solve without a test gives after k steps, z_k: the iterate of
    `deqjax.Picard` and `deqjax.Reversible`, the best one evaluated of other solvers.
    The solution is that of `deqjax.fixed_point`. (A solver of optimistix stops at its
    own test.)

    **Gradients.** Under `deqjax.ReversibleAdjoint` and `deqjax.UnrolledAdjoint` they
    are exact, for the points and for the solution: those of the steps taken. Under any
    other adjoint, which knows a gradient at an equilibrium alone, the solution has the
    adjoint's own gradient, and a point that of one evaluation of f at it, as
    `deqjax.JFBAdjoint` gives it:

    $$ \bar\theta \mathrel{+}= (\partial_\theta f(z_k, \theta))^\top\, \bar z_k $$

    **Cost:** with `deqjax.Picard`, and with a `deqjax.Reversible` without a test, that
    of the solve, which does not end before the last point: each part goes on where the
    one before has ended. With a test, `deqjax.Reversible` takes as many steps as the
    last point more, since its answer is the best of all iterates. Any other solver
    starts anew for every point, since its history of iterates cannot be differentiated:
    Σ k steps more. **Memory:** one copy of the states per point, beside that of the
    adjoint. Equally spaced points are one loop in the program.

    Args:
        fn: see `deqjax.fixed_point`, and so for the others.
        z0: see there.
        args: see there.
        at: numbers of steps from the start, growing, below `max_steps`.
        solver: see there.
        adjoint: see there.
        max_steps: steps of the whole chain, at most.
        options: see there; without `step_budget` and `record`.

    Returns:
        The points, and the solution.

    Raises:
        ValueError: if `at` is not valid, or an option is that of a single solve.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> points, sol = deqjax.regularise.correction_points(
        ...     lambda z, a: 0.5 * z + a, jnp.zeros(()), 1.0, at=(1, 2), max_steps=4,
        ...     solver=deqjax.Picard(None, None), adjoint=deqjax.UnrolledAdjoint())
        >>> [float(z) for z in (*points, sol.value)]
        [1.0, 1.5, 1.875]

    References:
        S. Bai, Z. Geng, Y. Savani, J. Z. Kolter (2022), Deep equilibrium optical flow
        estimation, doi:10.48550/arXiv.2204.08442.
    """
    check_count("max_steps", max_steps, 1)
    marks = [0, *at, max_steps]
    for mark in at:
        check_count("at", mark, 1)
    if any(a >= b for a, b in itertools.pairwise(marks)):
        raise ValueError(
            f"`at` must grow and stay below `max_steps` = {max_steps}; got {tuple(at)}."
        )
    single = {"step_budget", "record"} & set({} if options is None else options)
    if single:
        raise ValueError(
            f"`options` {sorted(single)} are those of a single solve; with correction "
            "points there are several. Leave them out."
        )
    exact = isinstance(adjoint, ReversibleAdjoint | UnrolledAdjoint) or (
        adjoint is None and isinstance(solver, Reversible)
    )
    solver = Anderson() if solver is None else solver
    untested, of_points = _untested(solver), adjoint if exact else JFBAdjoint()
    pairs = isinstance(solver, Reversible)
    chained = getattr(solver, "plain", False)

    def solve(start: tuple, steps: int, solver: Any, adjoint: Any) -> optx.Solution:
        z, companion = start
        resumed = {} if companion is None else {"companion": companion}
        given = {**({} if options is None else options), **resumed} or None
        return fixed_point(
            fn, z, args, solver=solver, adjoint=adjoint, max_steps=steps, options=given
        )

    def part(start: tuple, steps: int) -> tuple[tuple, PyTree]:
        sol = solve(start, steps, untested, of_points)
        end = sol.value, sol.state.companion if pairs else None
        return end if exact else lax.stop_gradient(end), sol.value

    start = z0, ((options or {}).get("companion", z0) if pairs else None)
    if not chained:
        points = [part(start, mark)[1] for mark in at]
        return tuple(points), solve(start, max_steps, solver, adjoint)
    end, points = start, []
    for steps, equal in itertools.groupby(np.diff(marks[:-1]).tolist()):
        count = len(list(equal))
        body = ft.partial(lambda steps, end, _: part(end, steps), steps)
        end, found = lax.scan(body, end, length=count)
        points += [jtu.tree_map(op.itemgetter(i), found) for i in range(count)]
    if pairs and not solver.static:
        # Its answer is the best of all iterates.
        return tuple(points), solve(start, max_steps, solver, adjoint)
    done = marks[-2]
    solver = eqx.tree_at(lambda s: s.min_steps, solver, max(solver.min_steps - done, 0))
    sol = solve(end, max_steps - done, solver, adjoint)
    stats = dict(sol.stats)
    evals = {"num_evals": solver.evals_per_step * done}
    for name, before in {"num_steps": done, "max_steps": done, **evals}.items():
        stats[name] = stats[name] + before
    return tuple(points), eqx.tree_at(lambda s: s.stats, sol, stats)


def _untested(solver: Any) -> Any:
    """The solver with a loop of static length, where it is one of deqjax."""
    return solver.without_test() if isinstance(solver, AbstractSolver) else solver


def fixed_point_correction(
    losses: Sequence[Float[Array, "..."]], gamma: float | int = 0.8
) -> Float[Array, "..."]:
    r"""The losses of successive iterates, the later the heavier.

    $$ \sum_{k=0}^{n-1} \gamma^{\,n-k-1} L_k $$

    Args:
        losses: L_0, …, L_{n−1}, the last one that of the solution.
        gamma: 0 ≤ γ ≤ 1.

    Returns:
        The sum.

    Raises:
        ValueError: if there is no loss, or γ is out of range.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> losses = [jnp.array(4.0), jnp.array(2.0), jnp.array(1.0)]
        >>> float(deqjax.regularise.fixed_point_correction(losses, 0.5))
        3.0

    References:
        S. Bai, Z. Geng, Y. Savani, J. Z. Kolter (2022), Deep equilibrium optical flow
        estimation, doi:10.48550/arXiv.2204.08442.
    """
    if not losses:
        raise ValueError("`losses` must hold at least one; got none.")
    if isinstance(gamma, bool) or not 0 <= gamma <= 1:
        raise ValueError(f"`gamma` must satisfy 0 ≤ gamma ≤ 1; got {gamma!r}.")
    *earlier, total = losses
    for k, loss in enumerate(reversed(earlier)):
        total = total + gamma ** (k + 1) * loss
    return total


def start_penalty(
    z0: PyTree, value: PyTree, *, batch_ndim: int = 0
) -> Float[Array, "*batch"]:
    r"""The mean squared distance of a learned start from the equilibrium, z* stopped.

    $$ \frac1d \lVert z_0 - \mathrm{stop}(z^*) \rVert^2 $$

    Implicit adjoints give a start no gradient, as the equilibrium does not depend on
    it; with this in the loss it is trained all the same.

    Args:
        z0: the start.
        value: the equilibrium.
        batch_ndim: leading axes that index problems.

    Returns:
        The penalty of each problem.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> z0, z = jnp.zeros((2, 4)), jnp.array([[1.0] * 4, [2.0] * 4])
        >>> deqjax.regularise.start_penalty(z0, z, batch_ndim=1).tolist()
        [1.0, 4.0]

    References:
        A. Pal, A. Edelman, C. Rackauckas (2022), Continuous deep equilibrium models,
        doi:10.48550/arXiv.2201.12240.
    """
    gap = _tree.subtract(z0, lax.stop_gradient(value))
    return _tree.dot(gap, gap, batch_ndim) / _tree.size(gap, batch_ndim)
