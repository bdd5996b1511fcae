"""Deep equilibrium layers."""

import contextlib
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._fixed_point import fixed_point
from ..adjoints import ReversibleAdjoint
from ..regularise import correction_points
from ..solvers import Reversible
from ..solvers._optimistix import AnySolver
from ._checks import check_count
from ._stateful import refuse_stateful


class DEQ(eqx.Module):
    r"""A deep equilibrium layer: the fixed point of a cell.

    $$ z^* = \mathrm{cell}(z^*, x) $$

    Args:
        cell: `cell(z, x, *, key=None) -> z`, usually an `eqx.Module`. A layer that uses
            randomness gets one key per solve, so that the map stays the same from
            iteration to iteration (one dropout mask per solve). A cell may have
            `initial_state(x) -> z0`.
        start: `start(x, *, key=None) -> z0`, where solves start that are given no `z0`,
            a `LearnedStart` say; None: `cell.initial_state(x)` where the cell has one,
            else zeros like x.
        solver: see `deqjax.fixed_point`.
        adjoint: see `deqjax.fixed_point`.
        max_steps: see `deqjax.fixed_point`.

    Raises:
        TypeError, ValueError: if an argument is not valid; see `deqjax.fixed_point`
            for those raised at the call.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> deq = deqjax.nn.DEQ(lambda z, x, key=None: jnp.tanh(0.5 * z + x))
        >>> deq(jnp.zeros(3)).shape
        (3,)

    References:
        S. Bai, J. Z. Kolter, V. Koltun (2019), Deep equilibrium models,
        doi:10.48550/arXiv.1909.01377.
    """

    cell: Any
    start: Any = eqx.field(default=None, kw_only=True)
    solver: AnySolver | None = eqx.field(default=None, kw_only=True)
    adjoint: optx.AbstractAdjoint | None = eqx.field(default=None, kw_only=True)
    max_steps: int = eqx.field(default=64, kw_only=True, static=True)

    def __check_init__(self):
        if not callable(self.cell):
            raise TypeError(
                "`cell` must be callable as cell(z, x, *, key=None); got "
                f"{type(self.cell).__name__}."
            )
        if not (self.start is None or callable(self.start)):
            raise TypeError(
                "`start` must be callable as start(x, *, key=None), or None; got "
                f"{type(self.start).__name__}. Give a value at the call, as `z0`."
            )
        check_count("max_steps", self.max_steps, 1)
        refuse_stateful(self.cell)

    def __call__(
        self,
        x: PyTree,
        *,
        z0: PyTree = None,
        key: Array | None = None,
        max_steps: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> PyTree:
        """The fixed point for the input x.

        Args:
            x: what the cell takes beside the iterate.
            z0: the initial iterate, a warm start say; None: that of `initial_state`.
            key: passed to the cell, the same one at every iteration, and to `start`.
            max_steps: in place of the layer's own.
            options: see `deqjax.fixed_point`.
        """
        sol = self.solve(x, z0=z0, key=key, max_steps=max_steps, options=options)
        return sol.value

    def solve(
        self,
        x: PyTree,
        *,
        z0: PyTree = None,
        key: Array | None = None,
        max_steps: int | None = None,
        has_aux: bool = False,
        throw: bool = False,
        options: dict[str, Any] | None = None,
    ) -> optx.Solution:
        """As `__call__`, with all that `deqjax.fixed_point` returns.

        The `value` is NaN for problems that have no finite evaluation, those of an
        input that is not finite above all.

        Args:
            x: see `__call__`.
            z0: see there.
            key: see there.
            max_steps: see there.
            has_aux: whether the cell returns (z, aux); see `deqjax.fixed_point`.
            throw: whether a solve that fails raises; see `deqjax.fixed_point`.
            options: see `deqjax.fixed_point`.
        """
        refuse_stateful(self.cell)
        with self._explaining(x, z0, key):
            sol = fixed_point(
                apply_cell,
                self.initial_state(x, key=key) if z0 is None else z0,
                (self.cell, x, key),
                solver=self.solver,
                adjoint=self.adjoint,
                max_steps=self.max_steps if max_steps is None else max_steps,
                has_aux=has_aux,
                throw=throw,
                options=options,
            )
        return unless_lost(sol, self.solver)

    def iterates(
        self,
        x: PyTree,
        *,
        at: tuple[int, ...],
        z0: PyTree = None,
        key: Array | None = None,
        max_steps: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[tuple[PyTree, ...], optx.Solution]:
        """The iterates after `at` steps, for losses on them, and the solution.

        As `deqjax.regularise.correction_points`, which says what their gradients are.

        Args:
            x: see `__call__`.
            at: numbers of steps, growing, below `max_steps`.
            z0: see `__call__`.
            key: see there.
            max_steps: see there.
            options: see `deqjax.regularise.correction_points`.
        """
        refuse_stateful(self.cell)
        with self._explaining(x, z0, key):
            points, sol = correction_points(
                apply_cell,
                self.initial_state(x, key=key) if z0 is None else z0,
                (self.cell, x, key),
                at=at,
                solver=self.solver,
                adjoint=self.adjoint,
                max_steps=self.max_steps if max_steps is None else max_steps,
                options=options,
            )
        return points, unless_lost(sol, self.solver)

    def initial_state(self, x: PyTree, *, key: Array | None = None) -> PyTree:
        """Where solves start that are given no `z0`.

        Args:
            x: see `__call__`.
            key: passed to `start`.
        """
        if self.start is not None:
            return self.start(x) if key is None else self.start(x, key=key)
        of_cell = getattr(self.cell, "initial_state", None)
        return _tree.zeros_like(x) if of_cell is None else of_cell(x)

    @contextlib.contextmanager
    def _explaining(self, x: PyTree, z0: PyTree, key: Any) -> Iterator[None]:
        """Adds to an error of the cell which argument of the layer helps."""
        try:
            yield
        except (TypeError, ValueError) as error:
            text = str(error)
            inside = _RAISED_INSIDE in getattr(error, "__notes__", ())
            if inside and key is not None and "argument 'key'" in text:
                error.add_note(
                    "The layer was given a `key`, which it passes to the cell: let the "
                    "cell take `key=None`, or call the layer without one."
                )
            elif inside or text.startswith("`fn` must return the"):
                if not inside:
                    error.add_note("`fn` is the `cell` of the layer.")
                own = hasattr(self.cell, "initial_state")
                if z0 is None and self.start is None and not own:
                    error.add_note(
                        "The solve began at zeros with the shapes of `x`, "
                        f"{_shapes(x)}. For a state of another size than the input, "
                        "pass `z0=` at the call, give the layer a `start=` "
                        "(`deqjax.nn.LearnedStart`), or give the cell a method "
                        "`initial_state(x)`."
                    )
                else:
                    error.add_note(
                        "The solve began at a state of its own, from `z0`, `start` or "
                        f"the cell's `initial_state`; `x` has the shapes {_shapes(x)}."
                    )
            raise


class RevDEQ(DEQ):
    r"""A reversible deep equilibrium layer: N steps of the reversible iteration.

    A `DEQ` with `deqjax.Reversible(rtol=None, atol=None, beta=beta)`, `num_steps` steps
    and `deqjax.ReversibleAdjoint()`: the gradient is that of the steps taken, and the
    adjoint says what memory it takes.

    **Cost:** 2 × `num_steps` evaluations of the cell.

    Args:
        cell: see `DEQ`.
        num_steps: N.
        beta: weight on the cell, 0 < beta < 1; see `deqjax.Reversible`. One that is
            learned is passed at the call, as `options={"beta": value}`.
        batch_ndim: see `deqjax.Reversible`.
        start: see `DEQ`.

    Raises:
        ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> deq = deqjax.nn.RevDEQ(lambda z, x, key=None: jnp.tanh(0.5 * z + x))
        >>> int(deq.solve(jnp.zeros(3)).stats["num_evals"])
        8

    References:
        S. McCallum, K. Arora, J. Foster (2025), Reversible deep equilibrium models,
        doi:10.48550/arXiv.2509.12917.
    """

    def __init__(
        self,
        cell: Any,
        *,
        num_steps: int = 4,
        beta: PyTree = 0.5,
        batch_ndim: int = 0,
        start: Any = None,
    ):
        check_count("num_steps", num_steps, 1)
        self.cell, self.start = cell, start
        self.solver = Reversible(None, None, beta=beta, batch_ndim=batch_ndim)
        self.adjoint = ReversibleAdjoint()
        self.max_steps = num_steps


def apply_cell(z: PyTree, args: tuple) -> PyTree:
    """The map of a cell, for `fixed_point`; `args`: cell, x, and a key or None."""
    cell, x, key = args
    try:
        return cell(z, x) if key is None else cell(z, x, key=key)
    except Exception as error:
        error.add_note(_RAISED_INSIDE)
        raise


_RAISED_INSIDE = "This error was raised inside the `cell` of an equilibrium layer."


def _shapes(tree: PyTree) -> Any:
    return jtu.tree_map(jnp.shape, tree)


def unless_lost(sol: optx.Solution, solver: Any) -> optx.Solution:
    """The solution, its value NaN for problems without a single finite evaluation.

    The best iterate of such a problem is its start: finite, plausible, and the same
    whatever the input. A network must not make a prediction of it.
    """
    if not getattr(solver, "keeps_best", True):
        return sol  # The last iterate: it is NaN already.
    found = jnp.isfinite(lax.stop_gradient(sol.stats["residual"]))
    value = jtu.tree_map(
        lambda a: jnp.where(_tree.expand(found, a), a, jnp.nan), sol.value
    )
    return eqx.tree_at(lambda s: s.value, sol, value)
