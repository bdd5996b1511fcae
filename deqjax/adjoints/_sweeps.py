"""The tape of a reversible solve, and the sweep back along it.

Both passes take half steps (a, b) -> (b, a'), a' = (1 − β) a + β f(b), with one
evaluation of f each. Forwards `_drive.py` takes them, and has what they lose written to
the tape.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._problem import Problem
from .._steps import at_step
from .._types import Counts, Reals
from .._upstream import unvmap_max
from ..solvers._base import relax
from ..solvers._remainders import Lost, Remainders, least_digits
from ..solvers._reversible import Reversible


class Tape(eqx.Module):
    """What the half steps of a solve have lost.

    Attributes:
        lost: of every half step, along the first axis.
        remainders: how to read it.
    """

    lost: Lost
    remainders: Remainders

    @staticmethod
    def empty(problem: Problem, bits: int) -> "Tape":
        """A tape for all half steps of a solve, with so many bits per entry of each."""
        z, solver = problem.y0, problem.solver
        digits = least_digits(problem.fn, z, problem.args)
        remainders = Remainders(solver.beta, z, digits, bits, solver.batch_ndim)
        # Made of z, so that on a mesh with explicit axes it is sharded like it.
        one = jtu.tree_map(jnp.zeros_like, remainders.record(z, z, z, z))
        return Tape(_tree.stack_of_zeros(one, 2 * problem.max_steps), remainders)

    def write(self, h: Array, z: PyTree, y: PyTree, f: PyTree, new: PyTree) -> "Tape":
        """The tape with half step h, in which `new` replaces y, given f = fn(z)."""
        row = self.remainders.record(y, z, f, new)
        lost = jtu.tree_map(lambda rows, row: rows.at[h].set(row), self.lost, row)
        return Tape(lost, self.remainders)

    def read(self, h: Array) -> Lost:
        """What half step h has lost."""
        take = ft.partial(lax.dynamic_index_in_dim, keepdims=False)
        return jtu.tree_map(lambda rows: take(rows, h), self.lost)


class Trace(NamedTuple):
    """All that going back needs, beside the start.

    Attributes:
        pair: (y, z) at the answer.
        steps: the steps that led to it, per problem.
        tape: what they have lost.
    """

    pair: PyTree
    steps: Counts
    tape: Tape


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
    with_weights: Callable[[PyTree], Reversible],
    moving: PyTree,
    cts: tuple[PyTree, PyTree],
    start: tuple[PyTree, PyTree],
    trace: Trace,
    num_steps: int | None,
) -> Gradient:
    """Undo half step after half step, and pull the cotangents of the answer back.

    Args:
        evaluate: f, of the state, of `moving` and of the steps before.
        with_weights: the solver, of `moving`, on which its β may depend.
        moving: what is differentiated besides the start.
        cts: the cotangents of the pair (y, z).
        start: (y₀, z₀); y₀ is None where it is z₀.
        trace: of the solve.
        num_steps: the steps of a solve whose problems have all taken as many, or None.
    """
    trips: Any = 2 * num_steps if num_steps is not None else None
    if trips is None:
        trips = 2 * unvmap_max(jnp.max(trace.steps, initial=0))
    (y0, z0), (pair, _, tape) = start, trace
    k = tape.remainders.batch_ndim

    def half(i: Array | int, carry: tuple) -> tuple:
        h = jnp.asarray(trips - 1 - i, jnp.int32)
        (y, z), (ct_y, ct_z), gradient, worst = carry
        active = None if num_steps is not None else h < 2 * trace.steps
        # Half step h has evaluated f at y, and has made z.
        f, pull = jax.vjp(lambda y, moving: evaluate(y, moving, h // 2), y, moving)
        # The first half step has replaced y₀, the second z₀.
        known = z0 if y0 is None else _tree.where(h == 0, y0, z0)
        solver = with_weights(moving)
        before, repair = solver.undo(
            z, f, y, tape.remainders, tape.read(h), known, h < 2
        )
        update = lambda y, f, moving: with_weights(moving).update(z, f, y)[0]
        _, pull_update = jax.vjp(update, before, f, moving)
        ct = ct_z if active is None else mask(active, ct_z)
        ct_before, ct_f, g_weights = pull_update(ct)
        g_y, g_fn = pull(ct_f)
        pair, cts = (before, y), (ct_before, add(ct_y, g_y))
        repair = jtu.tree_map(_as_byte, repair)
        if active is not None:
            pair, cts = _tree.where(active, (pair, cts), ((y, z), (ct_y, ct_z)))
            repair = mask(active, repair)
        gradient = add(add(gradient, g_fn), g_weights)
        return pair, cts, gradient, jtu.tree_map(jnp.maximum, worst, repair)

    wide = lambda p: jnp.zeros_like(p, dtype=_tree.wide(p.dtype))
    none = jtu.tree_map(lambda x: jnp.zeros_like(x, dtype=jnp.uint8), z0)
    first = pair, cts, jtu.tree_map(wide, moving), none
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
