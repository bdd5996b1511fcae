"""Checks of what layers and models are given."""

import math
from collections.abc import Iterable
from typing import Any, TypeAlias

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from .._checks import check_count as check_count, plain, whole
from ..solvers._optimistix import AnySolver

# Whatever it is: `check_images` looks at it, and says more than a type checker.
Images: TypeAlias = Any


def check_sizes(**sizes: Any) -> None:
    """Raise unless every size is a positive integer."""
    for name, value in sizes.items():
        check_count(name, value, 1)


def check_list(name: str, sizes: Any, least: int = 1) -> tuple[int, ...]:
    """`sizes` as a tuple of at least `least` positive integers."""
    sizes = tuple(sizes) if isinstance(sizes, Iterable) else (sizes,)
    sizes = tuple(whole(n) for n in sizes)
    counts = all(isinstance(n, int) and not isinstance(n, bool) for n in sizes)
    if len(sizes) < least or not counts or min(sizes) < 1:
        raise ValueError(
            f"`{name}` must hold at least {least} positive integers; got {sizes}."
        )
    return sizes


def check_positive(name: str, value: Any, why: str = "") -> None:
    """Raise unless `value` is a positive, finite number."""
    value = plain(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be a positive number; got {value!r}.{why}")


def check_rate(name: str, rate: Any) -> None:
    """Raise unless a dropout rate lies in [0, 1)."""
    rate = plain(rate)
    if isinstance(rate, bool) or not (isinstance(rate, int | float) and 0 <= rate < 1):
        raise ValueError(f"`{name}` must satisfy 0 ≤ {name} < 1; got {rate!r}.")


def check_heads(dim: int, num_heads: int) -> None:
    """Raise unless the heads share the width evenly."""
    if dim % num_heads:
        raise ValueError(
            f"`dim` must be a multiple of `num_heads`; got dim={dim}, "
            f"num_heads={num_heads}."
        )


def check_groups(channels: Iterable[int], groups: Any) -> None:
    """Raise unless a group norm of `groups` groups divides every number of channels."""
    check_sizes(groups=groups)
    for c in channels:
        if c % groups:
            raise ValueError(
                f"`groups` must divide the number of channels that it normalises; got "
                f"{groups} groups and {c} channels."
            )


def check_tokens(name: str, tokens: Any, max_length: int | None = None) -> None:
    """Raise unless `tokens` is a batch of token sequences that a model can take."""
    if not eqx.is_array_like(tokens):
        raise TypeError(
            f"`{name}` must be an array of integers; got {type(tokens).__name__}."
        )
    shape, dtype = jnp.shape(tokens), jnp.result_type(tokens)
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(
            f"`{name}` must have shape (batch, length); got shape {shape}. Add an axis "
            "of length 1 for a single sequence."
        )
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"`{name}` must be integers; got {dtype}.")
    if max_length is not None and shape[1] > max_length:
        raise ValueError(
            f"`{name}` may be `max_length` = {max_length} long, for which the model "
            f"has positions; got length {shape[1]}."
        )


def check_images(
    images: Images, channels: int, dtype: Any, *, multiple: int = 1, why: str = ""
) -> Array:
    """The images as an array.

    Raises:
        TypeError: if they are no array of real floating-point numbers of the
            parameters' dtype.
        ValueError: if their shape is not (batch, channels, height, width), with
            `channels` channels and sides that are multiples of `multiple`.
    """
    if not eqx.is_array_like(images):
        raise TypeError(
            "`images` must be an array of shape (batch, channels, height, width); got "
            f"{type(images).__name__}."
        )
    images = jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"`images` must be real and floating-point; got {images.dtype}. Cast and "
            "normalise them first."
        )
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"`images` must have shape (batch, {channels}, height, width); got "
            f"{images.shape}. A single image needs a leading axis of length 1."
        )
    check_dtype("images", images, dtype)
    height, width = images.shape[2:]
    if not (height and width) or height % multiple or width % multiple:
        raise ValueError(
            f"`images` must have sides that are positive multiples of {multiple}{why}; "
            f"got {height} × {width}. Pad, crop or resize them."
        )
    return images


def check_dtype(name: str, value: Array, dtype: Any) -> None:
    """Raise unless a model computes in the dtype of what it is given."""
    if value.dtype != dtype:
        raise TypeError(
            f"`{name}` must have the dtype of the model's parameters, {dtype}; got "
            f"{value.dtype}. Cast the one or the other."
        )


def batched_solver(solver: AnySolver | None, default: AnySolver) -> AnySolver:
    """The solver of a model that takes batches, `default` for None.

    Raises:
        ValueError: if it is one of deqjax that takes the batch for one problem.
    """
    if solver is None:
        return default
    batch_ndim = getattr(solver, "batch_ndim", 1)
    if batch_ndim != 1:
        raise ValueError(
            "`solver` must take every example of a batch for a problem of its own: "
            f"construct it with `batch_ndim=1`; got batch_ndim={batch_ndim}."
        )
    return solver
