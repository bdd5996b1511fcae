"""The reversible iteration backwards: half steps undone, cotangents pulled back."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._types import Reals
from .._upstream import Inputs, unvmap_max
from ..solvers._reversible import Reversible
from ._half_steps import Trail, take


class _Carry(eqx.Module):
    """The pair after half step h, the cotangents of both, and what has added up.

    x is a as a state: the point at which half step h evaluated f.
    """

    a: PyTree
    b: PyTree
    x: PyTree
    ct_a: PyTree
    ct_b: PyTree
    gradient: PyTree
    drift: Reals


class Backwards:
    """The half steps of a solve, undone."""

    def __init__(
        self,
        inputs: Inputs,
        unrolled: bool,
        every: int | None,
        trail: Trail,
        evaluate: Callable,
        moving: PyTree,
        ct_aux: PyTree | None,
    ):
        self.inputs, self.every, self.trail = inputs, every, trail
        self.evaluate, self.moving, self.ct_aux = evaluate, moving, ct_aux
        self.solver: Reversible = inputs.solver
        self.calculus = self.solver.calculus(inputs.options)
        self.start = self.calculus.encode(inputs.y0, trail.unit)
        self.unrolled = unrolled
        # Whether all problems have taken the same, static number of steps.
        self.even = self.solver.static and "step_budget" not in inputs.options
        self.total: Any = 2 * inputs.max_steps
        if not self.even:
            self.total = 2 * unvmap_max(jnp.max(trail.steps, initial=0))

    def run(self, ct_value: PyTree) -> tuple[_Carry, Reals]:
        """Everything added up, and the size of the states for comparison."""
        (a, b), y0, k = self.trail.pair, self.inputs.y0, self.solver.batch_ndim
        gradient = jtu.tree_map(
            lambda p: jnp.zeros_like(p, dtype=_tree.wide(p.dtype)), self.moving
        )
        # Not a number, so that no drift is accepted, where an entry has left the grid.
        answer = self.calculus.answer(a, b, self.trail.unit, y0, k)
        size = jnp.maximum(_tree.max_abs(y0, k), _tree.max_abs(answer, k))
        self._shape = size.shape
        carry = _Carry(
            a,
            b,
            self._point(self.total - 1, a),
            _tree.zeros_like(ct_value),
            ct_value,
            gradient,
            jnp.zeros_like(size),
        )
        if self.ct_aux is not None and not self.solver.static:
            # aux came from the evaluation that tested the answer, of which no step
            # was made.
            answer = _tree.where(self.trail.steps == 0, y0, self._decode(b))
            _, pull = jax.vjp(self.evaluate, answer, self.moving)
            g_z, g_moving = pull((_tree.zeros_like(y0), self.ct_aux))
            carry = eqx.tree_at(
                lambda c: (c.ct_b, c.gradient),
                carry,
                (add(ct_value, g_z), add(gradient, g_moving)),
            )
        if self.unrolled:
            for i in range(self.total):
                carry = self._half(i, carry)
        else:
            carry = lax.fori_loop(0, self.total, self._half, carry)
        if self.every is None:
            # After the loop: on a mesh a maximum over all entries is communication.
            drift = self._distance((carry.a, carry.b), (self.start, self.start))
            carry = eqx.tree_at(lambda c: c.drift, carry, drift)
        return carry, size

    def _distance(self, pair: PyTree, known: PyTree) -> Reals:
        off = self.calculus.distance(
            pair, known, self.trail.unit, self.solver.batch_ndim
        )
        # A difference that is not a number is one.
        return jnp.where(jnp.isnan(off), jnp.inf, off)

    def _decode(self, carrier: PyTree) -> PyTree:
        return self.calculus.decode(carrier, self.trail.unit, self.inputs.y0)

    def _half(self, i: Any, carry: _Carry) -> _Carry:
        """Undo half step h = total − 1 − i."""
        h, trail = self.total - 1 - i, self.trail
        active = None if self.even else h < 2 * trail.steps
        ct_a, ct_f = self.calculus.pull(carry.ct_b)
        if active is not None:
            ct_f = _tree.where(active, ct_f, _tree.zeros_like(ct_f))
        (f, aux), pull = jax.vjp(self.evaluate, carry.x, self.moving)
        ct_aux = _tree.zeros_like(aux)
        if self.ct_aux is not None and self.solver.static:
            last = jnp.asarray(i == 0)
            ct_aux = jtu.tree_map(
                lambda t, z: jnp.where(last, t, z), self.ct_aux, ct_aux
            )
        g_z, g_moving = pull((ct_f, ct_aux))
        digits = take(trail.digits, h)
        before = self.calculus.retreat(carry.b, f, trail.unit, digits)
        pair, drift = self._compare(h, (before, carry.a), carry.drift, active, g_z)
        if active is not None:
            pair = _tree.where(active, pair, (carry.a, carry.b))
            ct_a = _tree.where(active, ct_a, carry.ct_a)
        ct_b = add(carry.ct_a, g_z)
        if active is not None:
            ct_b = _tree.where(active, ct_b, carry.ct_b)
        return _Carry(
            a=pair[0],
            b=pair[1],
            x=self._point(h - 1, pair[0]),
            ct_a=ct_a,
            ct_b=ct_b,
            gradient=add(carry.gradient, g_moving),
            drift=drift,
        )

    def _point(self, h: Any, a: PyTree) -> PyTree:
        """Where half step h evaluated f: the first one at z₀, not at its grid point."""
        y0 = self.inputs.y0
        if self.unrolled:
            return y0 if h == 0 else self.calculus.point(a, self.trail.unit, y0)
        first = jnp.broadcast_to(h == 0, self._shape)
        return _tree.where(first, y0, self.calculus.point(a, self.trail.unit, y0))

    def _compare(
        self, h: Any, pair: PyTree, drift: Reals, active: Any, pulled: PyTree
    ) -> tuple[PyTree, Reals]:
        """At an anchor: measure the drift of its segment, and go on from it."""
        every = self.every
        if every is None:
            return pair, drift
        here = jnp.asarray(h % (2 * every) == 0)
        index = h // (2 * every)
        if self.unrolled:
            # Not before this half step has been pulled back: XLA would begin with the
            # evaluations of all of them, and hold the activations of all.
            index = index + _zero_after(pulled)
        known = take(self.trail.anchors, index)
        off = self._distance(pair, known)
        if active is not None:
            here = here & active
        drift = jnp.where(here, jnp.maximum(drift, off), drift)
        return _tree.where(jnp.broadcast_to(here, drift.shape), known, pair), drift


def _zero_after(x: PyTree) -> Array:
    """0, which XLA does not know before it has computed x."""
    entries = jnp.ravel(jtu.tree_leaves(x)[0])[:1]
    return jnp.sum((entries == entries) & (entries != entries), dtype=jnp.int32)


def add(x: PyTree, y: PyTree) -> PyTree:
    """x + y in the dtype of x."""
    return jtu.tree_map(lambda a, b: a + b.astype(a.dtype), x, y)
