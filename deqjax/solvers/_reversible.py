"""The coupled iteration of reversible DEQs, which can be run backwards.

One step of the scheme is a half step taken twice, with the roles of the two states
exchanged in between:

    (a, b)  ->  (b, (1 − β) a + β f(b)),      (a, b) = (y_n, z_n) at whole steps.

`deqjax.ReversibleAdjoint` takes the half steps back, with the help of `_remainders.py`.
"""

from dataclasses import field
from typing import Any, ClassVar

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._checks import canonical_weights, fit_weights, real, refuse_retired, whole
from .._types import Aux, Options, Tolerance, Y
from ._base import AbstractSolver, Trial, relax
from ._remainders import Lost, Remainders


class Reversible(AbstractSolver[Y, Aux]):
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

    plain, evals_per_step = True, 2
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

    def prepared(self, z: PyTree, options: Options) -> "Reversible":
        """The solver with the weight on f of every leaf of z, for this solve.

        Raises:
            ValueError: if its shape or structure does not fit z.
        """
        name, beta = "`beta`", self.beta
        if "beta" in options:
            name = '`options["beta"]`'
            beta = canonical_weights(name, options["beta"])
        solver = super().prepared(z, options)
        return eqx.tree_at(lambda s: s.beta, solver, fit_weights(name, beta, z))

    def init_memory(self, z: PyTree, options: Options) -> PyTree:
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

    def kept(self, memory: PyTree) -> PyTree:
        return memory

    def update(self, z: Y, f: Y, memory: Y, trial: Trial | None = None) -> tuple[Y, Y]:
        """A half step, f = fn(z): (y, z) -> (z, (1 − β) y + β f), y the memory."""
        return relax(memory, f, self.beta), z

    def undo(
        self,
        z: Y,
        f: Y,
        memory: Y,
        remainders: Remainders,
        lost: Lost,
        start: Y,
        at_start: Array,
    ) -> tuple[Y, PyTree]:
        """The half step backwards: the y that z has replaced, f being fn(memory) anew.

        Also returns the part of the capacity that the repair took, entry by entry; the
        other arguments are those of `Remainders.undo`.
        """
        return remainders.undo(memory, f, z, self.beta, lost, start, at_start)


_RETIRED = {
    "arithmetic": "states are floats, and `deqjax.ReversibleAdjoint` undoes every step "
    "exactly; leave it out",
}
