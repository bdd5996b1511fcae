"""Rotary positions."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._tree import wide

_BASE = 10_000.0


def check_rotary(dim: int, num_heads: int) -> None:
    """Raise unless the entries of a head can be rotated in pairs."""
    if (dim // num_heads) % 2:
        raise ValueError(
            "`dim` / `num_heads`, the width of a head, must be even for rotary "
            f"positions, which rotate pairs of entries; got {dim} / {num_heads} = "
            f"{dim // num_heads}. Change the one or the other."
        )


def rotate(
    x: Float[Array, "batch length heads head_dim"], start: int | Int[Array, ""]
) -> Float[Array, "batch length heads head_dim"]:
    r"""Queries or keys, rotated by angles that grow with their tokens' positions.

    $$ (x_i, x_{i + d/2}) \mapsto R(p\, \theta_i)\, (x_i, x_{i + d/2}), \qquad
       \theta_i = 10000^{-2i/d}, \quad i < d/2 $$

    with the rotation R of the plane, p the position and d the width of a head. The
    product of a query and a key so rotated depends on the difference of their positions
    alone. Pairs are those of `equinox.nn.RotaryPositionalEmbedding`, which always
    begins at position 0, so that it cannot go on from a cache. Computed in at least
    float32.

    Args:
        x: queries or keys.
        start: position of the first token.

    References:
        J. Su, M. Ahmed, Y. Lu, S. Pan, W. Bo, Y. Liu (2024), RoFormer: Enhanced
        transformer with rotary position embedding, doi:10.1016/j.neucom.2023.127063.
    """
    length, half = x.shape[1], x.shape[-1] // 2
    dtype: Any = wide(x.dtype)
    position = (start + jnp.arange(length, dtype=jnp.int32)).astype(dtype)
    frequency = _BASE ** -(jnp.arange(half, dtype=dtype) / half)
    angle = (position[:, None] * frequency)[:, None]  # (length, 1, half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x.dtype)
