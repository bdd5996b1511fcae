"""Backpropagation through the last steps of a solve alone.

The forward pass leaves nothing but the number of steps that led to the answer. The
backward pass takes all but the last of them again, without derivatives, and then the
last ones with theirs: one more solve, in memory that depends on their number alone.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import PyTree

from .._problem import Problem, Solved
from ..solvers._drive import drive, iteration, up_to
from ._cotangents import constant, floating, materialise, none_like


class _Window(NamedTuple):
    """Evaluations `start` to `stop`, at most `size` of them.

    The two may be traced, and differ from lane to lane of a `jax.vmap`.
    """

    start: Any
    stop: Any
    size: int


def _window(problem: Problem, last: int, steps: Any) -> _Window:
    """The last steps of those that led to the answer."""
    run = iteration(problem)
    n, most = run.per_step, problem.max_steps
    size = last if most is None else min(last, most)
    keeps_best = getattr(problem.solver, "keeps_best", False)
    if run.static and not keeps_best and "step_budget" not in problem.options:
        return _Window(run.most - n * size, run.most, n * size)
    start = n * jnp.maximum(steps - last, 0)
    if keeps_best:
        # The evaluation of the answer ends the solve: of it, no step was made.
        return _Window(start, n * steps + 1, n * size + 1)
    # A solve of no steps evaluates f once.
    return _Window(start, jnp.maximum(n * steps, 1), n * size)


def truncated(
    problem: Problem, last: int, checkpoints: int | None, probe: PyTree
) -> Solved:
    """A solve whose gradient is that of its last steps."""
    theta = (problem.fn, problem.y0, problem.args, probe)
    rest = constant(problem._replace(fn=None, y0=None, args=None))
    return _truncated(theta, rest, last, checkpoints)


@eqx.filter_custom_vjp
def _truncated(
    theta: PyTree, rest: Problem, last: int, checkpoints: int | None
) -> Solved:
    fn, y0, args, _ = theta
    return drive(rest._replace(fn=fn, y0=y0, args=args))


@_truncated.def_fwd
def _truncated_fwd(perturbed, theta, rest, last, checkpoints):
    solved = _truncated(theta, rest, last, checkpoints)
    steps = solved.num_steps
    if getattr(rest.solver, "keeps_best", False):
        steps = solved.state.record.best_step
    return solved, (steps, solved.stats.get("residual"))


@_truncated.def_bwd
def _truncated_bwd(residuals, cotangents, perturbed, theta, rest, last, checkpoints):
    steps, forward = residuals
    fn, y0, args, probe = theta
    p_fn, p_y0, p_args, p_probe = perturbed
    moving, fixed = eqx.partition((fn, args), (p_fn, p_args))
    options = {k: v for k, v in rest.options.items() if k != "record"}
    rest = rest._replace(options=options, y0=y0)

    # All steps but the last, without derivatives.
    first = iteration(constant(rest._replace(fn=fn, args=args)))
    window = _window(first.problem, last, steps)
    advance = lambda _, carry: first.advance(carry)
    carry = lax.fori_loop(0, window.start, advance, first.begin())

    def run(y0: PyTree, moving: PyTree) -> tuple[PyTree, PyTree]:
        fn, args = eqx.combine(moving, fixed)
        within = iteration(rest._replace(fn=fn, y0=y0, args=args))
        # A window that holds all steps reaches back to z₀.
        whole = jnp.asarray(window.start == 0)
        init = jtu.tree_map(lambda a, b: jnp.where(whole, a, b), within.begin(), carry)
        end = up_to(within, init, window.stop, window.size, checkpoints)
        solved = within.finish(end)
        return solved.value, floating(solved.aux)

    (value, aux), pull = jax.vjp(run, y0, moving)
    cts = cotangents.value, floating(cotangents.aux)
    g_y0, (g_fn, g_args) = pull(materialise(cts, (value, aux)))
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
