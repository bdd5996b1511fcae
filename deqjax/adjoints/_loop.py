"""The loop that an adjoint hands to optimistix's iterative solve.

It sees the carry, so that it is the place for what concerns every solver alike: loops
of static length, `step_budget`, `record`, and, for deqjax's own solvers, stopping only
when every problem is done, whatever happens to a single one of them.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._convolutions import rewrite
from .._upstream import (
    UNROLL as UNROLL,
    Carry,
    Extras,
    Inputs,
    Static,
    unvmap_any,
    while_loop,
)
from ..solvers._base import AbstractSolver
from ..solvers._foreign import Foreign
from ..solvers._reversible import ReversibleState


def solve(
    primal_fn: Callable, inputs: Inputs, loop: "SolverLoop"
) -> tuple[PyTree, Extras]:
    """Run optimistix's iterative solve in a `SolverLoop`."""
    value, extras = primal_fn((*inputs, loop))
    extras = Extras(*extras)
    if loop.history is not None:
        stats = {**extras.stats, "residual_history": loop.history}
        extras = extras._replace(stats=stats)
    return value, extras


class SolverLoop:
    """A while loop with the signature that optimistix expects.

    Attributes:
        history: after the loop has been traced with `options={"record": True}`, the
            residual of every step, NaN after the end.
    """

    def __init__(
        self,
        inputs: Inputs,
        kind: Literal["lax", "checkpointed"] = "lax",
        checkpoints: int | None = None,
    ):
        self.inputs = inputs
        self.kind: Literal["lax", "checkpointed"] = kind
        self.checkpoints = checkpoints
        self.history: Array | None = None

    def __call__(
        self,
        cond_fun: Callable,
        body_fun: Callable,
        init_val: tuple,
        *,
        max_steps: int | None,
    ) -> tuple:
        solver = self.inputs.solver
        init, body = self._recorded(init_val, body_fun, max_steps)
        if not isinstance(solver, AbstractSolver):
            final = self._while(self._foreign_cond(cond_fun), body, init, max_steps)
        elif solver.static:
            final = self._static(body, init, max_steps)
        else:
            final = self._while(self._native_cond, body, init, max_steps)
            carry = Carry(*final[0])
            _, _, _, args, options, *_, tags = self.inputs
            done, result = solver.terminate(
                self.inputs.fn, carry.y, args, options, carry.state, tags
            )
            final = (carry._replace(terminate=done, result=result), final[1])
        carry, self.history = final
        return tuple(carry)

    def start(self, init_val: tuple) -> Carry:
        """The carry, its aux sharded as what the map returns; optimistix's is not."""

        def leaf(zero: Any, static: Static) -> Any:
            struct = static.value
            is_array = isinstance(struct, jax.ShapeDtypeStruct)
            return _tree.zeros_like(struct) if is_array else zero

        init = Carry(*init_val)
        return init._replace(aux=jtu.tree_map(leaf, init.aux, self.inputs.aux_struct))

    # Conditions

    def _within_budget(self, carry: Carry) -> Any:
        if "step_budget" in self.inputs.options:
            # Problems with a smaller budget than others stop by themselves.
            return carry.num_steps < jnp.max(self.inputs.options["step_budget"])
        return True

    def _foreign_cond(self, cond_fun: Callable) -> Callable:
        return lambda val: cond_fun(tuple(val[0])) & self._within_budget(val[0])

    def _native_cond(self, val: tuple) -> Array:
        # Not batched under vmap: the loop runs while any lane does, and lanes that are
        # done freeze by themselves, without a select over their whole carry.
        carry, _ = val
        go_on = ~carry.terminate & self._within_budget(carry)
        return unvmap_any(go_on)

    # Loops

    def _while(
        self, cond: Callable, body: Callable, init: tuple, max_steps: int | None
    ) -> tuple:
        if self.kind == "lax":
            bounded = cond
            if max_steps is not None:
                bounded = lambda val: cond(val) & (val[0].num_steps < max_steps)
            return lax.while_loop(bounded, body, init)
        return while_loop(
            cond,
            body,
            init,
            max_steps=max_steps,
            kind="checkpointed",
            checkpoints=self.checkpoints,
        )

    def _static(self, body: Callable, init: tuple, max_steps: int | None) -> tuple:
        if max_steps is None:
            raise ValueError(
                "`rtol=None, atol=None` asks for exactly `max_steps` steps, but "
                "`max_steps` is None; give a number of steps, or tolerances."
            )
        budget = self.inputs.options.get("step_budget")
        if self.kind == "lax":
            steps = (
                max_steps if budget is None else jnp.minimum(jnp.max(budget), max_steps)
            )
            # What the body says of termination is dropped, so that nothing is
            # computed for it.
            final = lax.fori_loop(
                0, steps, lambda _, val: _keep_verdict(body(val), init), init
            )
        elif budget is None and max_steps <= UNROLL and self.checkpoints is None:
            final = init
            for _ in range(max_steps):
                final = body(final)
        else:
            final = self._while(
                lambda val: jnp.asarray(self._within_budget(val[0])),
                lambda val: _keep_verdict(body(val), init),
                init,
                max_steps,
            )
        carry, history = final
        result = self.inputs.solver.outcome(carry.y, carry.state)
        return carry._replace(terminate=jnp.array(True), result=result), history

    # Recording

    def _recorded(
        self, init_val: tuple, body_fun: Callable, max_steps: int | None
    ) -> tuple[tuple, Callable]:
        """The carry beside a history of residuals (None if not asked for)."""
        init = self.start(init_val)
        solver = self.inputs.solver
        if not self.inputs.options.get("record", False):
            return (init, None), lambda val: (Carry(*body_fun(tuple(val[0]))), None)
        history = self.blank_history(init, max_steps)

        def body(val: tuple) -> tuple:
            old, history = val
            new = Carry(*body_fun(tuple(old)))
            moved = solver.steps_taken(new.state) > solver.steps_taken(old.state)
            residual = solver.last_residual(new.y, new.state)
            row = jnp.where(moved, residual, jnp.nan)
            return new, history.at[old.num_steps].set(row)

        return (init, history), body

    def blank_history(self, init: Carry, max_steps: int | None) -> Array | None:
        """NaNs to be filled with residuals, if they are asked for."""
        solver = self.inputs.solver
        if not self.inputs.options.get("record", False):
            return None
        if not isinstance(solver, AbstractSolver | Foreign):
            raise ValueError(
                '`options={"record": True}` needs `deqjax.fixed_point` or a deqjax '
                f"solver; got {type(solver).__name__}."
            )
        if max_steps is None:
            raise ValueError('`options={"record": True}` needs a finite `max_steps`.')
        blank = jnp.full_like(solver.last_residual(init.y, init.state), jnp.nan)
        return jnp.broadcast_to(blank, (max_steps, *blank.shape))


def _keep_verdict(new: tuple, old: tuple) -> tuple:
    carry, history = new
    return carry._replace(terminate=old[0].terminate, result=old[0].result), history


def as_inputs(inputs: tuple) -> Inputs:
    """Name the tuple that optimistix hands to an adjoint."""
    named = Inputs(*inputs)
    return named._replace(
        # A map that `deqjax.fixed_point` has not seen; its jaxpr is a leaf.
        fn=rewrite(named.fn),
        options={} if named.options is None else named.options,
    )


def companion(extras: Extras) -> PyTree:
    """The companion y of the answer of `Reversible`; None for any other solver."""
    state = extras.dynamic_state
    if not isinstance(state, ReversibleState):
        return None
    tested = state.progress.value is not None
    return state.progress.value[0] if tested else state.companion
