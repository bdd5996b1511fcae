"""Jacobian-free backpropagation: the implicit rule without its linear solve."""

import equinox as eqx

from .._problem import Problem, Solved
from ._base import AbstractAdjoint
from ._implicit import solve_implicitly
from ._inverse import Series
from ._stats import BackwardStats, check_probe


class JFBAdjoint(AbstractAdjoint):
    r"""A biased gradient, Jacobian-free: (I − J)⁻¹ is replaced by I.

    $$ \bar\theta = (\partial_\theta f)^\top\, \bar z $$

    A descent direction for contractions that are well enough conditioned; the bias
    grows with the norm of J and is not small where that is near 1.

    **Cost:** one linearisation of f at z* and one product.

    Forward mode gives ż = ∂f/∂θ θ̇, the same approximation. Second derivatives have I
    wherever those of `ImplicitAdjoint` have (I − J)⁻¹; they are not the derivatives of
    the biased gradient. The gradient of `aux` goes through z* likewise.

    **Not converged:** the same pull-back at the z* that was returned; it is then not
    that of a fixed point (`forward_residual` of the probe).

    Args:
        probe: a `BackwardStats` whose gradient is the record of the backward pass: the
            residual of the adjoint system that λ = z̄ leaves, for one more product.

    Raises:
        TypeError: if `probe` is not of its kind, or the problem not a fixed-point
            problem.

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

    probe: BackwardStats | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        check_probe(self.probe)

    def solve(self, problem: Problem) -> Solved:
        self.check_fixed_point(problem)
        # The first term of the Neumann series.
        inverse = Series(num_terms=1, beta=1.0, batch_ndim=problem.batch_ndim)
        return solve_implicitly(problem, inverse, self.probe)
