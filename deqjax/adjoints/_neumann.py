"""The implicit rule with a truncated Neumann series in place of the inverse."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PyTree

from .. import _tree
from .._checks import check_beta, check_count, real, whole
from .._types import Reals
from ..linear._base import widened
from ..linear._neumann import add, series
from ._forward_products import Linear
from ._implicit import apply_implicit, batch_ndim_of, check_fixed_point
from ._inverse import AbstractInverse
from ._loop import as_inputs
from ._stats import BackwardStats, check_probe


class _Series(AbstractInverse):
    """(I − J)⁻¹ ≈ β Σ_{t<k} ((1 − β) I + βJ)ᵗ."""

    num_terms: int
    beta: float | Array
    batch_ndim: int

    def product(self, exact: PyTree, vector: PyTree) -> PyTree:
        return exact

    def approximate(
        self, operator: Linear, rhs: PyTree, unit: Reals, transposed: bool
    ) -> tuple[PyTree, dict[str, Any]]:
        product = widened(operator, jax.eval_shape(lambda: rhs))
        b = jtu.tree_map(lambda x: x.astype(_tree.wide(x.dtype)), rhs)
        correct = lambda x, r: add(self.beta, x, r)
        wide, products = series(product, correct, b, None, self.num_terms)
        value = jtu.tree_map(lambda x, y: x.astype(y.dtype), wide, rhs)
        return value, {"num_products": jnp.array(products)}


class NeumannAdjoint(optx.AbstractAdjoint):
    r"""A biased gradient: (I − J)⁻¹ is replaced by the first terms of its series.

    $$ \bar\theta = (\partial_\theta f)^\top \lambda, \qquad
       \lambda = \beta \sum_{t=0}^{k-1} \big((1-\beta) I + \beta J^\top\big)^t\,
       \bar z, \qquad J = \partial_z f(z^*, \theta) $$

    | symbol | meaning |
    |---|---|
    | $k$ | `num_terms` |
    | $\beta$ | damping; 1 is the plain series, and with k = 1 `JFBAdjoint` |

    The bias is λ − λ* = −((1 − β) I + βJᵀ)ᵏ λ*, where λ* is exact: it vanishes with k
    if every eigenvalue of (1 − β) I + βJ lies within the unit circle, and grows
    otherwise. Exactly k terms are taken, whatever happened in the forward pass; for as
    many as a tolerance asks for, use `ImplicitAdjoint(deqjax.linear.Neumann())`.

    **Cost:** one linearisation of f at z* and k products. **Memory:** one linearisation
    of f and 4 copies of z.

    Forward and reverse mode. Second derivatives have the series wherever those of
    `ImplicitAdjoint` have (I − J)⁻¹; they are not the derivatives of the biased
    gradient. The gradient of `aux` goes through z* likewise.

    **Not converged:** the same formula at the z* that was returned; it is then not that
    of a fixed point (`forward_residual` of the probe).

    Args:
        num_terms: terms of the series.
        beta: damping, 0 < beta < 2.
        probe: a `BackwardStats` whose gradient is the record of the backward pass: the
            residual of the adjoint system that λ leaves, for one more product.

    Raises:
        ValueError, TypeError: if an argument is not valid, or the problem not a
            fixed-point problem.

    Example:
        >>> import deqjax, jax, jax.numpy as jnp
        >>> f = lambda z, a: 0.5 * z + a
        >>> adjoint = deqjax.NeumannAdjoint(3)
        >>> solve = lambda a: deqjax.fixed_point(
        ...     f, jnp.zeros(()), a, solver=deqjax.Picard(), adjoint=adjoint).value
        >>> float(jax.grad(solve)(3.0))  # 1 + 1/2 + 1/4; exact: 2
        1.75

    References:
        Z. Geng, X.-Y. Zhang, S. Bai, Y. Wang, Z. Lin (2021), On training implicit
        models, doi:10.48550/arXiv.2111.05177.
    """

    num_terms: int = eqx.field(default=5, static=True, converter=whole)
    beta: float | Array = eqx.field(default=1.0, converter=real)
    probe: BackwardStats | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        check_count("num_terms", self.num_terms, 1)
        check_beta(self.beta, below=2.0)
        check_probe(self.probe)

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree,
        tags: frozenset[object],
    ) -> PyTree:
        named = as_inputs(inputs)
        check_fixed_point(self, named)
        inverse = _Series(
            batch_ndim=batch_ndim_of(named), num_terms=self.num_terms, beta=self.beta
        )
        return apply_implicit(primal_fn, rewrite_fn, named, inverse, self.probe)
