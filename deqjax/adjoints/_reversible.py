"""The gradient of the reversible iteration, by running it backwards."""

import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import PyTree

from .. import _tree
from .._upstream import Extras, Inputs, unvmap_any
from ..solvers._base import check_count
from ..solvers._reversible import Reversible
from ._backwards import Backwards, add
from ._cotangents import materialise
from ._half_steps import HalfStepLoop, is_unrolled, sealed
from ._loop import SolverLoop, as_inputs, detach, solve
from ._stats import BackwardStats, check_probe


class ReversibleAdjoint(optx.AbstractAdjoint):
    r"""The exact gradient of the steps taken, by undoing them one after the other.

    Backwards from (y_N, z_N), with z̄ the cotangent of the answer and ȳ = 0, twice per
    step (a, b being the two states, exchanged at each half step):

    $$ a = \frac{b' - \beta f(a')}{1-\beta}, \quad b = a', \qquad
       \bar a = (1-\beta)\, \bar b', \quad
       \bar b = \bar a' + (\partial_z f(b))^\top \beta \bar b', \quad
       \bar\theta \mathrel{+}= (\partial_\theta f(b))^\top \beta \bar b' $$

    The evaluation that rebuilds a state is the one that is pulled back. The gradient
    for z₀ is ȳ₀ + z̄₀.

    **Exact** to the rounding of one backpropagation wherever the drift is 0: the
    reconstruction ends at the known start, and the largest difference from it is the
    drift, which every backward pass measures. With the exact arithmetic of
    `deqjax.Reversible` it is 0 at every depth if f returns the same bits whenever it is
    given the same input. A drift above the tolerance never passes silently.

    **Anchors** are for functions that do not repeat bit for bit, and for float
    arithmetic: the pair (y, z) is kept every K steps, the reconstruction starts anew
    from it, and the drift is measured over each segment.

    **Cost:** two evaluations with pull-back per step; in the pull-backs, all of f but
    its large products of matrices and its convolutions is computed once more (these
    too, where they are of 16 bits), so that XLA rounds the evaluations as it did
    forwards. **Memory:** 5 copies of z, one
    pull-back of f and one gradient of the parameters, whatever the number of steps;
    with exact arithmetic log₂ q bits per entry of z and evaluation; with anchors 2/K
    copies of z per step. Static solves of up to 8 steps of maps with convolutions are
    unrolled: their memory grows over those steps.

    Reverse mode only, once.

    Args:
        anchors: K, the number of steps between anchors; `"auto"`: as many as amplify
            rounding by no more than what leaves half of a dtype's digits; None: none,
            but in static solves of up to 8 steps of maps with convolutions, which
            are unrolled, one at every step.
        on_drift: what the gradient is if the drift of any problem exceeds the
            tolerance: `"nan"`, `"raise"` an error, or `"recompute"` by backpropagation
            through the steps, with checkpoints (in memory of the order of √N states).
        drift_tol: the drift to accept, relative to the largest entry of the states.
            None: 0 for exact arithmetic without anchors (see there); else
            min(8 ε (1−β)^(−2K), √ε), ε being the precision of the states' dtype and K
            the steps between anchors, or of the solve.
        probe: a `BackwardStats` whose gradient is the record of the backward pass; the
            entry that applies is `drift`.

    Raises:
        ValueError, TypeError: if the solver is not `deqjax.Reversible`, or an argument
            is not valid.

    Example:
        >>> import deqjax, jax, jax.numpy as jnp
        >>> f = lambda z, a: 0.5 * z + a
        >>> solver = deqjax.Reversible(rtol=None, atol=None, beta=0.5)
        >>> solve = lambda a: deqjax.fixed_point(f, jnp.zeros(()), a, solver=solver,
        ...     max_steps=1).value
        >>> float(jax.grad(solve)(3.0))  # z₁ = a/2 + (a/2)/4
        0.625

    References:
        S. McCallum, K. Arora, J. Foster (2025), Reversible deep equilibrium models,
        doi:10.48550/arXiv.2509.12917.
    """

    anchors: int | Literal["auto"] | None = eqx.field(
        default=None, kw_only=True, static=True
    )
    on_drift: Literal["nan", "raise", "recompute"] = eqx.field(
        default="nan", kw_only=True, static=True
    )
    drift_tol: float | None = eqx.field(default=None, kw_only=True, static=True)
    probe: BackwardStats | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        if self.anchors is not None and self.anchors != "auto":
            check_count("anchors", self.anchors, 1)
        if self.on_drift not in ("nan", "raise", "recompute"):
            raise ValueError(
                '`on_drift` must be "nan", "raise" or "recompute"; got '
                f"{self.on_drift!r}."
            )
        if self.drift_tol is not None and not self.drift_tol >= 0:
            raise ValueError(
                f"`drift_tol` must be a number ≥ 0 or None; got {self.drift_tol!r}."
            )
        check_probe(self.probe)

    def apply(
        self,
        primal_fn: Callable,
        rewrite_fn: Callable,
        inputs: PyTree,
        tags: frozenset[object],
    ) -> PyTree:
        named = as_inputs(inputs)
        if not isinstance(named.solver, Reversible):
            raise ValueError(
                "`ReversibleAdjoint` undoes the steps of `deqjax.Reversible` and so "
                f"needs it as the solver; got {type(named.solver).__name__}. Use "
                "`solver=deqjax.Reversible()`, or `deqjax.ImplicitAdjoint()`."
            )
        if named.max_steps is None:
            raise ValueError(
                "`ReversibleAdjoint` needs a finite `max_steps`; got None."
            )
        theta = (named.fn, named.y0, named.args, self.probe)
        rest = named._replace(fn=None, y0=None, args=None)
        every, unrolled = self._every(named), is_unrolled(named)
        if unrolled and every is None:
            every = 1
        plan = _Plan(unrolled, every, self.on_drift, self.drift_tol)
        value, extras = _reversible(theta, rest, plan, primal_fn)
        return value, tuple(detach(Extras(*extras)))

    def _every(self, inputs: Inputs) -> int | None:
        if self.anchors != "auto":
            return self.anchors
        growth = 1 / (1 - _largest_beta(inputs.solver))
        allowed = 1 / math.sqrt(_precision(inputs.y0))
        return max(1, math.floor(math.log(allowed) / (2 * math.log(growth)) / 2))


class _Plan(eqx.Module):
    """How the half steps are run, and what a backward pass does about drift."""

    unrolled: bool = eqx.field(static=True)
    every: int | None = eqx.field(static=True)
    on_drift: str = eqx.field(static=True)
    drift_tol: float | None = eqx.field(static=True)

    def tolerance(self, inputs: Inputs) -> float:
        """The drift to accept, relative to the size of the states."""
        if self.drift_tol is not None:
            return self.drift_tol
        solver: Reversible = inputs.solver
        if solver.arithmetic == "exact" and self.every is None:
            return 0.0
        eps = _precision(inputs.y0)
        steps = inputs.max_steps if self.every is None else self.every
        log_growth = -2 * steps * math.log(1 - _largest_beta(solver))
        return math.exp(min(math.log(8 * eps) + log_growth, 0.5 * math.log(eps)))


def _largest_beta(solver: Reversible) -> float:
    betas = solver.beta if isinstance(solver.beta, tuple) else (solver.beta,)
    return max(float(beta) for beta in betas)


def _precision(y: PyTree) -> float:
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jtu.tree_leaves(y))


@eqx.filter_custom_vjp
def _reversible(
    theta: PyTree, rest: Inputs, plan: _Plan, primal_fn: Callable
) -> PyTree:
    fn, y0, args, _ = theta
    inputs = rest._replace(fn=fn, y0=y0, args=args)
    value, extras = solve(primal_fn, inputs, HalfStepLoop(inputs, plan.unrolled, False))
    return value, tuple(extras)


@_reversible.def_fwd
def _reversible_fwd(perturbed, theta, rest, plan, primal_fn):
    fn, y0, args, _ = theta
    inputs = rest._replace(fn=fn, y0=y0, args=args)
    loop = HalfStepLoop(inputs, plan.unrolled, True, plan.every)
    value, extras = solve(primal_fn, inputs, loop)
    return (value, tuple(extras)), loop.trail


@_reversible.def_bwd
def _reversible_bwd(trail, cotangents, perturbed, theta, rest, plan, primal_fn):
    fn, y0, args, probe = theta
    p_fn, p_y0, p_args, p_probe = perturbed
    inputs: Inputs = rest._replace(fn=fn, y0=y0, args=args)
    moving, fixed = eqx.partition((fn, args), (p_fn, p_args))

    def evaluate(z: PyTree, moving: PyTree) -> tuple[PyTree, PyTree]:
        fn, args = eqx.combine(moving, fixed)
        f, aux = sealed(fn)(z, args)
        return f, eqx.filter(aux, eqx.is_inexact_array)

    ct_value, ct_extras = cotangents
    traced, (_, no_aux) = jax.make_jaxpr(evaluate, return_shape=True)(y0, moving)
    no_aux = _tree.zeros_like(no_aux)
    if not traced.effects:
        # Forwards f keeps no activations. If it did here, XLA would fuse it, and so
        # round it, differently: the pull-back computes them once more.
        evaluate = jax.checkpoint(evaluate, policy=_is_heavy)
    ct_aux = eqx.filter(Extras(*ct_extras).aux, eqx.is_inexact_array)
    has_aux = bool(jtu.tree_leaves(ct_aux))
    ct_value, ct_aux = materialise((ct_value, ct_aux), (y0, no_aux))

    back = Backwards(
        inputs,
        plan.unrolled,
        plan.every,
        trail,
        evaluate,
        moving,
        ct_aux if has_aux else None,
    )
    final, scale = back.run(ct_value)
    g_y0 = add(final.ct_a, final.ct_b)
    gradient = jtu.tree_map(lambda g, p: g.astype(p.dtype), final.gradient, moving)

    bad = ~(final.drift <= plan.tolerance(inputs) * scale)
    if plan.on_drift == "recompute":

        def recompute() -> tuple[PyTree, PyTree]:
            def run(y0: PyTree, moving: PyTree) -> tuple[PyTree, PyTree]:
                fn, args = eqx.combine(moving, fixed)
                again = inputs._replace(fn=fn, y0=y0, args=args)
                loop = SolverLoop(again, "checkpointed")
                value, extras = solve(primal_fn, again, loop)
                return value, eqx.filter(extras.aux, eqx.is_inexact_array)

            _, pull = jax.vjp(run, y0, moving)
            return pull((ct_value, ct_aux))

        g_y0, gradient = lax.cond(
            unvmap_any(jnp.any(bad)), recompute, lambda: (g_y0, gradient)
        )
    elif plan.on_drift == "nan":
        spoil = lambda t: jnp.where(jnp.any(bad), jnp.nan, t)
        gradient = jtu.tree_map(spoil, gradient)
        nan = jtu.tree_map(lambda t: jnp.full_like(t, jnp.nan), g_y0)
        g_y0 = _tree.where(bad, nan, g_y0)
    else:
        g_y0, gradient = eqx.error_if((g_y0, gradient), jnp.any(bad), _DRIFTED)

    if not any(jtu.tree_leaves(p_y0)):
        g_y0 = jtu.tree_map(lambda _: None, g_y0)
    g_probe = jtu.tree_map(lambda _: None, probe)
    if any(jtu.tree_leaves(p_probe)):
        g_probe = probe.record(drift=final.drift)
    g_fn, g_args = gradient
    return g_fn, g_y0, g_args, g_probe


_HEAVY = {
    *("fft", "sort", "top_k", "cholesky", "lu", "qr", "eigh", "svd"),
    *("triangular_solve", "tridiagonal_solve", "pallas_call", "ffi_call", "ppermute"),
    *("psum", "psum2", "psum_invariant", "pmax", "all_gather", "all_gather_invariant"),
    *("all_to_all", "reduce_scatter"),
}
# Multiplications of a matrix product.
_SMALL = 1 << 15


def _is_heavy(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Whether a result is too dear to be computed once more, and in memory anyhow.

    Small matrix products, those of a matrix and one vector, and what is rounded to 16
    bits are not: XLA computes what follows from numbers that it has not rounded yet,
    unless the results are kept.
    """
    name = primitive.name
    if name not in ("dot_general", "conv_general_dilated"):
        return name in _HEAVY
    if any(operand.dtype.itemsize < 4 for operand in operands):
        return False
    if name == "conv_general_dilated":
        return True
    (contracted, _), (batch, _) = params["dimension_numbers"]
    shape = operands[0].shape
    shared = math.prod(shape[i] for i in batch)
    inner = math.prod(shape[i] for i in contracted)
    rows, columns = (math.prod(o.shape) // max(shared * inner, 1) for o in operands)
    return min(rows, columns) > 1 and shared * rows * columns * inner >= _SMALL


_DRIFTED = (
    "The reversible iteration was not undone exactly: the reconstructed start differs "
    "from the known one by more than `drift_tol`, so that the gradient is not that of "
    "the steps taken. Either `fn` does not return the same bits for the same input "
    "(randomness that is not fixed by a key, or a program compiled differently in the "
    'two passes: use `ReversibleAdjoint(anchors="auto")` or `on_drift="recompute"`), '
    "or the solve is too deep for float arithmetic (use "
    '`Reversible(arithmetic="exact")`).'
)
