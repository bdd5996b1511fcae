"""Linear maps that shift with the pixels, in the Fourier domain.

A map of circular images that commutes with shifts multiplies every frequency by a
matrix. One that commutes with shifts by two pixels does so after blocks of 2 × 2 pixels
have become channels.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from .._tree import wide
from ._inverse import HIGHEST, inverse

Grid: TypeAlias = Float[Array, "batch _ _ _"]
# Two convolutions 3 × 3, of blocks of one pixel; of larger blocks, less.
REACH = 2


def _pack(z: Grid, period: int) -> Grid:
    """Blocks of period × period pixels become channels."""
    n, c, h, w = z.shape
    p = period
    z = z.reshape(n, c, h // p, p, w // p, p)
    return z.transpose(0, 1, 3, 5, 2, 4).reshape(n, c * p * p, h // p, w // p)


def _unpack(z: Grid, period: int) -> Grid:
    """The inverse of `_pack`."""
    n, k, h, w = z.shape
    p = period
    z = z.reshape(n, k // (p * p), p, p, h, w).transpose(0, 1, 4, 2, 5, 3)
    return z.reshape(n, k // (p * p), h * p, w * p)


def symbol_of(
    fn: Callable[[Grid], Grid], like: Grid, period: int
) -> Complex[Array, "height width outputs inputs"]:
    """The matrices by which `fn` multiplies each frequency, from its impulse responses.

    They are measured on a small image, for `fn` reaches no further than `REACH` blocks.
    A map with stride has one pixel of output for each block of the input.
    """
    _, channels, height, width = like.shape
    h, w = height // period, width // period
    small_h, small_w = min(h, 2 * REACH + 1), min(w, 2 * REACH + 1)
    k = channels * period**2
    impulses = (
        jnp.zeros((k, k, small_h, small_w), like.dtype)
        .at[:, :, 0, 0]
        .set(jnp.eye(k, dtype=like.dtype))
    )
    responses = fn(_unpack(impulses, period))
    responses = _pack(responses, responses.shape[2] // small_h)
    responses = responses.astype(wide(like.dtype))
    down, right = _offsets(small_h), _offsets(small_w)
    turns = (
        np.arange(h)[:, None, None, None] * down[:, None] / h
        + np.arange(w // 2 + 1)[:, None, None] * right / w
    )
    part = lambda wave: jnp.einsum(
        "hwab,ioab->hwoi",
        jnp.asarray(wave(-2 * np.pi * turns), responses.dtype),
        responses,
        precision=HIGHEST,
    )
    return lax.complex(part(np.cos), part(np.sin))


def _offsets(size: int) -> np.ndarray:
    """How far each pixel is from the first, around a circle."""
    return (np.arange(size) + size // 2) % size - size // 2


def invert(
    symbol: Complex[Array, "height width n n"],
) -> Float[Array, "height width 2*n 2*n"]:
    """Inverses, as real matrices that act on real and imaginary parts.

    Not every accelerator inverts complex matrices, and what an adjoint keeps has to be
    real.
    """
    re, im = jnp.real(symbol), jnp.imag(symbol)
    return jax.vmap(jax.vmap(inverse))(jnp.block([[re, -im], [im, re]]))


def apply_inverse(
    inverses: Float[Array, "height width twice twice"], z: Grid, period: int
) -> Grid:
    """What `invert` returned, applied to images."""
    packed = _pack(z.astype(wide(z.dtype)), period)
    spectrum = jnp.fft.rfft2(packed)
    parts = jnp.concatenate([jnp.real(spectrum), jnp.imag(spectrum)], 1)
    parts = jnp.einsum("hwoi,nihw->nohw", inverses, parts, precision=HIGHEST)
    out = jnp.fft.irfft2(lax.complex(*jnp.split(parts, 2, 1)), s=packed.shape[2:])
    return _unpack(out, period).astype(z.dtype)


def identity(matrices: Array) -> Array:
    return jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
