"""Digits of a small base, packed into 32-bit words."""

import functools as ft
import math

import jax.numpy as jnp
from jaxtyping import Array


def per_word(base: int) -> int:
    """How many digits of that base fit into 32 bits."""
    return math.floor(32 / math.log2(base) + 1e-9)


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """Digits are packed within the entries of the first axis: it may be sharded."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def pack(digits: Array, base: int) -> Array:
    """Digits in [0, base), uint32, to words of `per_word(base)` digits."""
    rows, size = _rows(digits.shape)
    count = min(per_word(base), max(size, 1))
    width = -(-size // count)
    flat = digits.reshape(rows, size)
    flat = jnp.pad(flat, ((0, 0), (0, count * width - size)))
    # Digit i of all words lies together, so that packing is a sum of whole vectors.
    parts = [flat[:, i * width : (i + 1) * width] for i in range(count)]
    return ft.reduce(lambda high, low: high * jnp.uint32(base) + low, parts[::-1])


def unpack(words: Array, base: int, shape: tuple[int, ...]) -> Array:
    """The digits that `pack` made into `words`."""
    size = _rows(shape)[1]
    count = min(per_word(base), max(size, 1))
    parts = [words // jnp.uint32(base**i) % jnp.uint32(base) for i in range(count)]
    return jnp.concatenate(parts, axis=1)[:, :size].reshape(shape)
