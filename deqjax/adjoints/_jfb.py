"""Jacobian-free backpropagation: the implicit rule without its linear solve."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optimistix as optx
from jaxtyping import PyTree

from .. import _tree
from ._implicit import AbstractInverse, Linear, apply_implicit
from ._loop import as_inputs


class _Identity(AbstractInverse):
    """(J − I)⁻¹ ≈ −I: the zeroth term of the Neumann series."""

    def product(self, exact: PyTree, vector: PyTree) -> PyTree:
        return _tree.negative(vector)

    def solve(
        self, operator: Linear, rhs: PyTree, transposed: bool, measure: bool = False
    ) -> tuple[PyTree, dict[str, Any]]:
        return _tree.negative(rhs), {"num_products": jnp.array(0)} if measure else {}


class JFBAdjoint(optx.AbstractAdjoint):
    r"""A biased gradient, Jacobian-free: (I − J)⁻¹ is replaced by I.

    $$ \bar\theta = (\partial_\theta f)^\top\, \bar z $$

    A descent direction for contractions that are well enough conditioned; the bias
    grows with the norm of J and is not small where that is near 1.

    **Cost:** one linearisation of f at z* and one product.

    Forward mode gives ż = ∂f/∂θ θ̇, the same approximation.

    Raises:
        TypeError: if the problem is not a fixed-point problem.

    Example:
        >>> import deqjax, jax, jax.numpy as jnp
        >>> f = lambda z, a: 0.5 * z + a
        >>> solve = lambda a: deqjax.fixed_point(
        ...     f, jnp.zeros(()), a, solver=deqjax.Picard(), adjoint=deqjax.JFBAdjoint()
        ... ).value
        >>> float(jax.grad(solve)(3.0))  # exact: 2
        1.0

    References:
        S. W. Fung, H. Heaton, Q. Li, D. McKenzie, S. Osher, W. Yin (2022), JFB:
        Jacobian-free backpropagation for implicit networks,
        doi:10.1609/aaai.v36i6.20619.
    """

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree,
        tags: frozenset[object],
    ) -> PyTree:
        named = as_inputs(inputs)
        if not isinstance(named.solver, optx.AbstractFixedPointSolver):
            raise TypeError(
                "`JFBAdjoint` approximates the inverse of I − J and so needs a "
                "fixed-point problem; got one for "
                f"{type(named.solver).__name__}. Use `deqjax.fixed_point`."
            )
        return apply_implicit(primal_fn, rewrite_fn, named, _Identity(), None)
