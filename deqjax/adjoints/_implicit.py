"""Gradients by the implicit function theorem, and what replaces the inverse in it.

At R(z, θ) = 0 (for a fixed point R = f(z, θ) − z) the tangents satisfy

    A ż = −B θ̇,        A = ∂R/∂z,  B = ∂R/∂θ .

One custom JVP rule serves every adjoint of this file; they differ only in the `Inverse`
that stands for A⁻¹. The rule is linear in θ̇ and transposable, so that forward mode,
reverse mode and their compositions all come from it.
"""

import abc
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._upstream import Extras, Inputs
from ..linear import GMRES
from ..solvers._base import AbstractSolver
from ._loop import SolverLoop, as_inputs, detach, solve
from ._stats import BackwardStats

Linear = Callable[[PyTree], PyTree]


class AbstractInverse(eqx.Module):
    """Stands for A⁻¹ in the implicit rule."""

    @abc.abstractmethod
    def product(self, exact: PyTree, vector: PyTree) -> PyTree:
        """Aᵀ v as this inverse inverts it, given the exact product."""

    @abc.abstractmethod
    def solve(
        self, operator: Linear, rhs: PyTree, transposed: bool, measure: bool = False
    ) -> tuple[PyTree, dict[str, Any]]:
        """x with `operator(x) = rhs`, and if asked for the entries of a probe."""


class LinearSolve(AbstractInverse):
    """A⁻¹ by a lineax solver, in both directions."""

    solver: lx.AbstractLinearSolver
    tags: frozenset[object]
    on_failure: Literal["keep", "nan", "jfb"]
    batch_ndim: int

    def product(self, exact: PyTree, vector: PyTree) -> PyTree:
        return exact

    def solve(
        self, operator: Linear, rhs: PyTree, transposed: bool, measure: bool = False
    ) -> tuple[PyTree, dict[str, Any]]:
        k = self.batch_ndim
        # Scaled to 1 per problem: linear solvers take a small right-hand side for 0.
        size = _tree.max_abs(rhs, k)
        zero = size == 0
        unit = jnp.where(zero | ~jnp.isfinite(size), 1, size)
        scaled = _tree.scale(1 / unit, rhs)
        sol = lx.linear_solve(
            lx.FunctionLinearOperator(
                operator,
                jax.eval_shape(lambda: rhs),
                lx.transpose_tags(self.tags) if transposed else self.tags,
            ),
            scaled,
            self.solver,
            throw=False,
        )
        value = sol.value
        converged = sol.stats.get("converged", sol.result == lx.RESULTS.successful)
        converged = zero | (converged & _tree.all_finite(value, k))
        fallback = {
            "keep": lambda: value,
            "nan": lambda: jtu.tree_map(lambda x: jnp.full_like(x, jnp.nan), value),
            "jfb": lambda: _tree.negative(scaled),
        }[self.on_failure]()
        value = _tree.where(converged, value, fallback)
        value = _tree.where(zero, _tree.zeros_like(value), value)
        entries: dict[str, Any] = {}
        if measure:
            residual = sol.stats.get("residual", None)
            if residual is None:
                residual = _tree.norm(_tree.subtract(scaled, operator(value)), k)
            norm = _tree.norm(scaled, k)
            entries = {
                "residual": residual * unit,
                "relative_residual": residual / jnp.where(norm > 0, norm, 1),
                "num_products": sol.stats.get("num_products", None),
                "converged": converged,
            }
        return _tree.scale(unit, value), entries


class ImplicitAdjoint(optx.AbstractAdjoint):
    r"""The exact gradient of the fixed point, by the implicit function theorem.

    $$ \dot z^* = (I - J)^{-1}\, \partial_\theta f\, \dot\theta, \qquad
       \bar\theta = (\partial_\theta f)^\top (I - J)^{-\top}\, \bar z, \qquad
       J = \partial_z f(z^*, \theta) $$

    **Cost:** one linearisation of f at z*, the Jacobian products of the linear solve,
    and one more product. **Memory:** one linearisation of f, and what the linear
    solver keeps; nothing grows with the number of forward steps.

    Forward and reverse mode, and any composition of them. The gradient of `aux` is
    exact too, from the same linearisation.

    **Wrong when** z* is not a fixed point: the formula is then evaluated where it does
    not hold, with an error of the order of the residual. See `sol.result`. A linear
    solve that does not converge is seen in the probe, and `on_failure` says what it
    returns. It never throws.

    Args:
        linear_solver: any lineax solver; by default `deqjax.linear.GMRES` with the
            `batch_ndim` of the forward solver.
        probe: a `BackwardStats` whose gradient is the record of the backward pass.
        on_failure: what a linear solve that failed returns for the problems that did:
            `"keep"` its best iterate, `"nan"`, or `"jfb"` (the right-hand side, as if
            J were 0).

    Raises:
        ValueError, TypeError: if an argument is not of its kind.

    Example:
        >>> import deqjax, jax, jax.numpy as jnp
        >>> f = lambda z, a: 0.5 * z + a
        >>> adjoint = deqjax.ImplicitAdjoint()
        >>> solve = lambda a: deqjax.fixed_point(
        ...     f, jnp.zeros(()), a, solver=deqjax.Picard(), adjoint=adjoint).value
        >>> float(jax.grad(solve)(3.0)), float(jax.jacfwd(solve)(3.0))
        (2.0, 2.0)

    References:
        S. Bai, J. Z. Kolter, V. Koltun (2019), Deep equilibrium models,
        doi:10.48550/arXiv.1909.01377.
    """

    linear_solver: lx.AbstractLinearSolver | None = None
    probe: BackwardStats | None = eqx.field(default=None, kw_only=True)
    on_failure: Literal["keep", "nan", "jfb"] = eqx.field(default="keep", kw_only=True)

    def __check_init__(self):
        if self.linear_solver is not None and not isinstance(
            self.linear_solver, lx.AbstractLinearSolver
        ):
            raise TypeError(
                "`linear_solver` must be a lineax solver (lineax.AbstractLinearSolver) "
                f"or None; got {type(self.linear_solver).__name__}."
            )
        if self.probe is not None and not isinstance(self.probe, BackwardStats):
            raise TypeError(
                "`probe` must be a deqjax.BackwardStats or None; got "
                f"{type(self.probe).__name__}."
            )
        if self.on_failure not in ("keep", "nan", "jfb"):
            raise ValueError(
                f'`on_failure` must be "keep", "nan" or "jfb"; got {self.on_failure!r}.'
            )

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree,
        tags: frozenset[object],
    ) -> PyTree:
        named = as_inputs(inputs)
        k = named.solver.batch_ndim if isinstance(named.solver, AbstractSolver) else 0
        linear_solver = self.linear_solver
        if linear_solver is None:
            linear_solver = GMRES(batch_ndim=k)
        inverse = LinearSolve(linear_solver, tags, self.on_failure, k)
        return apply_implicit(primal_fn, rewrite_fn, named, inverse, self.probe)


def apply_implicit(
    primal_fn: Callable,
    rewrite_fn: Callable,
    inputs: Inputs,
    inverse: AbstractInverse,
    probe: BackwardStats | None,
) -> PyTree:
    value, extras = _implicit(primal_fn, rewrite_fn, inputs, inverse, probe)
    return value, tuple(detach(extras))


@eqx.filter_custom_jvp
def _implicit(
    primal_fn: Callable,
    rewrite_fn: Callable,
    inputs: Inputs,
    inverse: AbstractInverse,
    probe: BackwardStats | None,
) -> tuple[PyTree, Extras]:
    value, extras = solve(primal_fn, inputs, SolverLoop(inputs))
    return jtu.tree_map(jnp.asarray, (value, extras))


def _residual(rewrite_fn: Callable, inputs: Inputs, z: PyTree) -> tuple[PyTree, PyTree]:
    """R(z) and the differentiable part of aux, from one evaluation of fn."""
    if isinstance(inputs.solver, optx.AbstractFixedPointSolver):
        f, aux = inputs.fn(z, inputs.args)
        residual = jtu.tree_map(jnp.subtract, f, z)
    elif isinstance(inputs.solver, optx.AbstractRootFinder):
        residual, aux = inputs.fn(z, inputs.args)
    else:
        # Least squares and minimisation: R is a gradient of fn, evaluated inside.
        residual, aux = rewrite_fn(z, None, tuple(inputs)), None
    return residual, eqx.filter(aux, eqx.is_inexact_array)


@_implicit.def_jvp
def _implicit_jvp(primals, tangents):
    primal_fn, rewrite_fn, inputs, inverse, probe = primals
    _, _, t_inputs, _, t_probe = tangents
    value, extras = _implicit(primal_fn, rewrite_fn, inputs, inverse, probe)

    # The fixed point depends on what fn sees, not on where the solver started.
    t_theta = (t_inputs.fn, t_inputs.args)
    still = jtu.tree_map(lambda t: t is None, t_theta, is_leaf=_is_none)
    fixed, theta = eqx.partition((inputs.fn, inputs.args), still, is_leaf=_is_none)
    zero_extras = jtu.tree_map(lambda _: None, extras)
    probing = None
    if probe is not None and jtu.tree_leaves(t_probe):
        materialise = lambda t, p: jnp.zeros_like(p) if t is None else t
        t_probe = jtu.tree_map(materialise, t_probe, probe, is_leaf=_is_none)
        probing = (probe, t_probe)
    if probing is None and not jtu.tree_leaves(t_theta):
        return (value, extras), (jtu.tree_map(lambda _: None, value), zero_extras)

    def evaluate(z: PyTree, theta: PyTree) -> tuple[PyTree, PyTree]:
        fn, args = eqx.combine(theta, fixed)
        return _residual(rewrite_fn, inputs._replace(fn=fn, args=args), z)

    # One evaluation; everything below is made of its pull-back.
    (residual, aux), pull = jax.vjp(evaluate, value, theta)
    t_value, t_aux = _tangents(
        inverse,
        pull,
        (residual, aux),
        eqx.filter((value, inputs.fn, inputs.args), eqx.is_inexact_array),
        t_theta,
        probing,
    )
    return (value, extras), (t_value, zero_extras._replace(aux=t_aux))


def _tangents(
    inverse: AbstractInverse,
    pull: Callable,
    outputs: tuple[PyTree, PyTree],
    point: PyTree,
    t_theta: PyTree,
    probe: tuple[BackwardStats, BackwardStats] | None,
) -> tuple[PyTree, PyTree]:
    """ż and the tangent of aux, as one linear solve that is transposed by `pull`.

    With C = ∂aux/∂(z, θ), and one more identity block for the probe, the system is

        | A    B    0 |  | ż |     | 0 |
        | 0    I    0 |  | d |  =  | θ̇ |
        | −C_z −C_θ I |  | ȧ |     | 0 |

    so that its transposed solve has all that a backward pass computes: the right-hand
    side z̄ + C_zᵀ ā, the solve with Aᵀ, and one product for the cotangent of θ. In the
    block of the probe it returns the statistics instead of the cotangent.
    """
    residual, aux = outputs
    no_residual, no_aux = _tree.zeros_like(residual), _tree.zeros_like(aux)
    stats, t_probe = (None, None) if probe is None else probe

    def pull_residual(ct: PyTree) -> tuple[PyTree, PyTree]:
        z, d = pull((ct, no_aux))
        return inverse.product(z, ct), d

    adjoint = lambda ct: pull_residual(ct)[0]
    operator = _transpose(adjoint, residual)
    push_theta = _transpose(lambda ct: pull_residual(ct)[1], residual)
    push = _transpose(pull_residual, residual)
    push_aux = _transpose(lambda ct: pull((no_residual, ct)), aux)
    if not jtu.tree_leaves(aux):
        push_aux = lambda _: aux

    def matvec(v: PyTree) -> PyTree:
        z, d, a, p = v
        a = jtu.tree_map(jnp.subtract, a, push_aux((z, d)))
        out = (push((z, d)), d, a, p)
        # For the derivative of this derivative, by the same rule as `origin` below.
        one = 1 + _linear_zero(point)
        return jtu.tree_map(lambda x: x * one.astype(x.dtype), out)

    def solve(_: Callable, b: PyTree) -> PyTree:
        r, d, a, p = b
        rhs = jtu.tree_map(jnp.subtract, r, push_theta(d))
        z = inverse.solve(operator, rhs, False)[0]
        return z, d, jtu.tree_map(jnp.add, a, push_aux((z, d))), p

    def transposed(_: Callable, ct: PyTree) -> PyTree:
        z, d, a, p = ct
        if jtu.tree_leaves(a):
            z = jtu.tree_map(jnp.add, z, pull((no_residual, a))[0])
        adjoint_state, entries = inverse.solve(adjoint, z, True, stats is not None)
        _, moved = pull((_tree.negative(adjoint_state), a))
        if stats is not None:
            p = stats.record(**entries)
        return adjoint_state, jtu.tree_map(jnp.add, d, moved), a, p

    # JAX transposes the solve only if every part of its right-hand side is a tangent.
    origin = _linear_zero((t_theta, t_probe))
    zero = lambda x: jtu.tree_map(lambda t: t + origin.astype(t.dtype), x)
    rhs = zero((no_residual, t_theta, no_aux, t_probe))
    z, _, a, _ = lax.custom_linear_solve(matvec, rhs, solve, transposed)
    return z, a


def _transpose(linear: Linear, example: PyTree) -> Linear:
    # Made when called: reverse mode never asks for it outside `matvec`.
    return lambda ct: jax.linear_transpose(linear, example)(ct)[0]


def _linear_zero(t: PyTree) -> Array:
    """0, as a linear function of all leaves of t: the sum of none of their entries."""
    parts = [jnp.sum(jnp.atleast_1d(leaf)[:0]) for leaf in jtu.tree_leaves(t)]
    return _tree.total(parts)


def _is_none(x: Any) -> bool:
    return x is None
