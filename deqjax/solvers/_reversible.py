"""The coupled iteration of reversible DEQs, which can be run backwards.

One step of the scheme is a half step taken twice, with the roles of the two states
exchanged in between:

    (a, b)  ->  (b, (1 − β) a + β f(b)),      (a, b) = (y_n, z_n) at whole steps,

and a half step is undone by  a = (b' − β f(a')) / (1 − β),  b = a'.
"""

from dataclasses import field
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._types import Args, Aux, Counts, Map, Options, Reals, Tolerance, Y
from .._upstream import unvmap_any
from ._arithmetic import (
    AbstractArithmetic,
    ExactArithmetic,
    FloatArithmetic,
    fraction,
    overflowed,
    with_tangent_of,
)
from ._base import AbstractSolver, Progress, check_beta, statistics


class ReversibleState(eqx.Module):
    """The companion y of the iterate z, and the record of the solve.

    Attributes:
        companion: y.
        carriers: with exact arithmetic, y and z as integers; else None.
        unit: with exact arithmetic, the unit of the grid per problem; else None.
        progress: the record; its value is the pair (y, z) of the best iterate in a
            tested solve, and None in a static one, where the residual is that of the
            iterate evaluated last.
        num_evals: evaluations of the map.
    """

    companion: PyTree
    carriers: PyTree
    unit: Any
    progress: Progress
    num_evals: Array


class Reversible(AbstractSolver[Y, Aux, ReversibleState]):
    r"""The reversible iteration of RevDEQ: two coupled, damped Picard iterations.

    $$ y_{n+1} = (1-\beta)\, y_n + \beta\, f(z_n), \qquad
       z_{n+1} = (1-\beta)\, z_n + \beta\, f(y_{n+1}), \qquad y_0 = z_0 $$

    | symbol | meaning |
    |---|---|
    | $z_n$ | iterate; the answer is $z_N$ |
    | $y_n$ | its companion |
    | $\beta$ | weight on $f$, 0 < β < 1 |

    Each step can be undone, so that `deqjax.ReversibleAdjoint` (the default adjoint
    of this solver) needs no trajectory to differentiate the steps taken.

    `arithmetic="exact"` keeps y and z as integers on a grid (32 bits; 64 for float64
    states) chosen per problem from the scale of z₀ and f(z₀): 2⁻²⁶ (2⁻⁵⁶) of it, with
    headroom of 2⁵ (2⁷). Undoing a step then restores every bit, at every depth, if f
    returns the same bits for the same input; the drift of `deqjax.BackwardStats`
    tells. `"float"` computes in the dtype of the state; undoing a step divides its
    rounding error by 1 − β, twice per step, which destroys the gradient of deep solves.

    **Cost:** two evaluations per step, one less in the step that ends a tested solve.
    **Memory:** 3 copies of z, 5 in a tested solve; when differentiated, exact
    arithmetic keeps log₂ q bits per entry of z and evaluation, 1 − β = p/q.

    **Converges** for a map of Lipschitz constant k if |1 − β| + βk < 1, with that
    factor per step or better; always for a contraction. **Fails** visibly otherwise:
    `nonfinite`; `nonlinear_max_steps_reached`; `nonlinear_divergence` and
    `stats["overflow"]` if an entry leaves the grid.

    Stops at the first z_n with ‖f(z_n) − z_n‖ ≤ atol + rtol ‖f(z_n)‖. With
    `rtol=None, atol=None` exactly `max_steps` steps are taken; the value is z_N and
    the residual that of y_N, which was evaluated last.

    Args:
        rtol: tolerance relative to ‖f(z)‖, or None.
        atol: absolute tolerance, or None.
        beta: weight on f, 0 < beta < 1; for exact arithmetic 1 − β must be a fraction
            p/q with q ≤ 32 (1/2, 3/4, 4/5, 7/8, 9/10, … for β). A tuple of values
            lets `options={"beta": i}` choose one at run time, without recompiling.
        arithmetic: `"exact"` or `"float"`.
        min_steps: steps before which the test cannot pass.
        batch_ndim: number of leading axes that index independent problems.

    Raises:
        ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> solver = deqjax.Reversible(rtol=1e-5, atol=1e-6, beta=0.8)
        >>> f = lambda z, _: jnp.cos(z)
        >>> sol = deqjax.fixed_point(f, jnp.ones(()), solver=solver)
        >>> round(float(sol.value), 3)
        0.739

    References:
        S. McCallum, K. Arora, J. Foster (2025), Reversible deep equilibrium models,
        doi:10.48550/arXiv.2509.12917.
    """

    rtol: Tolerance = 1e-4
    atol: Tolerance = 1e-6
    beta: float | tuple[float, ...] = field(default=0.5, kw_only=True)
    arithmetic: Literal["exact", "float"] = field(default="exact", kw_only=True)
    min_steps: int = field(default=0, kw_only=True)
    batch_ndim: int = field(default=0, kw_only=True)

    known_options: ClassVar[frozenset[str]] = AbstractSolver.known_options | {"beta"}

    def __check_init__(self):
        if self.arithmetic not in ("exact", "float"):
            raise ValueError(
                f'`arithmetic` must be "exact" or "float"; got {self.arithmetic!r}.'
            )
        betas = self.beta if isinstance(self.beta, tuple) else (self.beta,)
        if not betas:
            raise ValueError("`beta` must hold at least one value; got ().")
        for beta in betas:
            check_beta(beta, below=1.0)
            if self.arithmetic == "exact":
                if isinstance(beta, Array):
                    raise ValueError(
                        '`beta` must be a Python number for `arithmetic="exact"`, or a '
                        'tuple of them chosen from by `options={"beta": i}`; got an '
                        "array."
                    )
                fraction(beta)

    def calculus(self, options: Options) -> AbstractArithmetic:
        """The arithmetic of the half step, for the β that is asked for."""
        chosen = "beta" in options
        if chosen != isinstance(self.beta, tuple):
            raise ValueError(
                '`options={"beta": i}` chooses from a tuple `beta` of the solver, and '
                f"such a tuple needs it; got beta={self.beta!r} and options "
                f"{sorted(options)}."
            )
        if not isinstance(self.beta, tuple):
            if self.arithmetic == "float":
                return FloatArithmetic(self.beta)
            ratio = fraction(self.beta)
            return ExactArithmetic(
                ratio.numerator, ratio.denominator, ratio.denominator
            )
        i = options["beta"]
        if self.arithmetic == "float":
            return FloatArithmetic(jnp.asarray(self.beta)[i])
        ratios = [fraction(beta) for beta in self.beta]
        p = jnp.array([r.numerator for r in ratios], jnp.int32)[i]
        q = jnp.array([r.denominator for r in ratios], jnp.int32)[i]
        return ExactArithmetic(p, q, max(r.denominator for r in ratios))

    # The interface of optimistix: one call is one whole step

    def init(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: frozenset[object],
    ) -> ReversibleState:
        value, aux_struct = (None, None) if self.static else ((y, y), aux_struct)
        progress = Progress.start(value, y, aux_struct, self.batch_ndim)
        calculus = self.calculus(options)
        unit = calculus.unit(y, y, self.batch_ndim)
        carriers = None
        if self.arithmetic == "exact":
            start = calculus.encode(y, unit)
            carriers = (start, start)
        return ReversibleState(y, carriers, unit, progress, jnp.array(0, jnp.int32))

    def step(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        state: ReversibleState,
        tags: frozenset[object],
    ) -> tuple[Y, ReversibleState, Aux]:
        pair = ((state.companion, y), state.carriers)
        progress = state.progress
        f, aux = fn(y, args)
        unit, pair = self._anchor(options, progress, pair, f, state.unit)
        half = lambda pair, f: self._half(options, pair, f, unit)
        if self.static:
            pair = half(pair, f)
            f, aux = fn(pair[0][1], args)
            progress = self.observe_last(progress, pair[0][1], f)
            counts = progress.counts.at[..., 0].add(1)
            progress = eqx.tree_at(lambda p: p.counts, progress, counts)
            pair = half(pair, f)
            num_evals = state.num_evals + 2
        else:
            before = progress.active(options)
            progress = self.observe(progress, before, pair[0], y, f, aux)
            active = progress.active(options)

            def rest() -> PyTree:
                middle = half(pair, f)
                g, _ = fn(middle[0][1], args)
                return _tree.where(active, half(middle, g), pair)

            # The evaluation that ends the solve is the only one of its step.
            go_on = unvmap_any(jnp.any(active))
            both = (jnp.any(flags).astype(jnp.int32) for flags in (before, active))
            num_evals = state.num_evals + sum(both)
            pair = lax.cond(go_on, rest, lambda: pair)
        (companion, y), carriers = pair
        return y, ReversibleState(companion, carriers, unit, progress, num_evals), aux

    def _anchor(
        self, options: Options, progress: Progress, pair: PyTree, f: PyTree, unit: Any
    ) -> tuple[Any, PyTree]:
        """In the first step, lay the grid for z₀ and f(z₀)."""
        if self.arithmetic == "float":
            return unit, pair
        calculus = self.calculus(options)
        (_, z0), carriers = pair
        first = progress.num_steps == 0
        new = calculus.unit(z0, f, self.batch_ndim)
        start = calculus.encode(lax.stop_gradient(z0), new)
        unit = jnp.where(first, new, unit)
        return unit, (pair[0], _tree.where(first, (start, start), carriers))

    def _half(self, options: Options, pair: PyTree, f: PyTree, unit: Any) -> PyTree:
        """One half step of the states and of their carriers, differentiably."""
        calculus = self.calculus(options)
        (a, b), carriers = pair
        new = calculus.average(a, f)
        if carriers is None:
            return (b, new), None
        exact, _ = calculus.advance(carriers[0], lax.stop_gradient(f), unit)
        value = calculus.decode(exact, unit, new)
        # The derivative of the update, not of its rounding.
        new = jtu.tree_map(with_tangent_of, value, new)
        return (b, new), (carriers[1], exact)

    def observe_last(self, progress: Progress, x: PyTree, f: PyTree) -> Progress:
        """Note the residual of x, evaluated last, in a static loop."""
        x, f = lax.stop_gradient((x, f))
        residual = _tree.norm(_tree.subtract(f, x), self.batch_ndim)
        norm = _tree.norm(f, self.batch_ndim)
        sizes = jnp.stack([residual, norm, residual], -1)
        return eqx.tree_at(lambda p: p.sizes, progress, sizes)

    def terminate(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        state: ReversibleState,
        tags: frozenset[object],
    ) -> tuple[Array, optx.RESULTS]:
        if self.static:
            return jnp.array(False), optx.RESULTS.successful
        done, result = self.verdict(state.progress)
        return done, self._unless_overflowed(state, result)

    def outcome(self, y: Y, state: ReversibleState) -> optx.RESULTS:
        return self._unless_overflowed(state, super().outcome(y, state))

    def _unless_overflowed(
        self, state: ReversibleState, result: optx.RESULTS
    ) -> optx.RESULTS:
        if state.carriers is None:
            return result
        over = jnp.any(overflowed(state.carriers, self.batch_ndim))
        lost = over & (result == optx.RESULTS.nonfinite)
        return optx.RESULTS.where(lost, optx.RESULTS.nonlinear_divergence, result)

    def postprocess(
        self,
        fn: Map,
        y: Y,
        aux: Aux,
        args: Args,
        options: Options,
        state: ReversibleState,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        best = state.progress
        if self.static:
            converged = _tree.all_finite(y, self.batch_ndim)
        else:
            converged = best.converged
            (_, y), aux = best.value, best.aux
        stats = statistics(
            best.residual, best.norm, converged, best.num_steps, state.num_evals
        )
        if state.carriers is not None:
            stats["overflow"] = overflowed(state.carriers, self.batch_ndim)
        return y, aux, stats

    def last_residual(self, y: Y, state: ReversibleState) -> Reals:
        return state.progress.last_residual

    def steps_taken(self, state: ReversibleState) -> Counts:
        return state.progress.num_steps
