"""The arithmetic of the reversible half step, in floats or exactly on a grid.

A half step computes (1 − β) a + β f. In floats, undoing it divides the rounding error
by 1 − β. On a grid it loses nothing: with a and the result integers in units of Δ, and
1 − β = p/q,

    a' = ⌊a p / q⌋ + round(β f / Δ),      r = (a p) mod q,

and r, the digit that the division loses, is all that is needed besides f to go back:

    a = ((a' − round(β f / Δ)) q + r) / p .

The digits are packed, as many base-q digits to a 32-bit word as it can hold. Keeping
the digits that a reversible computation loses is due to Maclaurin, Duvenaud and Adams
(2015), doi:10.48550/arXiv.1502.03492.
"""

import abc
import functools as ft
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._types import Flags, Reals
from ._digits import pack, unpack

MAX_DENOMINATOR = 32
# Bits below the largest entry of z₀ and f(z₀) that the grid resolves; the rest of the
# word is headroom for iterates that grow (by 2⁵ and 2⁷).
_RESOLUTION = {"int32": 26, "int64": 56}


class AbstractArithmetic(eqx.Module):
    """How the two states of the reversible iteration are represented and updated.

    Their representations are called carriers; `unit` is what all carriers of a problem
    have in common.
    """

    @abc.abstractmethod
    def unit(self, z0: PyTree, f0: PyTree, batch_ndim: int) -> Any:
        """The common unit, from the start and its image."""

    @abc.abstractmethod
    def encode(self, z: PyTree, unit: Any) -> PyTree:
        """The carrier of z."""

    @abc.abstractmethod
    def decode(self, carrier: PyTree, unit: Any, like: PyTree) -> PyTree:
        """The state that a carrier stands for, in the dtypes of `like`."""

    def point(self, carrier: PyTree, unit: Any, like: PyTree) -> PyTree:
        """As `decode`, for the argument of f; what has left the grid is not marked."""
        return self.decode(carrier, unit, like)

    def answer(
        self, a: PyTree, b: PyTree, unit: Any, like: PyTree, batch_ndim: int
    ) -> PyTree:
        """The state b of a pair; NaN in problems in which either has left the grid."""
        return self.decode(b, unit, like)

    @abc.abstractmethod
    def advance(self, a: PyTree, f: PyTree, unit: Any) -> tuple[PyTree, PyTree]:
        """The carrier of (1 − β) a + β f, and the packed digits (None if none)."""

    @abc.abstractmethod
    def retreat(self, b: PyTree, f: PyTree, unit: Any, digits: PyTree) -> PyTree:
        """The carrier a from which `advance` made b."""

    @abc.abstractmethod
    def distance(self, x: PyTree, y: PyTree, unit: Any, batch_ndim: int) -> Reals:
        """The largest difference of two carriers of a problem, as states."""

    @abc.abstractmethod
    def weights(self) -> tuple[Any, Any]:
        """(1 − β, β)."""

    def pull(self, cotangent: PyTree) -> tuple[PyTree, PyTree]:
        """The cotangents of a and f in `advance`."""
        one_minus_beta, beta = self.weights()
        return _scaled(one_minus_beta, cotangent), _scaled(beta, cotangent)

    def average(self, a: PyTree, f: PyTree) -> PyTree:
        """(1 − β) a + β f in floats, rounded once to the dtype of the state."""
        one_minus_beta, beta = self.weights()

        def leaf(a: Array, f: Array) -> Array:
            dtype = _tree.wide(a.dtype)
            u, v = (jnp.asarray(w, dtype) for w in (one_minus_beta, beta))
            return (u * a.astype(dtype) + v * f.astype(dtype)).astype(a.dtype)

        return jtu.tree_map(leaf, a, f)


class FloatArithmetic(AbstractArithmetic):
    """States in their own dtype; going back amplifies rounding."""

    beta: Any

    def unit(self, z0: PyTree, f0: PyTree, batch_ndim: int) -> None:
        return None

    def encode(self, z: PyTree, unit: Any) -> PyTree:
        return z

    def decode(self, carrier: PyTree, unit: Any, like: PyTree) -> PyTree:
        return carrier

    def advance(self, a: PyTree, f: PyTree, unit: Any) -> tuple[PyTree, PyTree]:
        return self.average(a, f), None

    def retreat(self, b: PyTree, f: PyTree, unit: Any, digits: PyTree) -> PyTree:
        def leaf(b: Array, f: Array) -> Array:
            dtype = _tree.wide(b.dtype)
            u, v = (jnp.asarray(w, dtype) for w in self.weights())
            return ((b.astype(dtype) - v * f.astype(dtype)) / u).astype(b.dtype)

        return jtu.tree_map(leaf, b, f)

    def distance(self, x: PyTree, y: PyTree, unit: Any, batch_ndim: int) -> Reals:
        return _tree.max_abs(_tree.subtract(x, y), batch_ndim)

    def weights(self) -> tuple[Any, Any]:
        return 1 - self.beta, self.beta


class ExactArithmetic(AbstractArithmetic):
    """States as integers on a grid; going back restores every bit.

    An entry that leaves the grid, or meets a value that is not a number, turns into a
    mark that stays and decodes to NaN; it never wraps around.

    Attributes:
        p: numerator of 1 − β.
        q: its denominator.
        base: the largest q that may occur, the base in which digits are packed.
    """

    p: Any
    q: Any
    base: int = eqx.field(static=True)

    def weights(self) -> tuple[Any, Any]:
        if isinstance(self.q, int):
            return self.p / self.q, (self.q - self.p) / self.q
        dtype = jnp.result_type(float)
        p, q = self.p.astype(dtype), self.q.astype(dtype)
        return p / q, (q - p) / q

    def unit(self, z0: PyTree, f0: PyTree, batch_ndim: int) -> Reals:
        """A power of two per problem, above the largest entry of z₀ and f(z₀).

        The grid of a leaf is this unit divided by its resolution.
        """
        z0, f0 = lax.stop_gradient((z0, f0))
        largest = jnp.maximum(
            _tree.max_abs(z0, batch_ndim), _tree.max_abs(f0, batch_ndim)
        )
        usable = (largest > 0) & jnp.isfinite(largest)
        _, exponent = jnp.frexp(jnp.where(usable, largest, 1))
        # Not so small that Δ is no normal number. (exp2 is not exact everywhere.)
        least = max(_least_exponent(x.dtype) for x in jtu.tree_leaves(z0))
        return jnp.ldexp(jnp.ones_like(largest), jnp.maximum(exponent, least))

    def encode(self, z: PyTree, unit: Reals) -> PyTree:
        return jtu.tree_map(lambda x: _to_grid(_wide(x), _delta(unit, x)), z)

    def decode(self, carrier: PyTree, unit: Reals, like: PyTree) -> PyTree:
        point = self.point(carrier, unit, like)
        return jtu.tree_map(
            lambda i, x: jnp.where(_marked(i), jnp.nan, x), carrier, point
        )

    def point(self, carrier: PyTree, unit: Reals, like: PyTree) -> PyTree:
        # One product with a power of two, which is exact. A select here, once fused
        # into f, keeps LLVM from contracting what follows to a fused multiply-add in
        # one of the two passes and not in the other.
        def leaf(i: Array, x: Array) -> Array:
            delta = _delta(unit, x)
            return (i.astype(delta.dtype) * delta).astype(x.dtype)

        return jtu.tree_map(leaf, carrier, like)

    def answer(
        self, a: PyTree, b: PyTree, unit: Reals, like: PyTree, batch_ndim: int
    ) -> PyTree:
        # f has been evaluated at the point of a marked entry, which is a number: what
        # became of the other entries is of no use, finite as it may be.
        lost = _any_entry(_marked, (a, b), batch_ndim)
        z = self.decode(b, unit, like)
        return jtu.tree_map(
            lambda x: jnp.where(_tree.expand(lost, x), jnp.nan, x).astype(x.dtype), z
        )

    def advance(self, a: PyTree, f: PyTree, unit: Reals) -> tuple[PyTree, PyTree]:
        _, beta = self.weights()

        def leaf(a: Array, f: Array) -> tuple[Array, Array]:
            p, q = _like(self.p, a), _like(self.q, a)
            scaled = _scaled_to_grid(_wide(f), beta, _delta(unit, f))
            # Divided first: a p would not fit.
            quotient, rest = _floor_divide(a, q)
            whole = isinstance(p, int) and p == 1
            small, digit = (0, rest) if whole else _floor_divide(rest * p, q)
            new = quotient * p + small + scaled.astype(a.dtype)
            limit = _limit(a.dtype)
            inside = (jnp.abs(scaled) <= limit) & (jnp.abs(new) <= limit)
            new = jnp.where(inside, new, _mark(scaled, a.dtype))
            new = jnp.where(_marked(a), a, new)
            return new, pack(digit.astype(jnp.uint32), self.base)

        # Not by the type of a leaf: the state may hold tuples.
        leaves, treedef = jtu.tree_flatten(a)
        pairs = [leaf(*x) for x in zip(leaves, jtu.tree_leaves(f), strict=True)]
        new, digits = zip(*pairs, strict=True)
        return treedef.unflatten(new), treedef.unflatten(digits)

    def retreat(self, b: PyTree, f: PyTree, unit: Reals, digits: PyTree) -> PyTree:
        _, beta = self.weights()

        def leaf(b: Array, f: Array, words: Array) -> Array:
            digit = unpack(words, self.base, b.shape).astype(b.dtype)
            scaled = _scaled_to_grid(_wide(f), beta, _delta(unit, f))
            rest = b - scaled.astype(b.dtype)
            # (rest q + r) / p, without the product: rest = s p + t, 0 ≤ t < p.
            p, q = _like(self.p, b), _like(self.q, b)
            s, t = _floor_divide(rest, p)
            return s * q + _floor_divide(t * q + digit, p)[0]

        return jtu.tree_map(leaf, b, f, digits)

    def distance(self, x: PyTree, y: PyTree, unit: Reals, batch_ndim: int) -> Reals:
        def leaf(i: Array, j: Array) -> Array:
            dtype = jnp.float64 if i.dtype == jnp.int64 else jnp.float32
            # Neighbours on the grid may round to the same float.
            apart = jnp.maximum(jnp.abs(i.astype(dtype) - j.astype(dtype)), 1)
            apart = apart * _delta(unit, apart)
            return jnp.where(i == j, 0, apart)

        return _tree.max_abs(jtu.tree_map(leaf, x, y), batch_ndim)


def overflowed(carriers: PyTree, batch_ndim: int) -> Flags:
    """Whether an entry of a problem has left the grid."""
    return _any_entry(lambda i: i == _over(i.dtype), carriers, batch_ndim)


def fraction(beta: float) -> Fraction:
    """1 − β as a fraction p/q with q ≤ 32.

    Raises:
        ValueError: if there is none; the message names the nearest ones.
    """
    exact = 1 - Fraction(beta)
    near = exact.limit_denominator(MAX_DENOMINATOR)
    if abs(near - exact) <= 1e-9 and 0 < near < 1:
        return near
    fractions = {
        Fraction(p, q) for q in range(2, MAX_DENOMINATOR + 1) for p in range(1, q)
    }
    below = max((1 - r for r in fractions if 1 - r < beta), default=None)
    above = min((1 - r for r in fractions if 1 - r > beta), default=None)
    names = " and ".join(f"{float(b):.6g} ({b})" for b in (below, above) if b)
    raise ValueError(
        f"`beta` must be a fraction with a denominator ≤ {MAX_DENOMINATOR} for "
        f'`arithmetic="exact"`; got {beta!r}. The nearest are {names}. Any beta '
        'works with `arithmetic="float"`.'
    )


# Integers


def _integer(dtype: Any) -> Any:
    return jnp.dtype(jnp.int64 if jnp.dtype(dtype).itemsize == 8 else jnp.int32)


def _limit(dtype: Any) -> int:
    """The largest magnitude on the grid: two of them can be added."""
    return 2 ** (jnp.iinfo(dtype).bits - 2) - 1


def _over(dtype: Any) -> int:
    """The mark of an entry that has left the grid."""
    return int(jnp.iinfo(dtype).min)


def _nan(dtype: Any) -> int:
    """The mark of an entry that is not a number."""
    return int(jnp.iinfo(dtype).min) + 1


def _marked(i: Array) -> Array:
    return i <= _nan(i.dtype)


def _wide(x: Array) -> Array:
    return x.astype(_tree.wide(x.dtype))


def _delta(unit: Reals, x: Array) -> Array:
    """Δ for the entries of x, in the dtype in which x is put on the grid."""
    dtype = _tree.wide(x.dtype)
    resolution = 2.0 ** -_RESOLUTION[_integer(dtype).name]
    return _tree.expand(unit, x).astype(dtype) * resolution


def _least_exponent(dtype: Any) -> int:
    """Of a unit whose Δ, and 1/Δ, are normal numbers."""
    dtype = _tree.wide(dtype)
    return int(jnp.finfo(dtype).minexp) + _RESOLUTION[_integer(dtype).name] + 2


def _scaled_to_grid(x: Array, weight: Any, delta: Array) -> Array:
    """round(weight x / Δ), still as a float."""
    return jnp.round(x * (jnp.asarray(weight, x.dtype) / delta))


def _mark(scaled: Array, dtype: Any) -> Array:
    return jnp.where(jnp.isnan(scaled), _nan(dtype), _over(dtype)).astype(dtype)


def _to_grid(x: Array, delta: Array) -> Array:
    """round(x / Δ) as an integer, or a mark."""
    dtype = _integer(x.dtype)
    scaled = _scaled_to_grid(x, 1, delta)
    inside = jnp.abs(scaled) <= _limit(dtype)
    return jnp.where(inside, scaled.astype(dtype), _mark(scaled, dtype))


def _floor_divide(a: Array, n: Any) -> tuple[Array, Array]:
    """⌊a/n⌋ and a mod n ≥ 0, for n > 0."""
    if isinstance(n, int):
        if n == 1:
            return a, jnp.zeros_like(a)
        if n & (n - 1) == 0:
            return a >> (n.bit_length() - 1), a & (n - 1)
    quotient = lax.div(a, jnp.broadcast_to(jnp.asarray(n, a.dtype), a.shape))
    rest = a - quotient * n
    negative = rest < 0
    return quotient - negative.astype(a.dtype), jnp.where(negative, rest + n, rest)


def _like(n: Any, x: Array) -> Any:
    return n if isinstance(n, int) else n.astype(x.dtype)


def _any_entry(test: Callable, carriers: PyTree, batch_ndim: int) -> Flags:
    """Whether an entry of a problem passes a test."""
    parts = [
        jnp.any(test(i), axis=tuple(range(batch_ndim, i.ndim)))
        for i in jtu.tree_leaves(carriers)
    ]
    return ft.reduce(jnp.logical_or, parts)


def _scaled(weight: Any, x: PyTree) -> PyTree:
    def leaf(t: Array) -> Array:
        dtype = _tree.wide(t.dtype)
        return (jnp.asarray(weight, dtype) * t.astype(dtype)).astype(t.dtype)

    return jtu.tree_map(leaf, x)


@jax.custom_jvp
def with_tangent_of(value: Array, update: Array) -> Array:
    """`value`, with the derivative of `update`: of the step, not of its rounding."""
    return value


@with_tangent_of.defjvp
def _with_tangent_of_jvp(primals, tangents):
    value, update = primals
    return with_tangent_of(value, update), tangents[1]
