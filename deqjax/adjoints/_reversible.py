"""The gradient of the reversible iteration, by running it backwards."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._upstream import Carry, Extras, Inputs, unvmap_any, unvmap_max
from ..solvers._base import Progress
from ..solvers._reversible import Reversible, ReversibleState
from ._loop import (
    SolverLoop,
    as_inputs,
    branch,
    detach,
    finite_result,
    repeat,
    solve,
)
from ._stats import BackwardStats


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

    **Cost:** two evaluations with pull-back per step. **Memory:** 4 copies of z, one
    pull-back of f and one gradient of the parameters, whatever the number of steps.

    Reverse mode only, once.

    Args:
        probe: a `BackwardStats` whose gradient is the record of the backward pass; the
            entry that applies is `drift`, the largest absolute difference between the
            start that the reconstruction arrives at and the known one.

    Raises:
        ValueError: if the solver is not `deqjax.Reversible`.

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

    probe: BackwardStats | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        if self.probe is not None and not isinstance(self.probe, BackwardStats):
            raise TypeError(
                "`probe` must be a deqjax.BackwardStats or None; got "
                f"{type(self.probe).__name__}."
            )

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
            raise ValueError("`ReversibleAdjoint` needs a finite `max_steps`; got None.")
        theta = (named.fn, named.y0, named.args, self.probe)
        rest = named._replace(fn=None, y0=None, args=None)
        value, extras = _reversible(theta, rest, primal_fn)
        return value, tuple(detach(Extras(*extras)))


@eqx.filter_custom_vjp
def _reversible(theta: PyTree, rest: Inputs, primal_fn: Callable) -> PyTree:
    out, _ = _forward(theta, rest, primal_fn)
    return out


@_reversible.def_fwd
def _reversible_fwd(perturbed, theta, rest, primal_fn):
    return _forward(theta, rest, primal_fn)


def _forward(theta: PyTree, rest: Inputs, primal_fn: Callable) -> tuple[PyTree, PyTree]:
    """The solve, and the pair of states from which it can be undone."""
    fn, y0, args, _ = theta
    inputs = rest._replace(fn=fn, y0=y0, args=args)
    value, extras = solve(primal_fn, inputs, HalfStepLoop(inputs))
    state: ReversibleState = extras.dynamic_state
    if inputs.solver.static:
        residuals = (state.companion, value), state.progress.num_steps
    else:
        residuals = state.progress.value, state.progress.best_step
    return (value, tuple(extras)), residuals


# Forwards


class _Forward(eqx.Module):
    a: PyTree
    b: PyTree
    aux: PyTree
    progress: Progress
    num_evals: Array
    history: Array | None


class HalfStepLoop(SolverLoop):
    """The loop of `Reversible` over half steps, in which f is traced once."""

    def __call__(
        self,
        cond_fun: Callable,
        body_fun: Callable,
        init_val: tuple,
        *,
        max_steps: int,
    ) -> tuple:
        solver, options = self.inputs.solver, self.inputs.options
        init = Carry(*init_val)
        state: ReversibleState = init.state
        start = _Forward(
            state.companion,
            init.y,
            init.aux,
            state.progress,
            state.num_evals,
            self.blank_history(init, max_steps),
        )
        if solver.static:
            steps = max_steps
            if "step_budget" in options:
                steps = jnp.minimum(options["step_budget"], max_steps)
            final = repeat(2 * steps, ft.partial(self._static_half, 2 * steps), start)
            count = jnp.zeros_like(final.progress.num_steps) + steps
            final = eqx.tree_at(lambda c: c.progress.num_steps, final, count)
            final = eqx.tree_at(lambda c: c.num_evals, final, jnp.asarray(2 * steps))
            num_steps, done = jnp.asarray(steps), jnp.array(True)
            result = finite_result(final.b)
        else:

            def go_on(val: tuple) -> Array:
                h, carry = val
                active = jnp.any(carry.progress.active(options))
                return unvmap_any(active) & (h < 2 * max_steps)

            def body(val: tuple) -> tuple:
                h, carry = val
                return h + 1, self._tested_half(h, carry)

            _, final = lax.while_loop(go_on, body, (jnp.array(0), start))
            num_steps = jnp.max(final.progress.num_steps, initial=0)
            done, result = solver.verdict(final.progress)
        self.history = final.history
        state = ReversibleState(final.a, final.progress, final.num_evals)
        carry = Carry(
            y=final.b,
            num_steps=num_steps.astype(init.num_steps.dtype),
            state=state,
            aux=final.aux,
            terminate=done,
            result=result,
        )
        return tuple(carry)

    def _static_half(self, total: Any, h: Any, carry: _Forward) -> _Forward:
        solver = self.inputs.solver
        f, aux = self.inputs.fn(carry.b, self.inputs.args)
        observe = lambda: solver.observe_last(carry.progress, carry.b, f)
        history = carry.history
        if history is None:
            progress = branch(h == total - 1, observe, lambda: carry.progress)
        else:
            progress = observe()
            history = history.at[h // 2].set(progress.last_residual)
        return _Forward(
            a=carry.b,
            b=solver.forward_half(carry.a, f),
            aux=aux,
            progress=progress,
            num_evals=carry.num_evals,
            history=history,
        )

    def _tested_half(self, h: Array, carry: _Forward) -> _Forward:
        solver, options = self.inputs.solver, self.inputs.options
        f, aux = self.inputs.fn(carry.b, self.inputs.args)
        pair, progress = (carry.a, carry.b), carry.progress
        before = progress.active(options)
        progress = lax.cond(
            h % 2 == 0,
            lambda: solver.observe(progress, before, pair, carry.b, f, aux),
            lambda: progress,
        )
        moved = (carry.b, solver.forward_half(carry.a, f))
        a, b = _tree.where(progress.active(options), moved, pair)
        history = carry.history
        if history is not None:
            row = jnp.where(before, progress.last_residual, jnp.nan)
            # A half step that tests nothing writes what is already there.
            row = jnp.where(h % 2 == 0, row, history[h // 2])
            history = history.at[h // 2].set(row)
        evals = carry.num_evals + jnp.any(before).astype(jnp.int32)
        return _Forward(a, b, carry.aux, progress, evals, history)


# Backwards


class _Backward(eqx.Module):
    a: PyTree
    b: PyTree
    ct_a: PyTree
    ct_b: PyTree
    gradient: PyTree


@_reversible.def_bwd
def _reversible_bwd(residuals, cotangents, perturbed, theta, rest, primal_fn):
    solver: Reversible = rest.solver
    (a, b), steps = residuals
    fn, y0, args, probe = theta
    ct_value, ct_extras = cotangents
    ct_value = _materialise(ct_value, b)
    ct_aux = Extras(*ct_extras).aux
    k = solver.batch_ndim

    p_fn, p_y0, p_args, p_probe = perturbed
    moving, fixed = eqx.partition((fn, args), (p_fn, p_args))

    def evaluate(z: PyTree, moving: PyTree) -> tuple[PyTree, PyTree]:
        fn, args = eqx.combine(moving, fixed)
        f, aux = fn(z, args)
        return f, eqx.filter(aux, eqx.is_inexact_array)

    has_aux = bool(jtu.tree_leaves(ct_aux))
    aux_struct = jax.eval_shape(evaluate, b, moving)[1]
    no_aux = _tree.zeros_like(aux_struct)
    ct_aux = _materialise(eqx.filter(ct_aux, eqx.is_inexact_array), no_aux)

    carry = _Backward(
        a,
        b,
        ct_a=_tree.zeros_like(ct_value),
        ct_b=ct_value,
        gradient=jtu.tree_map(
            lambda p: jnp.zeros_like(p, dtype=_tree.wide(p.dtype)), moving
        ),
    )
    if has_aux and not solver.static:
        # aux was returned by the evaluation that tested the answer.
        _, pull = jax.vjp(evaluate, b, moving)
        g_z, g_moving = pull((_tree.zeros_like(b), ct_aux))
        carry = eqx.tree_at(
            lambda c: (c.ct_b, c.gradient),
            carry,
            (_add(carry.ct_b, g_z), _add(carry.gradient, g_moving)),
        )
    budget = "step_budget" in rest.options
    if solver.static and not budget:
        total = 2 * rest.max_steps
    else:
        total = 2 * unvmap_max(jnp.max(steps, initial=0))

    def half(i: Any, carry: _Backward) -> _Backward:
        h = total - 1 - i
        ct_a, ct_f = solver.pull_half(carry.ct_b)
        if solver.static and not budget:
            active = None
        else:
            active = h < 2 * steps
            ct_f = _tree.where(active, ct_f, _tree.zeros_like(ct_f))
        ct_aux_here = no_aux
        if has_aux and solver.static:
            ct_aux_here = branch(i == 0, lambda: ct_aux, lambda: no_aux)
        (f, _), pull = jax.vjp(evaluate, carry.a, moving)
        g_z, g_moving = pull((ct_f, ct_aux_here))
        new = (
            solver.backward_half(carry.b, f),
            carry.a,
            ct_a,
            _add(carry.ct_a, g_z),
        )
        if active is not None:
            old = (carry.a, carry.b, carry.ct_a, carry.ct_b)
            new = _tree.where(active, new, old)
        return _Backward(*new, gradient=_add(carry.gradient, g_moving))

    carry = repeat(total, half, carry)
    g_y0 = _add(carry.ct_a, carry.ct_b) if any(jtu.tree_leaves(p_y0)) else None
    if g_y0 is None:
        g_y0 = jtu.tree_map(lambda _: None, y0)
    gradient = jtu.tree_map(lambda g, p: g.astype(p.dtype), carry.gradient, moving)
    g_fn, g_args = gradient
    g_probe = None
    if probe is not None:
        g_probe = jtu.tree_map(lambda _: None, probe)
        if any(jtu.tree_leaves(p_probe)):
            off = _tree.subtract((carry.a, carry.b), (y0, y0))
            g_probe = probe.record(drift=_tree.max_abs(off, k))
    return g_fn, g_y0, g_args, g_probe


def _materialise(cotangent: PyTree, like: PyTree) -> PyTree:
    """Zeros in place of the `None`s of a cotangent."""

    def leaf(x: Any, ct: Any) -> Any:
        return jnp.zeros_like(x) if x is not None and ct is None else ct

    return jtu.tree_map(leaf, like, cotangent, is_leaf=lambda x: x is None)


def _add(x: PyTree, y: PyTree) -> PyTree:
    """x + y in the dtype of x."""
    return jtu.tree_map(lambda a, b: a + b.astype(a.dtype), x, y)
