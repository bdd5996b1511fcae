"""The reversible iteration forwards: a loop over half steps that leaves a trail.

f is traced once and evaluated inside loops only (or, for some short solves, outside
loops only), as it is backwards: XLA may compile an evaluation differently in the two
places, and going back exactly needs the same bits.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._types import Counts
from .._upstream import Carry, Inputs, unvmap_any
from ..solvers._base import Progress
from ..solvers._reversible import Reversible, ReversibleState
from ._loop import UNROLL, SolverLoop


class Trail(eqx.Module):
    """All that going back needs.

    Attributes:
        pair: the carriers of (y, z) at the answer.
        steps: steps that led to it, per problem.
        unit: the unit of the carriers.
        digits: packed digits of each half step, along the first axis.
        anchors: pairs at steps 0, K, 2K, …, along the first axis; and one spare.
    """

    pair: PyTree
    steps: Counts
    unit: Any
    digits: PyTree
    anchors: PyTree


class _Carry(eqx.Module):
    """The pair before half step h, and f evaluated at its second member.

    z is where f is to be evaluated next. It is carried from one half step to the next,
    so that XLA does not fuse its making into f.
    """

    a: PyTree
    b: PyTree
    z: PyTree
    f: PyTree
    aux: PyTree
    progress: Progress
    num_evals: Array
    history: Array | None
    digits: PyTree
    anchors: PyTree


def sealed(fn: Callable) -> Callable:
    """fn behind barriers, so that XLA fuses nothing into it or out of it."""

    def call(z: PyTree, args: PyTree) -> tuple[PyTree, PyTree]:
        return lax.optimization_barrier(fn(lax.optimization_barrier(z), args))

    return call


def is_unrolled(inputs: Inputs) -> bool:
    """Whether the half steps are unrolled, forwards and backwards.

    Short static solves of maps with convolutions are, for their gradients' sake (see
    `UNROLL`). Fused across half steps, an evaluation need not come out the same twice,
    so that such a solve is given an anchor at every step. All others run in loops.
    """
    solver, budget = inputs.solver, "step_budget" in inputs.options
    short = solver.static and not budget and inputs.max_steps <= UNROLL
    if not short:
        return False
    traced, *_ = eqx.filter_make_jaxpr(inputs.fn)(inputs.y0, inputs.args)
    return _convolves(traced.jaxpr)


def _convolves(jaxpr: Any) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            return True
        for inner in jtu.tree_leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns") and _convolves(inner):
                return True
    return False


class HalfStepLoop(SolverLoop):
    """The loop of `Reversible`.

    Args:
        inputs: those of the solve.
        unrolled: see `is_unrolled`.
        leave_trail: whether the solve is to be undone.
        every: steps between anchors, or None.

    Attributes:
        trail: after the loop has been traced, what going back needs.
    """

    trail: Trail | None = None

    def __init__(
        self,
        inputs: Inputs,
        unrolled: bool,
        leave_trail: bool,
        every: int | None = None,
    ):
        super().__init__(inputs)
        self.unrolled = unrolled
        self.leave_trail = leave_trail
        self.every = every
        self.calculus = inputs.solver.calculus(inputs.options)
        self.fn = sealed(inputs.fn)

    def __call__(
        self,
        cond_fun: Callable,
        body_fun: Callable,
        init_val: tuple,
        *,
        max_steps: int | None,
    ) -> tuple:
        assert max_steps is not None
        solver: Reversible = self.inputs.solver
        init = self.start(init_val)
        f, aux = self._first(init.y)
        self.unit = self.calculus.unit(init.y, f, solver.batch_ndim)
        start = self._start(init, f, aux, max_steps)
        run = self._run_static if solver.static else self._run_tested
        final, num_steps, pair, steps = run(start, max_steps)

        decode = ft.partial(self.calculus.decode, unit=self.unit, like=init.y)
        progress = final.progress
        if not solver.static:
            best = jtu.tree_map(decode, progress.value, is_leaf=self._is_state)
            progress = eqx.tree_at(lambda p: p.value, progress, best)
        state = ReversibleState(
            companion=decode(final.a),
            carriers=None if init.state.carriers is None else (final.a, final.b),
            unit=self.unit,
            progress=progress,
            num_evals=final.num_evals,
        )
        y = self._answer(final)
        if solver.static:
            done, result = jnp.array(True), solver.outcome(y, state)
        else:
            _, _, _, args, options, *_, tags = self.inputs
            done, result = solver.terminate(
                self.inputs.fn, y, args, options, state, tags
            )
        self.history = final.history
        if self.leave_trail:
            self.trail = Trail(pair, steps, self.unit, final.digits, final.anchors)
        count = jnp.asarray(num_steps).astype(init.num_steps.dtype)
        return tuple(Carry(y, count, state, final.aux, done, result))

    def _answer(self, carry: _Carry) -> PyTree:
        return self.calculus.answer(
            carry.a, carry.b, self.unit, self.inputs.y0, self.inputs.solver.batch_ndim
        )

    def _is_state(self, x: PyTree) -> bool:
        return jtu.tree_structure(x) == jtu.tree_structure(self.inputs.y0)

    # The start

    def _first(self, z0: PyTree) -> tuple[PyTree, PyTree]:
        """f(z₀), in a loop of its own unless the half steps are unrolled."""
        args = self.inputs.args
        if self.unrolled:
            return self.fn(z0, args)
        aux = eqx.filter_eval_shape(self.fn, z0, args)[1]
        blank = (_tree.zeros_like(z0), _tree.zeros_like(aux))
        # XLA would do away with a loop that it knows to run once.
        once = lax.optimization_barrier(jnp.array(1, jnp.int32))
        return lax.fori_loop(0, once, lambda *_: self.fn(z0, args), blank)

    def _start(self, init: Carry, f: PyTree, aux: PyTree, max_steps: int) -> _Carry:
        solver: Reversible = self.inputs.solver
        a = self.calculus.encode(init.y, self.unit)
        progress = init.state.progress
        if not solver.static:
            progress = eqx.tree_at(
                lambda p: p.value, progress, (a, a), is_leaf=lambda x: x is None
            )
            progress = self._test(progress, a, a, init.y, f, aux)
        digits = anchors = None
        if self.leave_trail:
            words = self.calculus.advance(a, f, self.unit)[1]
            digits = _tree.stack_of_zeros(words, 2 * max_steps)
            if self.every is not None:
                rows = -(-max_steps // self.every) + 1
                anchors = _tree.stack_of_zeros((a, a), rows)
        return _Carry(
            a=a,
            b=a,
            z=init.y,
            f=f,
            aux=aux if solver.static else init.aux,
            progress=progress,
            num_evals=jnp.ones_like(init.state.num_evals),
            history=self._begin_history(init, progress, max_steps),
            digits=digits,
            anchors=anchors,
        )

    def _begin_history(
        self, init: Carry, progress: Progress, max_steps: int
    ) -> Array | None:
        history = self.blank_history(init, max_steps)
        if history is None or self.inputs.solver.static:
            return history
        return history.at[0].set(progress.last_residual)

    # Half steps

    def _update(self, h: Any, carry: _Carry, active: Any = None) -> _Carry:
        """Half step h: the pair moves on, what is lost is kept, the next point made."""
        anchors, digits = carry.anchors, carry.digits
        if anchors is not None and self.every is not None:
            spare = jtu.tree_leaves(anchors)[0].shape[0] - 1
            at = jnp.where(h % (2 * self.every) == 0, h // (2 * self.every), spare)
            anchors = _put(anchors, at, (carry.a, carry.b))
        b, words = self.calculus.advance(carry.a, carry.f, self.unit)
        if digits is not None:
            digits = _put(digits, h, words)
        a, b = carry.b, b
        if active is not None:
            a, b = _tree.where(active, (a, b), (carry.a, carry.b))
        z = self.calculus.point(b, self.unit, self.inputs.y0)
        return eqx.tree_at(
            lambda c: (c.a, c.b, c.z, c.digits, c.anchors),
            carry,
            (a, b, z, digits, anchors),
            is_leaf=lambda x: x is None,
        )

    def _run_static(self, start: _Carry, max_steps: int) -> tuple:
        solver: Reversible = self.inputs.solver
        options, y0 = self.inputs.options, self.inputs.y0
        steps: Any = max_steps
        if "step_budget" in options:
            steps = jnp.clip(options["step_budget"], 0, max_steps)

        def half(h: Any, carry: _Carry) -> _Carry:
            f, aux = self.fn(carry.z, self.inputs.args)
            history = carry.history
            if history is not None:
                seen = solver.observe_last(carry.progress, carry.z, f)
                history = history.at[h // 2].set(seen.last_residual)
            carry = eqx.tree_at(
                lambda c: (c.f, c.aux, c.history, c.num_evals),
                carry,
                (f, aux, history, carry.num_evals + 1),
                is_leaf=lambda x: x is None,
            )
            return self._update(h, carry)

        last = self._update(0, start)
        if self.unrolled:
            for h in range(1, 2 * max_steps):
                last = half(h, last)
        else:
            last = lax.fori_loop(1, 2 * steps, half, last)
        if "step_budget" in options:
            last = eqx.tree_at(
                lambda c: (c.a, c.b),
                last,
                jtu.tree_map(
                    lambda new, old: jnp.where(steps > 0, new, old),
                    (last.a, last.b),
                    (start.a, start.b),
                ),
            )
        x = self.calculus.decode(last.a, self.unit, y0)
        progress = solver.observe_last(last.progress, x, last.f)
        count = jnp.zeros_like(progress.num_steps) + steps
        counts = progress.counts.at[..., 0].set(count)
        progress = eqx.tree_at(lambda p: p.counts, progress, counts)
        last = eqx.tree_at(lambda c: c.progress, last, progress)
        return last, steps, (last.a, last.b), count

    def _test(
        self,
        progress: Progress,
        a: PyTree,
        b: PyTree,
        z: PyTree,
        f: PyTree,
        aux: PyTree,
    ) -> Progress:
        active = progress.active(self.inputs.options)
        return self.inputs.solver.observe(progress, active, (a, b), z, f, aux)

    def _run_tested(self, start: _Carry, max_steps: int) -> tuple:
        options = self.inputs.options

        def go_on(val: tuple) -> Array:
            h, carry = val
            active = jnp.any(carry.progress.active(options))
            # Nothing follows the last test.
            return unvmap_any(active) & (h < 2 * max_steps - 1)

        def body(val: tuple) -> tuple:
            h, carry = val
            active = carry.progress.active(options)
            f, aux = self.fn(carry.z, self.inputs.args)
            even = h % 2 == 0
            # Not a number where an entry has left the grid.
            z = self._answer(carry)
            tested = self._test(carry.progress, carry.a, carry.b, z, f, aux)
            progress = jtu.tree_map(
                lambda new, old: jnp.where(even, new, old), tested, carry.progress
            )
            history = carry.history
            if history is not None:
                row = jnp.where(active, progress.last_residual, jnp.nan)
                # A half step that tests nothing writes what is already there.
                row = jnp.where(even, row, history[h // 2])
                history = history.at[h // 2].set(row)
            evals = carry.num_evals + jnp.any(active).astype(jnp.int32)
            carry = eqx.tree_at(
                lambda c: (c.f, c.progress, c.history, c.num_evals),
                carry,
                (f, progress, history, evals),
                is_leaf=lambda x: x is None,
            )
            return h + 1, self._update(h, carry, progress.active(options))

        start = self._update(0, start, start.progress.active(options))
        _, final = lax.while_loop(go_on, body, (jnp.array(1, jnp.int32), start))
        progress = final.progress
        num_steps = jnp.max(progress.num_steps, initial=0)
        return final, num_steps, progress.value, progress.best_step


def _put(buffer: PyTree, index: Any, rows: PyTree) -> PyTree:
    return jtu.tree_map(lambda x, row: x.at[index].set(row), buffer, rows)


def take(buffer: PyTree, index: Any) -> PyTree:
    """Row `index` of every leaf."""
    pick = ft.partial(lax.dynamic_index_in_dim, index=index, keepdims=False)
    return jtu.tree_map(pick, buffer)
