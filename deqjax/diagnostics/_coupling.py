"""Whether the examples of a batch influence one another."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .. import _tree
from .._checks import check_count
from ._report import AbstractReport, Table, axes
from ._state import batch_of, canonical_state, flatten


class CouplingReport(AbstractReport):
    """Who influences whom in a batch; see `coupling_report`.

    Entry (i, j) of a matrix is about the influence of example i on the value of f for
    example j. Examples of a batch of several axes are counted in row-major order.

    Attributes:
        derivative: ‖(∂f_j/∂z_i) v‖₂ of a random v.
        changed: whether f_j changes, in any bit, when z_i is replaced by other numbers.
        poisoned: whether f_j changes when z_i is replaced by NaN.
    """

    derivative: Float[Array, "examples examples"]
    changed: Bool[Array, "examples examples"]
    poisoned: Bool[Array, "examples examples"]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The pairs (i, j), i ≠ j, in which finite numbers of i reach j."""
        return _pairs(self._coupled())

    @property
    def poisoned_pairs(self) -> list[tuple[int, int]]:
        """The pairs (i, j), i ≠ j, in which a NaN of i reaches j."""
        return _pairs(np.asarray(self.poisoned))

    @property
    def independent(self) -> bool:
        """Whether no example reaches another, neither by numbers nor by NaN."""
        return not self.pairs and not self.poisoned_pairs

    def _coupled(self) -> np.ndarray:
        # A derivative that is NaN counts.
        return (np.asarray(self.derivative) != 0) | np.asarray(self.changed)

    def table(self) -> Table:
        count = len(self.changed)
        if self.independent:
            title = f"Coupling: the {count} examples do not influence one another"
            return Table(title, ["", ""], [])
        coupled, rows = self._coupled(), []
        union = sorted({*self.pairs, *self.poisoned_pairs})
        for i, j in union[:20]:
            row = [f"{i} → {j}", self.derivative[i, j], bool(coupled[i, j])]
            rows.append([*row, bool(self.poisoned[i, j])])
        notes = [f"and {len(union) - 20} more pairs"] if len(union) > 20 else []
        if not self.pairs:
            notes.append("Only a NaN gets across, by 0 × NaN in a sum, for example.")
        total = count * (count - 1)
        return Table(
            f"Coupling: {len(union)} of {total} pairs of examples are coupled",
            ["pair", "derivative", "numbers reach it", "NaN reaches it"],
            rows,
            notes,
        )

    def plot(self, ax: Any = None) -> Any:
        """The matrix of derivatives, as colours.

        Args:
            ax: matplotlib axes; by default those of a new figure.
        """
        ax = axes(ax)
        size = np.asarray(self.derivative, np.float64)
        with np.errstate(divide="ignore"):
            shown = np.where(size > 0, np.log10(np.where(size > 0, size, 1)), np.nan)
        image = ax.imshow(shown, cmap="viridis", interpolation="nearest")
        ax.figure.colorbar(image, ax=ax, label="log₁₀ of the derivative's norm")
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("example that is influenced")
        ax.set_ylabel("example that influences")
        return ax


def _pairs(matrix: np.ndarray) -> list[tuple[int, int]]:
    return [(int(i), int(j)) for i, j in np.argwhere(matrix) if i != j]


def coupling_report(
    fn: Callable[[Any, Any], Any],
    z: PyTree,
    args: PyTree = None,
    *,
    batch_ndim: int = 1,
    key: PRNGKeyArray | None = None,
) -> CouplingReport:
    """Check that no example of a batch influences another through fn.

    A solver with `batch_ndim` takes examples for independent problems, and its
    gradients are right only if they are. For every example i this evaluates f with a
    tangent on z_i alone, with z_i replaced by other numbers, and with z_i replaced by
    NaN, and looks at all other examples. Tangents that do not depend on z_i are exact
    zeros, and values that do not are equal bit by bit, since the same compiled program
    computes them; so there is no tolerance.

    The tangent sees small influences that rounding hides in the values; the replacement
    sees those without a derivative (a maximum, a threshold, ranks); NaN sees what
    multiplies by zero, such as sums over masked entries. An influence that exists only
    elsewhere than at z and its replacement is not found.

    **Cost:** for B examples, B products with the Jacobian and 2 B + 1 evaluations, one
    after the other in one compiled loop.

    Args:
        fn: `fn(z, args) -> z`, differentiable in forward mode.
        z: a batch of states: a pytree of real arrays.
        args: passed to fn as they are.
        batch_ndim: number of leading axes that index examples, at least 1.
        key: decides tangents and replacements. Default: `jax.random.key(0)`.

    Returns:
        A `CouplingReport`.

    Raises:
        ValueError, TypeError: if an argument is not valid, or an array is being traced.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> centred = lambda z, a: 0.5 * (z - jnp.mean(z[:2], axis=0))
        >>> report = deqjax.diagnostics.coupling_report(centred, jnp.ones((3, 4)))
        >>> report.pairs
        [(0, 1), (0, 2), (1, 0), (1, 2)]
    """
    check_count("batch_ndim", batch_ndim, 1)
    z = canonical_state(fn, z, args, batch_ndim)
    key = jr.key(0) if key is None else key
    return CouplingReport(*_influences(fn, z, args, batch_ndim, key))


@eqx.filter_jit
def _influences(
    fn: Callable, z: PyTree, args: PyTree, batch_ndim: int, key: PRNGKeyArray
) -> tuple[Array, Array, Array]:
    batch = batch_of(z, batch_ndim)
    count = math.prod(batch)
    f = lambda z: fn(z, args)
    tangent_key, value_key = jr.split(key)
    direction = _tree.draw(jr.normal, tangent_key, z)
    noise = _tree.draw(jr.normal, value_key, z)
    other = jtu.tree_map(lambda a, b: a + b * (1 + jnp.abs(a)), z, noise)
    nan = jtu.tree_map(lambda a: jnp.full_like(a, jnp.nan), z)
    zero = _tree.zeros_like(z)

    def at(i: Array, inside: PyTree, outside: PyTree) -> PyTree:
        mask = (jnp.arange(count, dtype=i.dtype) == i).reshape(batch)
        return _tree.where(mask, inside, outside)

    # The program of values runs for no example first: −1 replaces none.
    def values(i: Array) -> tuple[Array, Array]:
        rows = lambda new: flatten(f(at(i, new, z)), batch_ndim)
        return rows(other), rows(nan)

    finite, bad = lax.map(values, jnp.arange(-1, count))

    def same(a: Array, b: Array) -> Array:
        equal = (a == b) | (jnp.isnan(a) & jnp.isnan(b))
        return jnp.all(equal, axis=1)

    def tangent(i: Array) -> Array:
        _, moved = jax.jvp(f, (z,), (at(i, direction, zero),))
        return jnp.linalg.norm(flatten(moved, batch_ndim), axis=1)

    derivative = lax.map(tangent, jnp.arange(count))
    differs = lambda a: ~jax.vmap(same, in_axes=(0, None))(a[1:], a[0])
    return derivative, differs(finite), differs(bad)
