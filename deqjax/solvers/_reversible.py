"""The coupled iteration of reversible DEQs, which can be run backwards.

One step of the scheme is a half step taken twice, with the roles of the two states
exchanged in between:

    (a, b)  ->  (b, (1 − β) a + β f(b)),      (a, b) = (y_n, z_n) at whole steps,

and a half step is undone by  a = (b' − β f(a')) / (1 − β),  b = a'.
"""

from dataclasses import field
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._types import Args, Aux, Counts, Map, Options, Reals, Y
from .._upstream import unvmap_any
from ._base import AbstractSolver, Progress, check_beta, statistics


class ReversibleState(eqx.Module):
    """The companion y of the iterate z, and the record of the solve.

    In a tested solve `progress.value` is the pair (y, z) of the best iterate. In a
    static one the record holds the residual of the iterate evaluated last.
    """

    companion: PyTree
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

    **Cost:** two evaluations per step, and one more for the test that ends a tested
    solve. **Memory:** 2 copies of z, 4 in a tested solve.

    **Converges** for a map of Lipschitz constant k if |1 − β| + βk < 1, with that
    factor per step or better; always for a contraction. **Fails** visibly otherwise.

    Stops at the first z_n with ‖f(z_n) − z_n‖ ≤ atol + rtol ‖f(z_n)‖. With
    `rtol=None, atol=None` exactly `max_steps` steps are taken; the value is z_N and
    the residual that of y_N, which was evaluated last.

    Args:
        rtol: tolerance relative to ‖f(z)‖, or None.
        atol: absolute tolerance, or None.
        beta: weight on f, 0 < beta < 1.
        arithmetic: `"float"` computes in the dtype of the state. Undoing a step then
            divides its rounding error by 1 − β, twice per step: see the drift.
        min_steps: steps before which the test cannot pass.
        batch_ndim: number of leading axes that index independent problems.

    Raises:
        ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> solver = deqjax.Reversible(rtol=1e-5, atol=1e-6, beta=0.8)
        >>> sol = deqjax.fixed_point(lambda z, _: jnp.cos(z), jnp.ones(()), solver=solver)
        >>> round(float(sol.value), 3)
        0.739

    References:
        S. McCallum, K. Arora, J. Foster (2025), Reversible deep equilibrium models,
        doi:10.48550/arXiv.2509.12917.
    """

    rtol: float | None = 1e-4
    atol: float | None = 1e-6
    beta: float = field(default=0.5, kw_only=True)
    arithmetic: Literal["float"] = field(default="float", kw_only=True)
    min_steps: int = field(default=0, kw_only=True)
    batch_ndim: int = field(default=0, kw_only=True)

    def __check_init__(self):
        check_beta(self.beta, below=1.0)
        if self.arithmetic not in ("float",):
            raise ValueError(
                f'`arithmetic` must be "float"; got {self.arithmetic!r}.'
            )

    # The half step and its inverse

    def forward_half(self, a: PyTree, f: PyTree) -> PyTree:
        """(1 − β) a + β f."""
        return jtu.tree_map(lambda a, f: (1 - self.beta) * a + self.beta * f, a, f)

    def backward_half(self, b: PyTree, f: PyTree) -> PyTree:
        """The a of `forward_half`, from its result b."""
        return jtu.tree_map(
            lambda b, f: (b - self.beta * f) / (1 - self.beta), b, f
        )

    def pull_half(self, cotangent: PyTree) -> tuple[PyTree, PyTree]:
        """The cotangents of a and f in `forward_half`."""
        scaled = lambda c: jtu.tree_map(lambda t: c * t, cotangent)
        return scaled(1 - self.beta), scaled(self.beta)

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
        return ReversibleState(y, progress, jnp.array(0, jnp.int32))

    def step(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        state: ReversibleState,
        tags: frozenset[object],
    ) -> tuple[Y, ReversibleState, Aux]:
        a, b, progress = state.companion, y, state.progress
        f, aux = fn(b, args)
        if self.static:
            a, b = b, self.forward_half(a, f)
            f, aux = fn(b, args)
            progress = self.observe_last(progress, b, f)
            count = progress.num_steps + 1
            progress = eqx.tree_at(lambda p: p.num_steps, progress, count)
            a, b = b, self.forward_half(a, f)
            return b, ReversibleState(a, progress, state.num_evals + 2), aux
        before = progress.active(options)
        progress = self.observe(progress, before, (a, b), b, f, aux)
        active = progress.active(options)

        def rest() -> tuple[PyTree, PyTree]:
            middle = self.forward_half(a, f)
            g, _ = fn(middle, args)
            pair = (middle, self.forward_half(b, g))
            return _tree.where(active, pair, (a, b))

        # The evaluation that ends the solve is the only one of its step.
        go_on = unvmap_any(jnp.any(active))
        a, b = lax.cond(go_on, rest, lambda: (a, b))
        num_evals = state.num_evals + jnp.any(before) + jnp.any(active)
        return b, ReversibleState(a, progress, num_evals.astype(jnp.int32)), aux

    def observe_last(self, progress: Progress, x: PyTree, f: PyTree) -> Progress:
        """Note the residual of x, evaluated last, in a static loop."""
        x, f = lax.stop_gradient((x, f))
        residual = _tree.norm(_tree.subtract(f, x), self.batch_ndim)
        return eqx.tree_at(
            lambda p: (p.residual, p.last_residual, p.norm),
            progress,
            (residual, residual, _tree.norm(f, self.batch_ndim)),
        )

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
        return self.verdict(state.progress)

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
        return y, aux, stats

    def last_residual(self, y: Y, state: ReversibleState) -> Reals:
        return state.progress.last_residual

    def steps_taken(self, state: ReversibleState) -> Counts:
        return state.progress.num_steps
