"""The reversible iteration, forwards with a tape and backwards along it.

Both sweeps are loops over half steps (a, b) -> (b, a'), a' = (1 − β) a + β f(b), with
one evaluation of f each.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._steps import at_step
from .._types import Counts, Reals
from .._upstream import Carry, Inputs, unvmap_any, unvmap_max
from ..solvers._base import Progress
from ..solvers._residues import Record, Residues, least_digits
from ..solvers._reversible import Reversible, ReversibleState, relax
from ._loop import SolverLoop


class Tape(eqx.Module):
    """All that going back needs.

    Attributes:
        start: (y₀, z₀); y₀ is None where it is z₀.
        pair: (y, z) at the answer.
        steps: the steps that led to it, per problem.
        records: what every half step has lost, along the first axis.
        residues: how to read the records.
    """

    start: PyTree
    pair: PyTree
    steps: Counts
    records: Record
    residues: Residues


class _Carry(eqx.Module):
    """The pair before half step h, and what the evaluations so far have shown.

    f and aux are those of the last evaluation; f is kept by static solves alone.
    """

    a: PyTree
    b: PyTree
    f: PyTree
    aux: PyTree
    progress: Progress
    num_evals: Array
    history: Array | None
    records: Record | None


class ForwardSweep(SolverLoop):
    """The loop of `Reversible`, half step by half step.

    Args:
        inputs: those of the solve; the solver's `beta` holds the weight of every leaf.
        record_bits: bits per entry and half step to keep, or None for no tape.

    Attributes:
        tape: after the loop has been traced, what going back needs.
    """

    tape: Tape | None = None

    def __init__(self, inputs: Inputs, record_bits: int | None):
        super().__init__(inputs)
        self.solver: Reversible = inputs.solver
        self.betas = self.solver.beta
        self.residues: Residues | None = None
        if record_bits is not None:
            digits = least_digits(inputs.fn, inputs.y0, inputs.args)
            self.residues = Residues(
                self.betas, inputs.y0, digits, record_bits, self.solver.batch_ndim
            )

    def __call__(
        self,
        cond_fun: Callable,
        body_fun: Callable,
        init_val: tuple,
        *,
        max_steps: int | None,
    ) -> tuple:
        assert max_steps is not None
        solver = self.solver
        start = self._begin(self.start(init_val), max_steps)
        resumed = self.inputs.options.get("companion") is not None
        first = (start.a if resumed else None), start.b
        run = self._run_static if solver.static else self._run_tested
        final, pair, steps, num_steps = run(start, max_steps)
        state = ReversibleState(pair[0], final.progress, final.num_evals)
        if solver.static:
            done, result = jnp.array(True), solver.outcome(final.b, state)
        else:
            done, result = solver.verdict(final.progress)
        self.history = final.history
        if self.residues is not None and final.records is not None:
            self.tape = Tape(first, pair, steps, final.records, self.residues)
        num_steps = jnp.asarray(num_steps).astype(Carry(*init_val).num_steps.dtype)
        return tuple(Carry(final.b, num_steps, state, final.aux, done, result))

    def _begin(self, init: Carry, max_steps: int) -> _Carry:
        z, progress = init.y, init.state.progress
        records = None
        if self.residues is not None:
            # Made of z, so that on a mesh with explicit axes they are sharded like it.
            one = jtu.tree_map(jnp.zeros_like, self.residues.record(z, z, z, z))
            records = _tree.stack_of_zeros(one, 2 * max_steps)
        return _Carry(
            a=init.state.companion,
            b=z,
            f=_tree.zeros_like(z) if self.solver.static else None,
            aux=init.aux,
            progress=progress,
            # Of the batch, so that within `jax.shard_map` it varies as that does.
            num_evals=jnp.max(progress.num_steps, initial=0),
            history=self.blank_history(init, max_steps),
            records=records,
        )

    def _evaluate(self, h: Array, carry: _Carry) -> tuple[PyTree, PyTree]:
        """The map, in half step h."""
        return self.inputs.fn(carry.b, at_step(self.inputs.args, h // 2))

    def _half(
        self, h: Array, carry: _Carry, f: PyTree, active: Any = None
    ) -> tuple[PyTree, PyTree, Record | None]:
        """Half step h of the active problems (None: all): the pair and the records."""
        a, b, records = carry.a, carry.b, carry.records
        new = relax(a, f, self.betas)
        if self.residues is not None:
            row = self.residues.record(a, b, f, new)
            records = jtu.tree_map(lambda t, r: t.at[h].set(r), records, row)
        if active is not None:
            return *_tree.where(active, (b, new), (a, b)), records
        return b, new, records

    def _run_static(self, start: _Carry, max_steps: int) -> tuple:
        solver, options = self.solver, self.inputs.options
        steps: Any = max_steps
        limited = "step_budget" in options
        if limited:
            steps = jnp.clip(options["step_budget"], 0, max_steps)
        # A solve of no steps evaluates f once, for what it reports.
        least_evals = jnp.maximum(2 * steps, 1)
        num_evals = jnp.max(least_evals)

        def half(h: Array | int, carry: _Carry) -> _Carry:
            h = jnp.asarray(h, jnp.int32)  # from an integer under `jax.disable_jit`
            f, aux = self._evaluate(h, carry)
            active = None
            if limited:
                # Problems, and the lanes of a `jax.vmap`, may have other budgets.
                active = h < 2 * steps
                last = carry.f, carry.aux
                f, aux = _tree.where(h < least_evals, (f, aux), last)
            history = carry.history
            if history is not None:
                row = solver.observe_last(carry.progress, carry.b, f).last_residual
                row = row if active is None else jnp.where(active, row, history[h // 2])
                history = history.at[h // 2].set(row)
            a, b, records = self._half(h, carry, f, active)
            return eqx.tree_at(
                lambda c: (c.a, c.b, c.f, c.aux, c.history, c.records),
                carry,
                (a, b, f, aux, history, records),
                is_leaf=lambda x: x is None,
            )

        trips: Any = unvmap_max(num_evals) if limited else 2 * max_steps
        final = lax.fori_loop(0, trips, half, start)
        progress = solver.observe_last(final.progress, final.a, final.f)
        count = jnp.zeros_like(progress.num_steps) + steps
        counts = progress.counts.at[..., 0].set(count)
        final = eqx.tree_at(
            lambda c: (c.progress, c.num_evals),
            final,
            (eqx.tree_at(lambda p: p.counts, progress, counts), num_evals),
        )
        return final, (final.a, final.b), count, jnp.max(jnp.asarray(steps))

    def _run_tested(self, start: _Carry, max_steps: int) -> tuple:
        solver, options = self.solver, dict(self.inputs.options)
        if "step_budget" in options:
            # A solve of no steps evaluates f once, for what it reports.
            options["step_budget"] = jnp.maximum(options["step_budget"], 1)

        def go_on(val: tuple) -> Array:
            h, carry = val
            active = jnp.any(carry.progress.active(options))
            # Nothing follows the last test.
            return unvmap_any(active) & (h < 2 * max_steps - 1)

        def body(val: tuple) -> tuple:
            h, carry = val
            active = carry.progress.active(options)
            f, aux = self._evaluate(h, carry)
            even = h % 2 == 0
            pair = (carry.a, carry.b)
            progress = solver.observe(
                carry.progress, active & even, pair, carry.b, f, aux
            )
            history = carry.history
            if history is not None:
                row = jnp.where(active, progress.last_residual, jnp.nan)
                # A half step that tests nothing writes what is already there.
                row = jnp.where(even, row, history[h // 2])
                history = history.at[h // 2].set(row)
            evals = carry.num_evals + jnp.any(active).astype(jnp.int32)
            a, b, records = self._half(h, carry, f, progress.active(options))
            new = _Carry(a, b, None, carry.aux, progress, evals, history, records)
            return h + 1, new

        first = jnp.array(0, jnp.int32), start
        _, final = lax.while_loop(go_on, body, first)
        if "step_budget" in options:
            budget = jnp.maximum(self.inputs.options["step_budget"], 0)
            count = jnp.minimum(final.progress.num_steps, budget)
            counts = final.progress.counts.at[..., 0].set(count)
            final = eqx.tree_at(lambda c: c.progress.counts, final, counts)
        progress = final.progress
        num_steps = jnp.max(progress.num_steps, initial=0)
        return final, progress.value, progress.best_step, num_steps


class Gradient(eqx.Module):
    """What the reverse sweep gives.

    Attributes:
        start: the cotangents of the tape's start.
        moving: the cotangent of what f and the weights depend on.
        drift: per problem, the largest difference of the start, as it is found again,
            from the known one.
        repair: per problem, the largest part of the capacity that a repair took.
    """

    start: PyTree
    moving: PyTree
    drift: Reals
    repair: Reals


def reverse_sweep(
    evaluate: Callable[[PyTree, PyTree, Array], PyTree],
    weights: Callable[[PyTree], PyTree],
    moving: PyTree,
    cts: tuple[PyTree, PyTree],
    tape: Tape,
    num_steps: int | None,
) -> Gradient:
    """Undo half step after half step, and pull the cotangents of the answer back.

    Args:
        evaluate: f, of the state, of `moving` and of the steps before.
        weights: β of every leaf, of `moving`.
        moving: what is differentiated besides the start.
        cts: the cotangents of the pair (y, z).
        tape: from the forward sweep.
        num_steps: the steps of a solve whose problems have all taken as many, or None.
    """
    trips: Any = 2 * num_steps if num_steps is not None else None
    if trips is None:
        trips = 2 * unvmap_max(jnp.max(tape.steps, initial=0))
    k, (y0, z0) = tape.residues.batch_ndim, tape.start
    take = ft.partial(lax.dynamic_index_in_dim, keepdims=False)

    def half(i: Array | int, carry: tuple) -> tuple:
        h = jnp.asarray(trips - 1 - i, jnp.int32)
        (a, b), (ct_a, ct_b), gradient, worst = carry
        active = None if num_steps is not None else h < 2 * tape.steps
        # Half step h has evaluated f at a, and has made b.
        f, pull = jax.vjp(lambda a, moving: evaluate(a, moving, h // 2), a, moving)
        record = jtu.tree_map(lambda t: take(t, h), tape.records)
        betas = weights(moving)
        # The first half step has replaced y₀, the second z₀.
        start = z0 if y0 is None else _tree.where(h == 0, y0, z0)
        before, repair = tape.residues.undo(a, f, b, betas, record, start, h < 2)
        update = lambda a, f, moving: relax(a, f, weights(moving))
        _, pull_update = jax.vjp(update, before, f, moving)
        ct = ct_b if active is None else mask(active, ct_b)
        ct_before, ct_f, g_weights = pull_update(ct)
        g_a, g_fn = pull(ct_f)
        pair, cts = (before, a), (ct_before, add(ct_a, g_a))
        repair = jtu.tree_map(_as_byte, repair)
        if active is not None:
            pair, cts = _tree.where(active, (pair, cts), ((a, b), (ct_a, ct_b)))
            repair = mask(active, repair)
        gradient = add(add(gradient, g_fn), g_weights)
        return pair, cts, gradient, jtu.tree_map(jnp.maximum, worst, repair)

    wide = lambda p: jnp.zeros_like(p, dtype=_tree.wide(p.dtype))
    none = jtu.tree_map(lambda x: jnp.zeros_like(x, dtype=jnp.uint8), z0)
    first = tape.pair, cts, jtu.tree_map(wide, moving), none
    pair, (ct_a, ct_b), gradient, worst = lax.fori_loop(0, trips, half, first)
    # After the loop: on a mesh a maximum over all entries is communication. Compared
    # before it is subtracted: where z₀ is a product, compilers may contract a − z₀ to
    # one operation, which is not 0 for a = z₀.
    known = (z0 if y0 is None else y0), z0
    apart = jtu.tree_map(
        lambda x, z, d: jnp.where(x == z, 0, d),
        pair,
        known,
        _tree.subtract(pair, known),
    )
    drift = _tree.max_abs(apart, k)
    drift = jnp.where(jnp.isnan(drift), jnp.inf, drift)
    repair = _tree.max_abs(jtu.tree_map(lambda w: w.astype(jnp.float32), worst), k)
    ct_start = (None, add(ct_a, ct_b)) if y0 is None else (ct_a, ct_b)
    return Gradient(ct_start, gradient, drift, repair / 255)


def _as_byte(repair: Array) -> Array:
    """A number in [0, 1], rounded up, as a byte: the largest one is kept per entry."""
    repair = jnp.where(repair <= 1, repair, 1)
    return jnp.ceil(255 * repair).astype(jnp.uint8)


def replay(
    fn: Callable,
    start: PyTree,
    args: PyTree,
    betas: PyTree,
    *,
    steps: Any,
    max_steps: int,
    static: bool,
) -> tuple[PyTree, PyTree]:
    """(y, z) at the answer and aux by a plain loop, which JAX differentiates as it is.

    Args:
        fn: the map.
        start: as of the tape.
        args: passed to `fn`.
        betas: the weight on f of every leaf.
        steps: the steps that lead to the answer, per problem.
        max_steps: the most steps.
        static: whether the solve tests nothing.
    """

    def half(pair: PyTree, h: Array) -> tuple[PyTree, None]:
        a, b = pair
        new = relax(a, fn(b, at_step(args, h // 2))[0], betas)
        return _tree.where(h < 2 * steps, (b, new), pair), None

    y0, z0 = start
    # JAX does not checkpoint what has effects.
    effects = eqx.filter_make_jaxpr(fn)(z0, args)[0].effects
    step = half if effects else jax.checkpoint(half)
    hs = jnp.arange(2 * max_steps, dtype=jnp.int32)
    (a, b), _ = lax.scan(step, (z0 if y0 is None else y0, z0), hs)
    # Where aux was evaluated: last of all, or where the answer was tested.
    last = last_evaluated(steps, static)
    return (a, b), fn(a if static else b, at_step(args, last))[1]


def last_evaluated(steps: Any, static: bool) -> Array:
    """The steps before the evaluation that gave aux."""
    steps = jnp.max(jnp.asarray(steps), initial=0)
    return jnp.maximum(steps - 1, 0) if static else steps


def mask(active: Array, x: PyTree) -> PyTree:
    """Zeros for the problems that are not active."""
    return _tree.where(active, x, _tree.zeros_like(x))


def add(x: PyTree, y: PyTree) -> PyTree:
    """x + y in the dtype of x."""
    return jtu.tree_map(lambda a, b: a + b.astype(a.dtype), x, y)
