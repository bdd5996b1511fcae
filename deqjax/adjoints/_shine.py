"""The implicit rule with the forward solver's own estimate of the inverse."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._checks import real
from .._problem import Problem, Solved
from .._types import Reals
from ..solvers import Broyden
from ._base import AbstractAdjoint
from ._forward_products import Linear
from ._implicit import solve_implicitly
from ._inverse import AdjointSolve
from ._stats import BackwardStats, check_probe


class _Estimate(AdjointSolve):
    """(I − J)⁻¹ ≈ B⁻¹, or I where B⁻¹ would stretch a vector too far."""

    solver: Broyden
    state: Any
    fallback: float | Array | None
    batch_ndim: int

    def after(self, state: PyTree) -> AdjointSolve:
        state = lax.stop_gradient(state)
        return eqx.tree_at(
            lambda inverse: inverse.state, self, state, is_leaf=lambda x: x is None
        )

    def approximate(
        self, operator: Linear, rhs: PyTree, unit: Reals, transposed: bool
    ) -> tuple[PyTree, dict[str, Any]]:
        k = self.batch_ndim
        value = self.solver.estimate(self.state, rhs, transposed)
        size, before = _tree.norm(value, k), _tree.norm(rhs, k)
        sound = jnp.isfinite(size)
        if self.fallback is not None:
            sound = sound & (size <= self.fallback * before)
        value = _tree.where(sound, value, rhs)
        return value, {"num_products": jnp.array(0)}


class ShineAdjoint(AbstractAdjoint):
    r"""A biased gradient: (I − J)⁻¹ is replaced by the inverse that Broyden estimated.

    $$ \bar\theta = (\partial_\theta f)^\top \lambda, \qquad
       \lambda = B^{-\top} \bar z, \qquad
       \lambda = \bar z \text{ where } \| B^{-\top} \bar z \| > \tau\, \| \bar z \| $$

    | symbol | meaning |
    |---|---|
    | $B$ | `deqjax.Broyden`'s estimate of I − J when the forward solve ended |
    | $\tau$ | `fallback` |

    B is right along the last steps of the solve and arbitrary across them: the bias is
    not bounded by anything that the solve measures, and changes with `history` and the
    tolerance. A loose, short solve makes this `JFBAdjoint`, and so does one that ends
    just after its memory was emptied: give `Broyden` a `history` that outlasts the
    solve. See `relative_residual` of the probe.

    **Cost:** one linearisation of f at z* and one product. **Memory:** the history of
    the forward solver, kept for the backward pass.

    Forward mode too, by B⁻¹. Second derivatives have B⁻¹ wherever those of
    `ImplicitAdjoint` have (I − J)⁻¹. The gradient of `aux` goes through z* likewise.

    **Not converged:** the same formula with the last B; it is then not that of a fixed
    point (`forward_residual` of the probe).

    Args:
        fallback: τ, per problem; None: never fall back, unless λ is not finite.
        probe: a `BackwardStats` whose gradient is the record of the backward pass: the
            residual of the adjoint system that λ leaves, for one more product.

    Raises:
        ValueError, TypeError: if an argument is not valid, or the solver not
            `deqjax.Broyden`.

    Example:
        >>> import deqjax, jax, jax.numpy as jnp
        >>> f = lambda z, a: 0.5 * z + a
        >>> adjoint = deqjax.ShineAdjoint(fallback=None)
        >>> solve = lambda a: deqjax.fixed_point(
        ...     f, jnp.zeros(()), a, solver=deqjax.Broyden(), adjoint=adjoint).value
        >>> float(jax.grad(solve)(3.0))
        2.0

    References:
        Z. Ramzi, F. Mannel, S. Bai, J.-L. Starck, P. Ciuciu, T. Moreau (2022), SHINE:
        SHaring the INverse Estimate from the forward pass for bi-level optimization and
        implicit models, doi:10.48550/arXiv.2106.00553.
    """

    fallback: float | Array | None = eqx.field(default=1.3, converter=real)
    probe: BackwardStats | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        known = self.fallback is not None and not isinstance(self.fallback, Array)
        if known and (
            isinstance(self.fallback, bool)
            or not (isinstance(self.fallback, int | float) and self.fallback > 0)
        ):
            raise ValueError(
                "`fallback`, the most that the estimate may stretch a cotangent by, "
                f"must be a positive number or None; got {self.fallback!r}."
            )
        check_probe(self.probe)

    def solve(self, problem: Problem) -> Solved:
        solver = problem.solver
        if not isinstance(solver, Broyden):
            raise ValueError(
                "`ShineAdjoint` shares the estimate of `deqjax.Broyden` and so needs "
                f"it as the solver; got {type(solver).__name__}. Use "
                "`solver=deqjax.Broyden()`, or `deqjax.ImplicitAdjoint()`."
            )
        inverse = _Estimate(
            batch_ndim=solver.batch_ndim,
            solver=solver,
            state=None,
            fallback=self.fallback,
        )
        return solve_implicitly(problem, inverse, self.probe)
