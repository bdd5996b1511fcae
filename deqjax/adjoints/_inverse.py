"""What stands for A⁻¹ in the implicit rule."""

import abc
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import PyTree

from .. import _tree
from ._forward_products import Linear


class AbstractInverse(eqx.Module):
    """Stands for A⁻¹ in the implicit rule."""

    batch_ndim: eqx.AbstractVar[int]

    @property
    def shields(self) -> bool:
        """Whether a problem whose solve failed is kept from spoiling the others."""
        return True

    def after(self, state: PyTree) -> "AbstractInverse":
        """This inverse, given the state that the forward solver ended in."""
        return self

    @abc.abstractmethod
    def product(self, exact: PyTree, vector: PyTree) -> PyTree:
        """Aᵀ v as this inverse inverts it, given the exact product."""

    @abc.abstractmethod
    def solve(
        self, operator: Linear, rhs: PyTree, transposed: bool, measure: bool = False
    ) -> tuple[PyTree, dict[str, Any]]:
        """x with `operator(x) = rhs`, and if asked for the entries of a probe."""


class LinearSolve(AbstractInverse):
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

    def product(self, exact: PyTree, vector: PyTree) -> PyTree:
        return exact

    def solve(
        self, operator: Linear, rhs: PyTree, transposed: bool, measure: bool = False
    ) -> tuple[PyTree, dict[str, Any]]:
        k = self.batch_ndim
        # Scaled to 1 per problem: linear solvers take a small right-hand side for 0.
        size = _tree.max_abs(rhs, k)
        zero, usable = size == 0, jnp.isfinite(size)
        unit = jnp.where(zero | ~usable, 1, size)
        scaled = _tree.scale(1 / unit, rhs)
        options = {}
        if transposed and self.initial is not None:
            start = _tree.scale(1 / unit, self.initial)
            fits = _tree.all_finite(start, k) & ~zero
            options["y0"] = _tree.where(fits, start, _tree.zeros_like(start))
        sol = lx.linear_solve(
            lx.FunctionLinearOperator(
                operator,
                jax.eval_shape(lambda: rhs),
                lx.transpose_tags(self.tags) if transposed else self.tags,
            ),
            scaled,
            self.solver,
            options=options,
            throw=False,
        )
        value = sol.value
        finite = _tree.all_finite(value, k)
        converged = sol.stats.get("converged", sol.result == lx.RESULTS.successful)
        converged = zero | (converged & finite)
        nan = jtu.tree_map(lambda x: jnp.full_like(x, jnp.nan), value)
        # Nothing can be said for a problem whose solution is not finite; but what was
        # not finite to begin with, a loss say, is not to be hidden.
        best = _tree.where(finite, value, _tree.zeros_like(value))
        fallback = {"keep": best, "nan": nan, "jfb": scaled}[self.on_failure]
        fallback = _tree.where(usable, fallback, nan)
        value = _tree.where(converged, value, fallback)
        value = _tree.where(zero, _tree.zeros_like(value), value)
        entries: dict[str, Any] = {}
        if measure:
            entries = {
                **measured(operator, value, scaled, k, sol.stats.get("residual"), unit),
                "num_products": sol.stats.get("num_products", None),
                "converged": converged,
            }
        return _tree.scale(unit, value), entries


def measured(
    operator: Linear,
    value: PyTree,
    rhs: PyTree,
    batch_ndim: int,
    residual: Any = None,
    unit: Any = 1,
) -> dict[str, Any]:
    """The residual entries of a probe, by one product unless the residual is known."""
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
