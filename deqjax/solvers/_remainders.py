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
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, PyTree

from .. import _tree

# log₂ of the largest entry with the unit of its row over the row's typical size.
_HEADROOM, _HEADROOM_NARROW = 5, 3

# Binary digits of what is multiplied in products and convolutions of float32 states, by
# their precision: GPUs take TF32 for all but the highest, TPUs one or three bfloat16.
_PRODUCTS = {
    "cuda": {lax.Precision.DEFAULT: 11, lax.Precision.HIGH: 11},
    "tpu": {lax.Precision.DEFAULT: 8, lax.Precision.HIGH: 16},
    "default": {},
}


class Lost(eqx.Module):
    """What one half step loses.

    Attributes:
        codes: per entry, an integer of `bits` bits (two to a byte if they are 4).
        sizes: per row, the exponent of its typical size.
    """

    codes: PyTree
    sizes: PyTree


class Remainders(eqx.Module):
    """Records what half steps lose, and undoes half steps.

    Args:
        betas: the weight on f of every leaf.
        z: an example of the state.
        digits: binary digits of the least precise numbers in f, by platform.
        bits: bits per entry and half step: 4, 8 or 16.
        batch_ndim: leading axes that index problems.
    """

    bits: int = eqx.field(static=True)
    batch_ndim: int = eqx.field(static=True)
    # Of every leaf, log₂ of the unit over the size that it follows.
    shared_unit: PyTree
    own_unit: PyTree
    # Of every leaf, log₂ of the largest entry with the row's unit over the row's size.
    headroom: PyTree

    def __init__(
        self,
        betas: PyTree,
        z: PyTree,
        digits: dict[str, int],
        bits: int,
        batch_ndim: int,
    ):
        self.bits, self.batch_ndim = bits, batch_ndim

        def numbers(digits: int) -> tuple[PyTree, PyTree, PyTree]:
            def unit(x: Array, beta: Any, shared: bool) -> Any:
                modulus = self._modulus if shared else self._own_modulus
                return _unit(_digits(x.dtype), digits, beta, modulus, shared)

            def headroom(x: Array) -> int:
                narrow = min(_digits(x.dtype), digits) <= 16
                return _HEADROOM_NARROW if narrow else _HEADROOM

            units = lambda shared: jtu.tree_map(
                lambda x, beta: unit(x, beta, shared), z, betas
            )
            return units(True), units(False), jtu.tree_map(headroom, z)

        found = _of_platform({p: numbers(n) for p, n in digits.items()})
        self.shared_unit, self.own_unit, self.headroom = found

    @property
    def _modulus(self) -> int:
        return 3 * 2 ** (self.bits - 2)

    @property
    def _own_modulus(self) -> int:
        return 2 ** (self.bits - 3)

    def record(self, a: PyTree, b: PyTree, f: PyTree, new: PyTree) -> Lost:
        """What is lost of a when `new` = (1 − β) a + β f, f = f(b), replaces it."""

        def leaf(
            a: Array,
            b: Array,
            f: Array,
            new: Array,
            shared_unit: Any,
            own_unit: Any,
            headroom: Any,
        ) -> tuple[Array, Array]:
            digits = _digits(a.dtype)
            a, b, f, new = (x.astype(_tree.wide(x.dtype)) for x in (a, b, f, new))
            size = self._typical(f, digits)
            unit = _power(size + shared_unit, a.dtype)
            shared = _remainder(a / unit, self._modulus)
            largest = jnp.maximum(jnp.maximum(abs(b), abs(f)), abs(new))
            exponent, _ = _exponent(largest)
            unit = _power(_normal(exponent + 1, digits, a.dtype) + own_unit, a.dtype)
            own = _remainder(a / unit, self._own_modulus)
            own += self._modulus + (exponent & 1) * self._own_modulus
            exponent, _ = _exponent(jnp.maximum(largest, abs(a)))
            shares = exponent < size + headroom
            return _pack(jnp.where(shares, shared, own), self.bits), size.astype(
                "int16"
            )

        trees = (a, b, f, new, self.shared_unit, self.own_unit, self.headroom)
        return Lost(*_unzip(leaf, *trees, like=a))

    def undo(
        self,
        b: PyTree,
        f: PyTree,
        new: PyTree,
        betas: PyTree,
        record: Lost,
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
            size: Array,
            start: Array,
            shared_unit: Any,
            own_unit: Any,
        ) -> tuple[Array, Array]:
            dtype, digits = b.dtype, _digits(b.dtype)
            b, f, new, start = (x.astype(_tree.wide(dtype)) for x in (b, f, new, start))
            code = _unpack(codes, self.bits, b.shape)
            shares, own = code < self._modulus, code - self._modulus
            largest = jnp.maximum(jnp.maximum(abs(b), abs(f)), abs(new))
            exponent, upper = _exponent(largest)
            # The size recorded was that of a neighbour across a power of two.
            crossed = (exponent & 1) != (own // self._own_modulus)
            exponent += jnp.where(crossed, jnp.where(upper, 1, -1), 0)
            exponent = _normal(exponent + 1, digits, b.dtype) + own_unit
            exponent = jnp.where(shares, size.astype(jnp.int32) + shared_unit, exponent)
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

        trees = (f, new, betas, record.codes, record.sizes, start)
        return _unzip(leaf, b, *trees, self.shared_unit, self.own_unit, like=b)

    def _typical(self, f: Array, digits: int) -> Array:
        """Per row, the exponent of the typical size of its entries.

        It is that of f: entries at which f is 0 are on their way from the start to 0,
        and any size may be found among them. It is the power mean with exponent −¼,
        which hardly changes if half of a row is far larger than the other half, or a
        few entries are far larger or smaller than all others.
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
        size = mean - 4 * jnp.log2(jnp.maximum(total(power) / count, 1e-9))
        size = jnp.where(total(seen) > 0, jnp.ceil(size), info.minexp)
        return _normal(size.astype(jnp.int32), digits, f.dtype)


def _unit(digits: int, digits_f: int, beta: Any, modulus: int, shared: bool) -> Any:
    """log₂ of the unit over the size that it follows.

    A guess is off by (½ + β d) / (1 − β) units if evaluations are d units apart; the
    unit is so coarse that this is half of the capacity for a d that is to be expected.
    """
    narrow = min(digits, digits_f) <= 16
    finest = digits
    if shared:
        # Entries around the typical size lose no digit, or few of many.
        finest = digits if digits <= 16 else digits - 3
        expected = 12.0 if digits <= 16 else 16.0
    else:
        expected = 2.0 if narrow else 8.0
    noise = finest
    if digits_f < digits:
        noise = digits_f + 1 if shared and digits_f <= 16 else digits_f
    extra = finest - min(noise, finest)

    def needed(beta: Any) -> Any:
        return (0.5 + expected * beta) / (1 - beta) / (modulus / 4)

    if isinstance(beta, float | int):
        return max(0, extra + math.ceil(math.log2(needed(beta)))) - finest
    log2 = jnp.log2(needed(lax.stop_gradient(beta).astype(jnp.float32)))
    return jnp.maximum(0, extra + jnp.ceil(log2).astype(jnp.int32)) - finest


def least_digits(fn: Callable, z: PyTree, args: PyTree) -> dict[str, int]:
    """Binary digits of the least precise numbers that fn computes, by platform."""
    own = [_digits(x.dtype) for x in jtu.tree_leaves(z)]
    found = {platform: list(own) for platform in _PRODUCTS}

    def visit(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            dtypes = [getattr(v.aval, "dtype", jnp.bool_) for v in eqn.outvars]
            inexact = [d for d in dtypes if jnp.issubdtype(d, jnp.inexact)]
            for platform, digits in found.items():
                digits.extend(_digits(d) for d in inexact)
                digits.append(_rounded_to(eqn, _PRODUCTS[platform]))
            params = list(eqn.params.values())
            for inner in jtu.tree_leaves(params, is_leaf=lambda p: hasattr(p, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(eqx.filter_make_jaxpr(fn)(z, args)[0].jaxpr)
    return {platform: min(digits) for platform, digits in found.items()}


def _rounded_to(eqn: Any, products: dict[lax.Precision, int]) -> int:
    """Binary digits to which an equation rounds its operands; many if it does not."""
    many = 53
    if eqn.primitive.name == "reduce_precision":
        return eqn.params["mantissa_bits"] + 1
    # Products of matrices, convolutions.
    if "precision" not in eqn.params:
        return many
    if all(v.aval.dtype != jnp.float32 for v in eqn.invars):
        return many
    precision = eqn.params["precision"]
    if not isinstance(precision, tuple):
        precision = (precision,)
    kinds = (lax.Precision.DEFAULT if p is None else p for p in precision)
    # An algorithm that somebody has named is taken by what its name says.
    named = {"TF32_TF32_F32": 11, "BF16_BF16_F32": 8, "F16_F16_F32": 11}
    return min(products.get(k, named.get(getattr(k, "name", ""), many)) for k in kinds)


def _of_platform(numbers: dict[str, PyTree]) -> PyTree:
    """The numbers of the platform that the program is compiled for."""
    static = not any(eqx.is_array(x) for x in jtu.tree_leaves(numbers))
    if static and all(x == numbers["default"] for x in numbers.values()):
        return numbers["default"]
    as_arrays = lambda x: lambda: jtu.tree_map(jnp.int32, x)
    return lax.platform_dependent(**{p: as_arrays(x) for p, x in numbers.items()})


def _digits(dtype: Any) -> int:
    """Binary digits of a number."""
    return int(jnp.finfo(dtype).nmant) + 1


def _normal(exponent: Array, digits: int, dtype: Any) -> Array:
    """An exponent in the range for which units are normal numbers."""
    info = jnp.finfo(dtype)
    return jnp.clip(exponent, int(info.minexp) + digits, int(info.maxexp) - 1)


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
