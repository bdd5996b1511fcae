"""The coupled iteration of reversible DEQs, which can be run backwards.

One step of the scheme is a half step taken twice, with the roles of the two states
exchanged in between:

    (a, b)  ->  (b, (1 − β) a + β f(b)),      (a, b) = (y_n, z_n) at whole steps.

`deqjax.ReversibleAdjoint` takes the half steps back, with the help of `_residues.py`.
"""

from dataclasses import field
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._checks import canonical_weights, fit_weights, real, refuse_retired, whole
from .._steps import at_step
from .._types import Args, Aux, Counts, Map, Options, Reals, Tolerance, Y
from .._upstream import unvmap_any
from ._base import AbstractSolver, Progress, statistics, within_budget


class ReversibleState(eqx.Module):
    """The companion y of the iterate z, and the record of the solve.

    Attributes:
        companion: y; after a solve, that of the answer, from which and the answer
            another solve goes on.
        progress: the record; its value is the pair (y, z) of the best iterate in a
            tested solve, and None in a static one, where the residual is that of the
            iterate evaluated last.
        num_evals: evaluations of the map.
    """

    companion: PyTree
    progress: Progress
    num_evals: Array


def relax(a: PyTree, f: PyTree, betas: PyTree) -> PyTree:
    """(1 − β) a + β f, rounded once to the dtype of the state."""

    def leaf(a: Array, f: Array, beta: Any) -> Array:
        dtype = _tree.wide(a.dtype)
        beta = jnp.asarray(beta, dtype)
        return ((1 - beta) * a.astype(dtype) + beta * f.astype(dtype)).astype(a.dtype)

    return jtu.tree_map(leaf, a, f, betas)


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

    **Cost:** two evaluations per step, one less in the step that ends a tested solve.
    **Memory:** 3 copies of z, 5 in a tested solve; `deqjax.ReversibleAdjoint` adds a
    byte per entry of z and evaluation when the solve is differentiated.

    **Converges** for a map of Lipschitz constant k if |1 − β| + βk < 1, with that
    factor per step or better; always for a contraction. **Fails** visibly otherwise:
    `nonfinite` or `nonlinear_max_steps_reached`.

    Stops at the first z_n with ‖f(z_n) − z_n‖ ≤ atol + rtol ‖f(z_n)‖. With
    `rtol=None, atol=None` exactly `max_steps` steps are taken; the value is z_N and
    the residual that of y_N, which was evaluated last.

    **Resuming.** `options={"companion": y}` starts from (y, z₀). With the answer as z₀
    and `sol.state.companion` as y, a second solve goes on as if the first had not
    ended, to the same bits. Under `deqjax.ReversibleAdjoint` and
    `deqjax.UnrolledAdjoint` gradients flow through both states, from solve to solve;
    `jax.lax.stop_gradient` on both cuts them.

    Args:
        rtol: tolerance relative to ‖f(z)‖, or None. "auto" goes by the coarsest dtype
            of the state: 1e-8 in float64, 1e-4 in float32, 5e-3 in float16, 2e-2 in
            bfloat16.
        atol: absolute tolerance, or None; "auto": a hundredth of the above.
        beta: weight on f, 0 < beta < 1: a number; an array that broadcasts against
            every leaf of z (one weight per entry, per channel or per example); or a
            pytree of these with the structure of z. An array is differentiated, and
            another value of it does not recompile. `options={"beta": value}` replaces
            it for one solve, by one that is drawn at random for example.
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

    rtol: Tolerance = eqx.field(default="auto", converter=real)
    atol: Tolerance = eqx.field(default="auto", converter=real)
    beta: PyTree = field(default=0.5, kw_only=True)
    min_steps: int = eqx.field(default=0, kw_only=True, converter=whole)
    batch_ndim: int = eqx.field(default=0, kw_only=True, converter=whole)

    known_options: ClassVar[frozenset[str]] = AbstractSolver.known_options | {
        *("beta", "companion")
    }

    def __init__(
        self,
        rtol: Any = "auto",
        atol: Any = "auto",
        *,
        beta: PyTree = 0.5,
        min_steps: Any = 0,
        batch_ndim: Any = 0,
        **retired: Any,
    ):
        refuse_retired(retired, _RETIRED)
        self.rtol, self.atol = rtol, atol
        self.beta = canonical_weights("`beta`", beta)
        self.min_steps, self.batch_ndim = min_steps, batch_ndim

    def betas(self, z: PyTree, options: Options) -> PyTree:
        """The weight on f of every leaf of z.

        Raises:
            ValueError: if its shape or structure does not fit z.
        """
        beta = self.beta
        name = "`beta`"
        if "beta" in options:
            name = '`options["beta"]`'
            beta = canonical_weights(name, options["beta"])
        return fit_weights(name, beta, z)

    def first_companion(self, z: PyTree, options: Options) -> PyTree:
        """y₀: z₀, or what a solve is resumed from.

        Raises:
            ValueError: if it is not as z₀ is.
        """
        y = options.get("companion")
        if y is None:
            return z
        if jtu.tree_structure(y) != jtu.tree_structure(z):
            raise ValueError(
                '`options["companion"]` must have the tree structure of `z0`, '
                f"{jtu.tree_structure(z)}; got {jtu.tree_structure(y)}."
            )
        for (path, a), b in zip(
            jtu.tree_leaves_with_path(z), jtu.tree_leaves(y), strict=True
        ):
            for what, default in (("shape", ()), ("dtype", None)):
                if (got := getattr(b, what, default)) != getattr(a, what):
                    raise ValueError(
                        f'`options["companion"]` must have the {what} of `z0`; at leaf '
                        f"`{jtu.keystr(path) or 'z0'}` `z0` has {getattr(a, what)}, "
                        f"`companion` has {got}."
                    )
        return y

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
        self.betas(y, options)
        companion = self.first_companion(y, options)
        pair = (companion, y)
        value, aux_struct = (None, None) if self.static else (pair, aux_struct)
        progress = Progress.start(value, y, aux_struct, self.batch_ndim)
        return ReversibleState(companion, progress, jnp.array(0, jnp.int32))

    def step(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        state: ReversibleState,
        tags: frozenset[object],
    ) -> tuple[Y, ReversibleState, Aux]:
        betas, companion = self.betas(y, options), state.companion
        progress = state.progress
        args = at_step(args, jnp.max(progress.num_steps, initial=0))
        f, aux = fn(y, args)
        if self.static:
            going = within_budget(progress.num_steps, options)
            middle = relax(companion, f, betas)
            f, aux = fn(middle, args)
            observed = self.observe_last(progress, middle, f)
            counts = observed.counts.at[..., 0].add(1)
            observed = eqx.tree_at(lambda p: p.counts, observed, counts)
            new = relax(y, f, betas), middle, observed
            if going is not None:
                new = _tree.where(going, new, (y, companion, progress))
            y, companion, progress = new
            num_evals = state.num_evals + 2
            return y, ReversibleState(companion, progress, num_evals), aux
        before = progress.active(options)
        progress = self.observe(progress, before, (companion, y), y, f, aux)
        active = progress.active(options)

        def rest() -> PyTree:
            middle = relax(companion, f, betas)
            new = relax(y, fn(middle, args)[0], betas)
            return _tree.where(active, (middle, new), (companion, y))

        # The evaluation that ends the solve is the only one of its step.
        go_on = unvmap_any(jnp.any(active))
        both = (jnp.any(flags).astype(jnp.int32) for flags in (before, active))
        num_evals = state.num_evals + sum(both)
        companion, y = lax.cond(go_on, rest, lambda: (companion, y))
        return y, ReversibleState(companion, progress, num_evals), aux

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
        if not self.static:
            (_, y), aux = best.value, best.aux
        stats = statistics(
            best.residual, best.norm, best.converged, best.num_steps, state.num_evals
        )
        return y, aux, stats

    def last_residual(self, y: Y, state: ReversibleState) -> Reals:
        return state.progress.last_residual

    def steps_taken(self, state: ReversibleState) -> Counts:
        return state.progress.num_steps


_RETIRED = {
    "arithmetic": "states are floats, and `deqjax.ReversibleAdjoint` undoes every step "
    "exactly; leave it out",
}
