"""Gradients by the implicit function theorem, and what replaces the inverse in it.

At R(z, θ) = 0 (for a fixed point R = z − f(z, θ)) the tangents satisfy

    A ż = −B θ̇,        A = ∂R/∂z,  B = ∂R/∂θ .

One custom JVP rule serves this adjoint and those that approximate A⁻¹; they differ
only in the `AdjointSolve` that stands for it. The rule is linear in θ̇ and
transposable, so that forward mode, reverse mode and their compositions come from it.
"""

import dataclasses
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
from .._problem import Problem, Solved
from .._types import Flags
from ..linear import GMRES
from ..linear._base import AbstractIterative
from ..solvers._drive import drive
from ._base import AbstractAdjoint
from ._detach import detach
from ._forward_products import transpose
from ._inverse import AdjointSolve, LinearSolve, negated
from ._shield import report, rescued, safe_point, silence, silence_aux
from ._stats import BackwardStats, check_probe


class ImplicitAdjoint(AbstractAdjoint):
    r"""The exact gradient of the fixed point, by the implicit function theorem.

    $$ \dot z^* = (I - J)^{-1}\, \partial_\theta f\, \dot\theta, \qquad
       \bar\theta = (\partial_\theta f)^\top (I - J)^{-\top}\, \bar z, \qquad
       J = \partial_z f(z^*, \theta) $$

    **Cost:** one linearisation of f at z*, the Jacobian products of the linear solve,
    and one more product. **Memory:** one linearisation of f, and what the linear
    solver keeps; nothing grows with the number of forward steps.

    Forward and reverse mode, and any composition of them. The gradient of `aux` is
    exact too, from the same linearisation.

    λ = (I − J)⁻ᵀ z̄ itself is the gradient with respect to a zero added to f. Given back
    as `initial`, it spares the next backward pass most of its products:

        def loss(args, zero, guess):
            adjoint = deqjax.ImplicitAdjoint(initial=guess)
            g = lambda z, args: f(z, args) + zero
            return l(deqjax.fixed_point(g, z0, args, adjoint=adjoint).value)

        gradient, guess = jax.grad(loss, argnums=(0, 1))(args, zero, guess)

    Functions in f with a `jax.custom_vjp` of their own (fused kernels) are pulled back
    by it. Forward mode and second derivatives then need a backward rule that JAX can
    transpose, and say so where it cannot.

    **Not converged:** where z* is not a fixed point, the formula is evaluated where it
    does not hold, with an error of the order of the residual (`sol.result`, and
    `forward_residual` of the probe). A backward solve that fails never throws: it shows
    in the probe, and `on_failure` says what it returns. Of a problem whose z* or λ is
    not finite, though what f and the loss gave it was, nothing is known: its part of
    the gradient is 0, so that it does not spoil those of its batch-mates, and
    `converged` is 0. (For this, f has to be finite at the start.) Where z* is finite,
    but f or its Jacobian there is not, this holds in solves with `batch_ndim`, for two
    more linearisations in that case; the lanes of a `jax.vmap` know nothing of one
    another, and one of them makes the sum over all NaN.

    Args:
        linear_solver: any lineax solver; by default `deqjax.linear.GMRES()`. One of
            `deqjax.linear` takes over the `batch_ndim` of the forward solver.
        initial: where the linear solve of a backward pass starts, like z*: the λ of an
            earlier one, say (see above). For solvers that take a start; it changes the
            number of products, not the answer.
        probe: a `BackwardStats` whose gradient is the record of the backward pass.
        on_failure: what a linear solve that failed returns for the problems that did:
            `"keep"` its best iterate, `"jfb"` the right-hand side, as if J were 0 (for
            fixed points alone), or `"nan"`, which also lets a z* that is not finite
            show, and spoils the gradient of what the problems share.

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
    initial: PyTree = eqx.field(default=None, kw_only=True)
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
        check_probe(self.probe)
        if self.on_failure not in ("keep", "nan", "jfb"):
            raise ValueError(
                f'`on_failure` must be "keep", "nan" or "jfb"; got {self.on_failure!r}.'
            )

    def solve(self, problem: Problem) -> Solved:
        k, tags = problem.batch_ndim, problem.tags
        linear_solver = _of_batch(self.linear_solver, k)
        if isinstance(problem.solver, optx.AbstractFixedPointSolver):
            # Given for J − I; the system is one with I − J.
            tags = negated(tags)
        elif self.on_failure == "jfb":
            raise ValueError(
                '`on_failure="jfb"` replaces I − J by I and so needs a fixed-point '
                f"problem; got one for {type(problem.solver).__name__}. Use "
                '"keep" or "nan".'
            )
        initial = self.initial
        if initial is not None:
            _check_like(initial, problem.y0)
            initial = lax.stop_gradient(initial)
        inverse = LinearSolve(
            batch_ndim=k,
            solver=linear_solver,
            tags=tags,
            on_failure=self.on_failure,
            initial=initial,
        )
        return solve_implicitly(problem, inverse, self.probe)


def _of_batch(
    solver: lx.AbstractLinearSolver | None, batch_ndim: int
) -> lx.AbstractLinearSolver:
    """The linear solver, for as many systems as the forward solver has problems."""
    solver = GMRES() if solver is None else solver
    if not isinstance(solver, AbstractIterative) or solver.batch_ndim == batch_ndim:
        return solver
    if solver.batch_ndim != 0:
        raise ValueError(
            f"`linear_solver` has batch_ndim={solver.batch_ndim}, but the problems of "
            f"the forward solve have batch_ndim={batch_ndim}: their entries are not "
            "independent beyond that. Leave `batch_ndim` of the linear solver away."
        )
    return dataclasses.replace(solver, batch_ndim=batch_ndim)


def _check_like(initial: PyTree, z: PyTree) -> None:
    bare = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    want, got = (jtu.tree_map(bare, t) for t in (z, initial))
    if eqx.tree_equal(want, got) is not True:
        raise ValueError(
            "`initial`, a start for the adjoint system, must have the structure, "
            f"shapes and dtypes of the iterate; the iterate has {want}, `initial` has "
            f"{got}."
        )


def solve_implicitly(
    problem: Problem, inverse: AdjointSolve, probe: BackwardStats | None
) -> Solved:
    """Solve, with the implicit rule for a derivative."""
    return detach(_implicit(problem, inverse, probe))


@eqx.filter_custom_jvp
def _implicit(
    problem: Problem, inverse: AdjointSolve, probe: BackwardStats | None
) -> Solved:
    return jtu.tree_map(jnp.asarray, drive(problem))


def _residual(problem: Problem, z: PyTree) -> tuple[PyTree, PyTree]:
    """R(z) and the differentiable part of aux, from one evaluation of fn."""
    if isinstance(problem.solver, optx.AbstractFixedPointSolver):
        f, aux = problem.fn(z, problem.args)
        residual = jtu.tree_map(jnp.subtract, z, f)
    elif isinstance(problem.solver, optx.AbstractRootFinder):
        residual, aux = problem.fn(z, problem.args)
    else:
        # Least squares and minimisation: R is a gradient of fn, evaluated inside.
        residual, aux = problem.rewrite_fn(z, None, tuple(problem)[:-1]), None
    return residual, eqx.filter(aux, eqx.is_inexact_array)


@_implicit.def_jvp
def _implicit_jvp(primals, tangents):
    problem, inverse, probe = primals
    t_problem, _, t_probe = tangents
    solved = _implicit(problem, inverse, probe)
    value, constant = solved.value, jtu.tree_map(lambda _: None, solved)

    # The fixed point depends on what fn sees, not on where the solver started.
    t_theta = (t_problem.fn, t_problem.args)
    still = jtu.tree_map(lambda t: t is None, t_theta, is_leaf=_is_none)
    fixed, theta = eqx.partition((problem.fn, problem.args), still, is_leaf=_is_none)
    probing = None
    if probe is not None and jtu.tree_leaves(t_probe):
        materialise = lambda t, p: jnp.zeros_like(p) if t is None else t
        t_probe = jtu.tree_map(materialise, t_probe, probe, is_leaf=_is_none)
        probing = (probe, t_probe)
    if probing is None and not jtu.tree_leaves(t_theta):
        return solved, constant

    def evaluate(z: PyTree, theta: PyTree) -> tuple[PyTree, PyTree]:
        fn, args = eqx.combine(theta, fixed)
        return _residual(problem._replace(fn=fn, args=args), z)

    inverse = inverse.after(solved.state)
    at, live = value, None
    if inverse.shields:
        live = _tree.all_finite(value, inverse.batch_ndim)
        at = safe_point(value, problem.y0, live)
    # One evaluation; everything below is made of its pull-back.
    (residual, aux), pull = jax.vjp(evaluate, at, theta)
    if live is not None:
        live = live & _tree.all_finite(residual, inverse.batch_ndim)

    def linearise(live: Flags, sound: Flags) -> Callable:
        return jax.vjp(evaluate, safe_point(at, problem.y0, live, sound), theta)[1]

    t_value, t_aux = _tangents(
        inverse,
        pull,
        (residual, aux),
        eqx.filter((at, problem.fn, problem.args), eqx.is_inexact_array),
        t_theta,
        probing,
        (live, eqx.filter(solved.aux, eqx.is_inexact_array), linearise),
    )
    return solved, constant._replace(value=t_value, aux=t_aux)


def _tangents(
    inverse: AdjointSolve,
    pull: Callable,
    outputs: tuple[PyTree, PyTree],
    point: PyTree,
    t_theta: PyTree,
    probe: tuple[BackwardStats, BackwardStats] | None,
    shield: tuple[Flags | None, PyTree, Callable],
) -> tuple[PyTree, PyTree]:
    """ż and the tangent of aux, as one linear solve that is transposed by `pull`.

    With C = ∂aux/∂(z, θ), and one more identity block for the probe, the system is

        | A    B    0 |  | ż |     | 0 |
        | 0    I    0 |  | d |  =  | θ̇ |
        | −C_z −C_θ I |  | ȧ |     | 0 |

    so that its transposed solve has all that a backward pass computes: the right-hand
    side z̄ + C_zᵀ ā, the solve with Aᵀ, and one product for the cotangent of θ. In the
    block of the probe it returns the statistics instead of the cotangent. Problems that
    are not live have ż = 0 and take no part.
    """
    residual, aux = outputs
    no_residual, no_aux = _tree.zeros_like(residual), _tree.zeros_like(aux)
    stats, t_probe = (None, None) if probe is None else probe
    live, seen, linearise = shield

    pull_residual = lambda ct: pull((ct, no_aux))
    adjoint = lambda ct: pull((ct, no_aux))[0]
    operator = transpose(adjoint, residual, point)
    push_theta = transpose(lambda ct: pull_residual(ct)[1], residual, point)
    push = transpose(pull_residual, residual, point)
    push_aux = transpose(lambda ct: pull((no_residual, ct)), aux, point)
    if not jtu.tree_leaves(aux):
        push_aux = lambda _: aux

    def matvec(v: PyTree) -> PyTree:
        z, d, a, p = v
        a = jtu.tree_map(jnp.subtract, a, push_aux((z, d)))
        out = (push((z, d)), d, a, p)
        # For the derivative of this derivative, for the same reason as `_joined`.
        one = 1 + _linear_zero(point)
        return jtu.tree_map(lambda x: x * one.astype(x.dtype), out)

    def solve(_: Callable, b: PyTree) -> PyTree:
        r, d, a, p = b
        rhs = jtu.tree_map(jnp.subtract, r, push_theta(d))
        z = silence(live, inverse.solve(operator, silence(live, rhs), False)[0])
        moved = silence_aux(live, push_aux((z, d)), seen)
        return z, d, jtu.tree_map(jnp.add, a, moved), p

    def transposed(_: Callable, ct: PyTree) -> PyTree:
        z, d, a, p = ct
        z, a = silence(live, z), silence_aux(live, a, seen)
        if jtu.tree_leaves(a):
            z = jtu.tree_map(jnp.add, z, silence(live, pull((no_residual, a))[0]))
        adjoint_state, entries = inverse.solve(adjoint, z, True, stats is not None)
        cts = (_tree.negative(adjoint_state), a)
        moved = pull(cts)[1]
        if live is not None and live.ndim > 0 and jtu.tree_leaves(moved):
            moved = rescued(moved, cts, live, linearise)
        if stats is not None:
            forward = _tree.norm(lax.stop_gradient(residual), inverse.batch_ndim)
            entries["forward_residual"] = forward
            p = stats.record(**report(live, entries))
        return adjoint_state, jtu.tree_map(jnp.add, d, moved), a, p

    # JAX transposes a solve only if every part of its right-hand side is a tangent:
    # here of the right-hand side, and of that of the transposed solve.
    rhs = _joined((no_residual, t_theta, no_aux, t_probe), (t_theta, t_probe))
    out = lax.custom_linear_solve(matvec, rhs, solve, transposed)
    z, _, a, _ = _joined(out, out)
    return z, a


def _joined(x: PyTree, t: PyTree) -> PyTree:
    """x, every leaf of it made a linear function of all leaves of t."""
    origin = _linear_zero(t)
    return jtu.tree_map(lambda leaf: leaf + origin.astype(leaf.dtype), x)


def _linear_zero(t: PyTree) -> Array:
    """0, as a linear function of all leaves of t: the sum of none of their entries."""
    parts = [jnp.sum(jnp.atleast_1d(leaf)[:0]) for leaf in jtu.tree_leaves(t)]
    return _tree.total(parts)


def _is_none(x: Any) -> bool:
    return x is None
