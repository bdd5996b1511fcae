"""Picard iteration: repeated, optionally damped, application of the map."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._checks import real, whole
from .._steps import at_step
from .._types import Args, Aux, Counts, Map, Options, Reals, Tolerance, Y
from ._base import AbstractSolver, Progress, check_beta, statistics, within_budget


class _TestedState(eqx.Module):
    progress: Progress


class _StaticState(eqx.Module):
    """The iterate before the current one, and how many steps led here."""

    previous: PyTree
    num_steps: Array


class Picard(AbstractSolver[Y, Aux, Any]):
    r"""Picard (Banach) iteration, damped by `beta`.

    $$ z_{k+1} = (1 - \beta)\, z_k + \beta\, f(z_k) $$

    | symbol | meaning |
    |---|---|
    | $z_k$ | iterate |
    | $f$ | the map whose fixed point is sought |
    | $\beta$ | weight on $f$; 1 is undamped |

    **Cost:** one evaluation per step; f is traced once. **Memory:** 2 copies of z.

    **Converges** if f is a contraction, linearly with its Lipschitz constant; damped,
    if every eigenvalue μ of the Jacobian satisfies |1 − β + βμ| < 1 (near the fixed
    point). **Fails** visibly (`nonfinite`, `nonlinear_max_steps_reached`) otherwise.

    Stops when ‖f(z) − z‖ ≤ atol + rtol ‖f(z)‖ and returns that z. A tested solve
    that does not converge returns the iterate of smallest residual. With
    `rtol=None, atol=None` exactly `max_steps` steps are taken, the last iterate is
    returned, and the residual is that of the iterate evaluated last.

    Args:
        rtol: tolerance relative to ‖f(z)‖, or None. "auto" goes by the coarsest dtype
            of the state: 1e-8 in float64, 1e-4 in float32, 5e-3 in float16, 2e-2 in
            bfloat16.
        atol: absolute tolerance, or None; "auto": a hundredth of the above.
        beta: weight on f, 0 < beta < 2.
        min_steps: steps before which the test cannot pass.
        batch_ndim: number of leading axes that index independent problems.

    Raises:
        ValueError: if a tolerance, `beta`, `min_steps` or `batch_ndim` is not valid.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> solver = deqjax.Picard(rtol=1e-5, atol=1e-6)
        >>> f = lambda z, _: jnp.cos(z)
        >>> sol = deqjax.fixed_point(f, jnp.ones(()), solver=solver)
        >>> round(float(sol.value), 3)
        0.739

    References:
        S. Banach (1922), Sur les opérations dans les ensembles abstraits et leur
        application aux équations intégrales, doi:10.4064/fm-3-1-133-181.
    """

    rtol: Tolerance = eqx.field(default="auto", converter=real)
    atol: Tolerance = eqx.field(default="auto", converter=real)
    beta: float | Array = eqx.field(default=1.0, kw_only=True, converter=real)
    min_steps: int = eqx.field(default=0, kw_only=True, converter=whole)
    batch_ndim: int = eqx.field(default=0, kw_only=True, converter=whole)

    def __check_init__(self):
        check_beta(self.beta, below=2.0)

    def _update(self, z: Y, f: Y) -> Y:
        if isinstance(self.beta, float | int) and self.beta == 1:
            return f
        return jtu.tree_map(lambda a, b: (1 - self.beta) * a + self.beta * b, z, f)

    def init(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: frozenset[object],
    ) -> Any:
        if self.static:
            _tree.batch_shape(y, self.batch_ndim)
            return _StaticState(y, jnp.array(0, jnp.int32))
        return _TestedState(Progress.start(y, y, aux_struct, self.batch_ndim))

    def step(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        state: Any,
        tags: frozenset[object],
    ) -> tuple[Y, Any, Aux]:
        taken = state.num_steps if self.static else state.progress.num_steps
        f, aux = fn(y, at_step(args, jnp.max(taken, initial=0)))
        if self.static:
            new = self._update(y, f), y
            going = within_budget(state.num_steps, options)
            if going is not None:
                new = _tree.where(going, new, (y, state.previous))
            y, previous = new
            return y, _StaticState(previous, state.num_steps + 1), aux
        active = state.progress.active(options)
        progress = self.observe(state.progress, active, y, y, f, aux)
        y = _tree.where(progress.active(options), self._update(y, f), y)
        return y, _TestedState(progress), aux

    def terminate(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        state: Any,
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
        state: Any,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        if not self.static:
            best = state.progress
            stats = statistics(
                best.residual,
                best.norm,
                best.converged,
                best.num_steps,
                jnp.max(best.num_steps, initial=0),
            )
            return best.value, best.aux, stats
        residual = self.last_residual(y, state)
        num_steps = jnp.zeros_like(residual, dtype=jnp.int32) + state.num_steps
        if "step_budget" in options:
            num_steps = jnp.minimum(num_steps, options["step_budget"])
        # f(previous), from previous and the damped update.
        f = jtu.tree_map(
            lambda new, old: old + (new - old) / self.beta, y, state.previous
        )
        stats = statistics(
            residual,
            _tree.norm(lax.stop_gradient(f), self.batch_ndim),
            jnp.zeros_like(residual, dtype=bool),
            num_steps,
            state.num_steps,
        )
        return y, aux, stats

    def last_residual(self, y: Y, state: Any) -> Reals:
        if not self.static:
            return state.progress.last_residual
        y, previous = lax.stop_gradient((y, state.previous))
        return _tree.norm(_tree.subtract(y, previous), self.batch_ndim) / self.beta

    def steps_taken(self, state: Any) -> Counts:
        return state.num_steps if self.static else state.progress.num_steps
