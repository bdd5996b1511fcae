"""What stands for A⁻¹ in the implicit rule."""

import abc
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from .. import _tree
from .._types import Reals
from ..linear._base import AbstractIterative, widened
from ..linear._neumann import add, series
from ._forward_products import Linear


class AdjointSolve(eqx.Module):
    """Stands for A⁻¹ in the implicit rule."""

    batch_ndim: eqx.AbstractVar[int]

    @property
    def shields(self) -> bool:
        """Whether a problem whose solve failed is kept from spoiling the others."""
        return True

    def after(self, state: PyTree) -> "AdjointSolve":
        """This inverse, given the state that the forward solver ended in."""
        return self

    @abc.abstractmethod
    def approximate(
        self, operator: Linear, rhs: PyTree, unit: Reals, transposed: bool
    ) -> tuple[PyTree, dict[str, Any]]:
        """x with `operator(x) = rhs`, and what is known of it for a probe.

        The right-hand side of each problem has been divided by its `unit`.
        """

    def solve(
        self, operator: Linear, rhs: PyTree, transposed: bool, measure: bool = False
    ) -> tuple[PyTree, dict[str, Any]]:
        """x with `operator(x) = rhs`, and if asked for the entries of a probe.

        x is 0, and not converged, for a problem where it is not finite though its
        right-hand side is, if problems are shielded from one another.
        """
        k = self.batch_ndim
        # Of size 1 per problem: neither squares nor what solvers take for 0 are lost.
        unit = _tree.magnitude(rhs, k)
        scaled = _tree.scale(1 / unit, rhs)
        value, known = self.approximate(operator, scaled, unit, transposed)
        entries: dict[str, Any] = {}
        if measure:
            entries = {**measured(operator, value, scaled, k, known, unit), **known}
        value = _tree.scale(unit, value)
        finite = _tree.all_finite(value, k)
        if entries.get("converged") is not None:
            entries["converged"] = entries["converged"] & finite
        if self.shields:
            usable = _tree.all_finite(rhs, k)
            value = _tree.where(finite | ~usable, value, _tree.zeros_like(value))
        return value, entries


class LinearSolve(AdjointSolve):
    """A⁻¹ by a lineax solver, in both directions.

    `initial`, if given, is where the transposed solve starts.
    """

    solver: lx.AbstractLinearSolver
    tags: frozenset[object]
    on_failure: Literal["keep", "nan", "jfb"]
    batch_ndim: int
    initial: PyTree

    @property
    def shields(self) -> bool:
        return self.on_failure != "nan"

    def approximate(
        self, operator: Linear, rhs: PyTree, unit: Reals, transposed: bool
    ) -> tuple[PyTree, dict[str, Any]]:
        k = self.batch_ndim
        zero, usable = _tree.max_abs(rhs, k) == 0, _tree.all_finite(rhs, k)
        options: dict[str, Any] = {}
        if isinstance(self.solver, AbstractIterative):
            options["unit"] = unit
        if transposed and self.initial is not None:
            start = _tree.scale(1 / unit, self.initial)
            fits = _tree.all_finite(start, k) & ~zero
            options["y0"] = _tree.where(fits, start, _tree.zeros_like(start))
        if isinstance(self.solver, AbstractIterative):
            value, result, stats = self.solver.solve(operator, rhs, options)
            # A series of fixed length is not tested, so `converged` is unknown.
            tested, trivial = "converged" in stats, jnp.zeros_like(zero)
        else:
            tags = lx.transpose_tags(self.tags) if transposed else self.tags
            like = jax.eval_shape(lambda: rhs)
            system = lx.FunctionLinearOperator(operator, like, tags), rhs
            sol = lx.linear_solve(*system, self.solver, options=options, throw=False)
            value, result, stats = sol.value, sol.result, sol.stats
            tested, trivial = True, zero
        finite = _tree.all_finite(value, k)
        converged = stats.get("converged", result == lx.RESULTS.successful)
        converged = trivial | (converged & finite)
        nan = jtu.tree_map(lambda x: jnp.full_like(x, jnp.nan), value)
        # Nothing can be said for a problem whose solution is not finite; but what was
        # not finite to begin with, a loss say, is not to be hidden.
        best = _tree.where(finite, value, _tree.zeros_like(value))
        fallback = {"keep": best, "nan": nan, "jfb": rhs}[self.on_failure]
        fallback = _tree.where(usable, fallback, nan)
        value = _tree.where(converged, value, fallback)
        value = _tree.where(zero & converged, _tree.zeros_like(value), value)
        known = {
            "residual": stats.get("residual"),
            "num_products": stats.get("num_products"),
            "converged": converged if tested else None,
        }
        return value, known


class Series(AdjointSolve):
    """(I − J)⁻¹ ≈ β Σ_{t<k} ((1 − β) I + βJ)ᵗ; for k = 1 and β = 1 it is I."""

    num_terms: int
    beta: float | Array
    batch_ndim: int

    def approximate(
        self, operator: Linear, rhs: PyTree, unit: Reals, transposed: bool
    ) -> tuple[PyTree, dict[str, Any]]:
        product = widened(operator, jax.eval_shape(lambda: rhs))
        b = jtu.tree_map(lambda x: x.astype(_tree.wide(x.dtype)), rhs)
        correct = lambda x, r: add(self.beta, x, r)
        wide, products = series(product, correct, b, None, self.num_terms)
        value = jtu.tree_map(lambda x, y: x.astype(y.dtype), wide, rhs)
        return value, {"num_products": jnp.array(products)}


def measured(
    operator: Linear,
    value: PyTree,
    rhs: PyTree,
    batch_ndim: int,
    known: dict[str, Any] | None = None,
    unit: Any = 1,
) -> dict[str, Any]:
    """The residual entries of a probe, by one product unless the residual is known.

    All for right-hand sides that have been divided by `unit`.
    """
    residual = (known or {}).pop("residual", None)
    if residual is None:
        residual = _tree.norm(_tree.subtract(rhs, operator(value)), batch_ndim)
    norm = _tree.norm(rhs, batch_ndim)
    return {
        "residual": residual * unit,
        "relative_residual": residual / jnp.where(norm > 0, norm, 1),
    }


def negated(tags: frozenset[object]) -> frozenset[object]:
    """The tags of −A, given those of A."""
    swap: dict[object, object] = {
        lx.positive_semidefinite_tag: lx.negative_semidefinite_tag,
        lx.negative_semidefinite_tag: lx.positive_semidefinite_tag,
    }
    kept = {
        lx.symmetric_tag,
        lx.diagonal_tag,
        lx.tridiagonal_tag,
        lx.lower_triangular_tag,
        lx.upper_triangular_tag,
    }
    return frozenset(swap.get(tag, tag) for tag in tags if tag in swap or tag in kept)
