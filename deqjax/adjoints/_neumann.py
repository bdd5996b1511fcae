"""The implicit rule with a truncated Neumann series in place of the inverse."""

import equinox as eqx
from jaxtyping import Array

from .._checks import check_beta, check_count, real, whole
from .._problem import Problem, Solved
from ._base import AbstractAdjoint
from ._implicit import solve_implicitly
from ._inverse import Series
from ._stats import BackwardStats, check_probe


class NeumannAdjoint(AbstractAdjoint):
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

    def solve(self, problem: Problem) -> Solved:
        self.check_fixed_point(problem)
        inverse = Series(
            num_terms=self.num_terms, beta=self.beta, batch_ndim=problem.batch_ndim
        )
        return solve_implicitly(problem, inverse, self.probe)
