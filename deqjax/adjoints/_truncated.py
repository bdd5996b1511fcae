"""Backpropagation through the last steps of a solve alone.

The forward pass leaves nothing but the number of steps that led to the answer. The
backward pass takes all but the last of them again, without derivatives, and then the
last ones with theirs: one more solve, in memory that depends on their number alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import PyTree

from .._upstream import UNROLL, Carry, Extras, Inputs
from ..solvers._base import AbstractSolver
from ._cotangents import constant, floating, materialise, none_like
from ._loop import SolverLoop, solve


class _Window(NamedTuple):
    """Iterations `start` to `stop` of the loop, at most `size` of them.

    The two may be traced, and differ from lane to lane of a `jax.vmap`.
    """

    start: Any
    stop: Any
    size: int


def _steps(inputs: Inputs, extras: Extras) -> Any:
    """How many steps led to the answer."""
    solver = inputs.solver
    if isinstance(solver, AbstractSolver) and solver.returns_best:
        return solver.steps_to_answer(extras.dynamic_state)
    return extras.num_steps


def _window(inputs: Inputs, last: int, steps: Any) -> _Window:
    solver, most = inputs.solver, inputs.max_steps
    # Without `max_steps`, a static solve has been refused before.
    total: Any = most
    least = last if most is None else min(last, most)
    if not isinstance(solver, AbstractSolver):
        return _Window(jnp.maximum(steps - last, 0), steps, least)
    if solver.returns_best:
        # The evaluation of the answer ends the solve: of it, no step was made.
        return _Window(jnp.maximum(steps - last, 0), steps + 1, least + 1)
    if "step_budget" in inputs.options:
        return _Window(jnp.maximum(steps - last, 0), steps, least)
    return _Window(total - least, total, least)


class _Before(SolverLoop):
    """The steps before a window."""

    carry: tuple | None = None

    def __init__(self, inputs: Inputs, window: _Window):
        super().__init__(inputs)
        self.window = window

    def __call__(
        self,
        cond_fun: Callable,
        body_fun: Callable,
        init_val: tuple,
        *,
        max_steps: int | None,
    ) -> tuple:
        step = lambda _, carry: tuple(body_fun(carry))
        carry = lax.fori_loop(0, self.window.start, step, tuple(init_val))
        self.carry = carry
        return carry


class _Within(SolverLoop):
    """The steps of a window, from where `_Before` has ended."""

    def __init__(
        self, inputs: Inputs, window: _Window, carry: Any, checkpoints: int | None
    ):
        super().__init__(inputs, "checkpointed", checkpoints)
        self.window, self.carry = window, carry

    def __call__(
        self,
        cond_fun: Callable,
        body_fun: Callable,
        init_val: tuple,
        *,
        max_steps: int | None,
    ) -> tuple:
        start, stop, size = self.window.start, self.window.stop, self.window.size
        # A window that holds all steps reaches back to z₀.
        whole = jnp.asarray(start == 0)
        init = jtu.tree_map(
            lambda a, b: jnp.where(whole, a, b), tuple(init_val), self.carry
        )
        if isinstance(stop, int) and size <= UNROLL and self.checkpoints is None:
            for _ in range(size):
                init = tuple(body_fun(init))
            return init
        body = lambda val: (Carry(*body_fun(tuple(val[0]))), None)
        go_on = lambda val: jnp.asarray(val[0].num_steps < stop)
        return tuple(self._while(go_on, body, (Carry(*init), None), size)[0])


def truncated(
    primal_fn: Callable,
    inputs: Inputs,
    last: int,
    checkpoints: int | None,
    probe: PyTree,
) -> tuple[PyTree, Extras]:
    """A solve whose gradient is that of its last steps."""
    theta = (inputs.fn, inputs.y0, inputs.args, probe)
    rest = constant(inputs._replace(fn=None, y0=None, args=None))
    value, extras = _truncated(theta, rest, last, checkpoints, primal_fn)
    return value, Extras(*extras)


@eqx.filter_custom_vjp
def _truncated(
    theta: PyTree, rest: Inputs, last: int, checkpoints: int | None, primal_fn: Callable
) -> PyTree:
    fn, y0, args, _ = theta
    inputs = rest._replace(fn=fn, y0=y0, args=args)
    value, extras = solve(primal_fn, inputs, SolverLoop(inputs))
    return value, tuple(extras)


@_truncated.def_fwd
def _truncated_fwd(perturbed, theta, rest, last, checkpoints, primal_fn):
    value, extras = _truncated(theta, rest, last, checkpoints, primal_fn)
    named = Extras(*extras)
    return (value, extras), (_steps(rest, named), named.stats.get("residual"))


@_truncated.def_bwd
def _truncated_bwd(
    residuals, cotangents, perturbed, theta, rest, last, checkpoints, primal_fn
):
    steps, forward = residuals
    window = _window(rest, last, steps)
    fn, y0, args, probe = theta
    p_fn, p_y0, p_args, p_probe = perturbed
    moving, fixed = eqx.partition((fn, args), (p_fn, p_args))
    options = {k: v for k, v in rest.options.items() if k != "record"}
    rest = rest._replace(options=options)

    before = constant(rest._replace(fn=fn, y0=y0, args=args))
    loop = _Before(before, window)
    solve(primal_fn, before, loop)

    def run(y0: PyTree, moving: PyTree) -> tuple[PyTree, PyTree]:
        fn, args = eqx.combine(moving, fixed)
        inputs = rest._replace(fn=fn, y0=y0, args=args)
        within = _Within(inputs, window, loop.carry, checkpoints)
        value, extras = solve(primal_fn, inputs, within)
        return value, floating(extras.aux)

    (value, aux), pull = jax.vjp(run, y0, moving)
    ct_value, ct_extras = cotangents
    ct_aux = floating(Extras(*ct_extras).aux)
    g_y0, (g_fn, g_args) = pull(materialise((ct_value, ct_aux), (value, aux)))
    if not any(jtu.tree_leaves(p_y0)):
        g_y0 = none_like(y0)
    g_probe = none_like(probe)
    if any(jtu.tree_leaves(p_probe)):
        taken = jnp.asarray(window.stop - window.start)
        g_probe = probe.record(num_products=taken, forward_residual=forward)
    return g_fn, g_y0, g_args, g_probe


@eqx.filter_custom_vjp
def reported(theta: PyTree, entries: dict[str, Any]) -> PyTree:
    """The first of (outputs, probe); the gradient of the probe is made of entries."""
    return theta[0]


@reported.def_fwd
def _reported_fwd(perturbed, theta, entries):
    return theta[0], None


@reported.def_bwd
def _reported_bwd(_, cotangents, perturbed, theta, entries):
    outputs, probe = theta
    g_probe = none_like(probe)
    if any(jtu.tree_leaves(perturbed[1])):
        g_probe = probe.record(**entries)
    floats = floating(outputs)
    return materialise(floating(cotangents), floats), g_probe
