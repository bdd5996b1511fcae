"""What a half step loses of a state, and how it is found again.

A half step replaces the state a by a' = (1 − β) a + β f(b). Going back, f̃ is another
evaluation of f at b, perhaps not to the same bits, and (a' − β f̃) / (1 − β) is a guess
of a with

    |guess − a| ≤ (ρ + β |f̃ − f|) / (1 − β),    ρ: the roundings of a' and of the guess.

The guess is off by few units Δ in the last place of a, so that a remainder of
n = round(a / Δ) modulo M suffices to find n: of all integers with that remainder it is
the one closest to guess / Δ, if the guess is off by less than the *capacity* M Δ / 2.

**Units.** A row is what shares the index of the first axis of a leaf (or of the batch
axes). Its entries share one unit, from the typical size of the row: two evaluations
differ by the last place of the numbers that f adds up, which may be far larger than the
last place of an entry that happens to be small. The exponent of each row is recorded.
An entry far above its row (a massive activation) has a unit of its own, from its own
size. The reverse sweep knows that size up to rounding, hence its exponent up to one,
and a recorded bit settles it. The code of an entry tells which unit it has:

    0 … ¾ 2ᵐ − 1         n mod ¾ 2ᵐ, in the unit of the row
    ¾ 2ᵐ … 2ᵐ − 1        n mod ⅛ 2ᵐ and the parity of the exponent, in its own unit

All of this is exact in floating point: units are powers of two, and n has no more
digits than a state.

Storing what a reversible computation loses is due to D. Maclaurin, D. Duvenaud, R. P.
Adams (2015), doi:10.48550/arXiv.1502.03492.
"""

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, PyTree

from .. import _tree

# How far two evaluations of f may be apart at half of the capacity, in last places of
# the row's bound. Results of 16 bits are accumulated in 32 and differ by a rounding.
_GUARD = {2: 2.0, 4: 16.0, 8: 16.0}
# log₂ of a row's bound over its typical size. Larger entries have a unit of their own.
_HEADROOM = 3


class Record(eqx.Module):
    """What one half step loses.

    Attributes:
        codes: per entry, an integer of `bits` bits (two to a byte if they are 4).
        tops: per row, the exponent of the bound of its entries.
    """

    codes: PyTree
    tops: PyTree


class Residues(eqx.Module):
    """Records what half steps lose, and undoes half steps.

    Args:
        betas: the weight on f of every leaf.
        z: an example of the state.
        bits: bits per entry and half step: 4, 8 or 16.
        batch_ndim: leading axes that index problems.
    """

    bits: int = eqx.field(static=True)
    batch_ndim: int = eqx.field(static=True)
    # By how many binary digits the unit is coarser than the last place of the bound.
    coarse: PyTree
    coarse_own: PyTree

    def __init__(self, betas: PyTree, z: PyTree, bits: int, batch_ndim: int):
        self.bits, self.batch_ndim = bits, batch_ndim
        for_modulus = lambda modulus: jtu.tree_map(
            lambda x, beta: _coarseness(x.dtype, beta, modulus), z, betas
        )
        self.coarse = for_modulus(self._modulus)
        self.coarse_own = for_modulus(self._own_modulus)

    @property
    def _modulus(self) -> int:
        return 3 * 2 ** (self.bits - 2)

    @property
    def _own_modulus(self) -> int:
        return 2 ** (self.bits - 3)

    def record(self, a: PyTree, b: PyTree, f: PyTree, new: PyTree) -> Record:
        """What is lost of a when `new` = (1 − β) a + β f, f = f(b), replaces it."""

        def leaf(
            a: Array, b: Array, f: Array, new: Array, coarse: Any, coarse_own: Any
        ) -> tuple[Array, Array]:
            digits = _digits(a.dtype)
            a, b, f, new = (x.astype(_tree.wide(x.dtype)) for x in (a, b, f, new))
            size = jnp.maximum(jnp.maximum(abs(b), abs(f)), abs(new))
            top = self._bound(f, digits)
            unit = _power(top - digits + coarse, a.dtype)
            code = _remainder(a / unit, self._modulus)
            own, _ = _exponent(size)
            unit = _power(_at_least(own + 1, digits, a) - digits + coarse_own, a.dtype)
            code_own = _remainder(a / unit, self._own_modulus)
            code_own += self._modulus + (own & 1) * self._own_modulus
            largest, _ = _exponent(jnp.maximum(size, abs(a)))
            code = jnp.where(largest < top, code, code_own)
            return _pack(code, self.bits), top.astype(jnp.int16)

        codes, tops = _unzip(leaf, a, b, f, new, self.coarse, self.coarse_own, like=a)
        return Record(codes, tops)

    def undo(
        self,
        b: PyTree,
        f: PyTree,
        new: PyTree,
        betas: PyTree,
        record: Record,
        start: PyTree,
        at_start: Bool[Array, ""],
    ) -> tuple[PyTree, PyTree]:
        """The state a that `new` has replaced, and the part of the capacity needed.

        Args:
            b: the point of the evaluation.
            f: f(b), as evaluated now.
            new: what replaced a.
            betas: the weight on f of every leaf.
            record: what `record` returned.
            start: z₀.
            at_start: whether a is known to be z₀. It becomes z₀ if it agrees with z₀
                to the resolution of the record, and differs from z₀ otherwise.
        """

        def leaf(
            b: Array,
            f: Array,
            new: Array,
            beta: Any,
            codes: Array,
            top: Array,
            start: Array,
            coarse: Any,
            coarse_own: Any,
        ) -> tuple[Array, Array]:
            dtype, digits = b.dtype, _digits(b.dtype)
            b, f, new, start = (x.astype(_tree.wide(dtype)) for x in (b, f, new, start))
            code = _unpack(codes, self.bits, b.shape)
            shares = code < self._modulus
            own = code - self._modulus
            exponent, upper = _exponent(
                jnp.maximum(jnp.maximum(abs(b), abs(f)), abs(new))
            )
            # The size recorded was that of a neighbour across a power of two.
            crossed = (exponent & 1) != (own // self._own_modulus)
            exponent += jnp.where(crossed, jnp.where(upper, 1, -1), 0)
            exponent = _at_least(exponent + 1, digits, b) + coarse_own
            shared = top.astype(jnp.int32) + coarse
            exponent = jnp.where(shares, shared, exponent) - digits
            unit, per_unit = _power(exponent, b.dtype), _power(-exponent, b.dtype)
            modulus = jnp.where(shares, self._modulus, self._own_modulus)
            code = jnp.where(shares, code, own % self._own_modulus)
            modulus, code = modulus.astype(unit.dtype), code.astype(unit.dtype)
            beta = jnp.asarray(beta, b.dtype)
            # In units from the start: a difference of the smallest normal numbers, or
            # the product (1 − β) Δ, to which compilers turn two divisions, would be 0.
            guess = (new * per_unit - beta * (f * per_unit)) / (1 - beta)
            n = code + modulus * jnp.round((guess - code) / modulus)
            a = n * unit
            known = at_start & (abs(a - start) <= unit / 2)
            repair = abs(n - guess) / (modulus / 2)
            return jnp.where(known, start, a).astype(dtype), repair

        trees = (f, new, betas, record.codes, record.tops, start)
        return _unzip(leaf, b, *trees, self.coarse, self.coarse_own, like=b)

    def _bound(self, f: Array, digits: int) -> Array:
        """Per row, the exponent of a bound of all entries of a typical size.

        The typical size is that of f: entries at which f is 0 are on their way from the
        start to 0, and any size may be found among them. It is the power mean with
        exponent −¼, which hardly changes if half of a row is far larger than the other
        half, or a few entries are far larger or smaller than all others.
        """
        info = jnp.finfo(f.dtype)
        exponent, _ = _exponent(abs(f))
        axes = tuple(range(max(self.batch_ndim, min(1, f.ndim - 1)), f.ndim))
        total = lambda x: jnp.sum(x, axes, keepdims=True)
        seen = (exponent >= info.minexp) & (exponent < info.maxexp)
        e = exponent.astype(jnp.float32)
        count = jnp.maximum(total(seen.astype(jnp.float32)), 1)
        mean = total(jnp.where(seen, e, 0)) / count
        # Relative to the geometric mean, since single entries may be next to 0.
        power = jnp.where(seen, jnp.exp2(jnp.minimum(mean - e, 16) / 4), 0)
        typical = mean - 4 * jnp.log2(jnp.maximum(total(power) / count, 1e-9))
        top = jnp.ceil(typical).astype(jnp.int32) + _HEADROOM
        top = jnp.where(total(seen) > 0, top, int(info.minexp))
        return jnp.minimum(_at_least(top, digits, f), int(info.maxexp) - 1)


def _coarseness(dtype: Any, beta: Any, modulus: int) -> Any:
    """Binary digits of the last place to give up, so that guesses find their integer.

    A guess is off by (½ + β d) / (1 − β) if evaluations are d units apart.
    """
    guard = _GUARD[jnp.dtype(dtype).itemsize]
    if isinstance(beta, float | int):
        needed = (0.5 + guard * beta) / (1 - beta) / (modulus / 4)
        return max(0, math.ceil(math.log2(needed)))
    beta = lax.stop_gradient(beta).astype(jnp.float32)
    needed = (0.5 + guard * beta) / (1 - beta) / (modulus / 4)
    return jnp.maximum(jnp.ceil(jnp.log2(needed)), 0).astype(jnp.int32)


def _digits(dtype: Any) -> int:
    """Binary digits of a number."""
    return int(jnp.finfo(dtype).nmant) + 1


def _at_least(top: Array, digits: int, like: Any) -> Array:
    """Exponents, but not so small that the unit is no normal number."""
    info = jnp.finfo(getattr(like, "dtype", like))
    return jnp.maximum(top, int(info.minexp) + digits)


def _remainder(x: Array, modulus: int) -> Array:
    """round(x) modulo a positive integer, as an integer."""
    n = jnp.round(x)
    n = n - modulus * jnp.floor(n / modulus)
    # The quotient of a large n is rounded.
    n = jnp.where(n < 0, n + modulus, jnp.where(n >= modulus, n - modulus, n))
    return n.astype(jnp.int32)


def _exponent(x: Array) -> tuple[Array, Array]:
    """e with 2ᵉ ≤ x < 2ᵉ⁺¹ for x > 0, and whether x ≥ ¾ 2ᵉ⁺¹; e is least for x = 0."""

    def of_bits(x: Array, word: Any) -> tuple[Array, Array]:
        info = jnp.finfo(x.dtype)
        bits, nmant = lax.bitcast_convert_type(x, word), int(info.nmant)
        exponent = (bits >> nmant).astype(jnp.int32) + int(info.minexp) - 1
        return exponent, (bits >> (nmant - 1)) & 1 != 0

    if x.dtype != jnp.float64:
        return of_bits(x, jnp.int32)
    # A TPU's float64 is a pair of float32, of which no bits can be had.
    single = lambda x: of_bits(x.astype(jnp.float32), jnp.int32)
    double = lambda x: of_bits(x, jnp.int64)
    return lax.platform_dependent(x, tpu=single, default=double)


def _power(exponent: Array, dtype: Any) -> Array:
    """2 to an integer power, exactly."""

    def of_bits(exponent: Array, dtype: Any, word: Any) -> Array:
        info = jnp.finfo(dtype)
        bits = (exponent - int(info.minexp) + 1).astype(word) << int(info.nmant)
        return lax.bitcast_convert_type(bits, dtype)

    if dtype != jnp.float64:
        return of_bits(exponent, jnp.float32, jnp.int32)
    single = lambda e: of_bits(e, jnp.float32, jnp.int32).astype(jnp.float64)
    double = lambda e: of_bits(e, jnp.float64, jnp.int64)
    return lax.platform_dependent(exponent, tpu=single, default=double)


def _pack(code: Array, bits: int) -> Array:
    if bits != 4 or code.ndim == 0:
        return code.astype(jnp.uint16 if bits == 16 else jnp.uint8)
    width = -(-code.shape[-1] // 2)
    pad = [(0, 0)] * (code.ndim - 1) + [(0, 2 * width - code.shape[-1])]
    pairs = jnp.pad(code, pad).reshape(*code.shape[:-1], width, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).astype(jnp.uint8)


def _unpack(codes: Array, bits: int, shape: tuple[int, ...]) -> Array:
    codes = codes.astype(jnp.int32)
    if bits != 4 or not shape:
        return codes
    pairs = jnp.stack([codes & 15, codes >> 4], -1)
    return pairs.reshape(*shape[:-1], -1)[..., : shape[-1]]


def _unzip(fn: Any, *trees: PyTree, like: PyTree) -> tuple[PyTree, PyTree]:
    """Map a function that returns a pair over the leaves: a pair of trees."""
    treedef = jtu.tree_structure(like)
    leaves = [treedef.flatten_up_to(tree) for tree in trees]
    pairs = [fn(*xs) for xs in zip(*leaves, strict=True)]
    first, second = zip(*pairs, strict=True)
    return treedef.unflatten(first), treedef.unflatten(second)
