"""What the image models share: checks of their input, layers on whole batches."""

import itertools
from collections.abc import Iterable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from ..solvers import Picard

Features: TypeAlias = Float[Array, "batch _ _ _"]

# Whatever it is: `check_images` looks at it, and says more than a type checker.
Images: TypeAlias = Any

# The batch statistics of a batch norm are taken over this axis of `jax.vmap`.
BATCH_AXIS = "deqjax_batch"


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
    if images.dtype != dtype:
        raise TypeError(
            f"`images` must have the dtype of the model's parameters, {dtype}; got "
            f"{images.dtype}. Cast the one or the other."
        )
    height, width = images.shape[2:]
    if not (height and width) or height % multiple or width % multiple:
        raise ValueError(
            f"`images` must have sides that are positive multiples of {multiple}{why}; "
            f"got {height} × {width}. Pad, crop or resize them."
        )
    return images


def check_sizes(name: str, sizes: Any, least: int = 1) -> tuple[int, ...]:
    """`sizes` as a tuple of at least `least` positive integers."""
    sizes = tuple(sizes) if isinstance(sizes, Iterable) else (sizes,)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in sizes)
    if len(sizes) < least or not whole or min(sizes) < 1:
        raise ValueError(
            f"`{name}` must hold at least {least} positive integers; got {sizes}."
        )
    return sizes


def check_groups(channels: Iterable[int], groups: int) -> None:
    """Raise unless a group norm of `groups` groups divides every number of channels."""
    for c in channels:
        if c % groups:
            raise ValueError(
                f"`groups` must divide the number of channels that it normalises; got "
                f"{groups} groups and {c} channels."
            )


def batched_solver(solver: Any) -> Any:
    """The solver, by default of one problem per image.

    Raises:
        ValueError: if it is one of deqjax that takes the batch for one problem.
    """
    if solver is None:
        return Picard(batch_ndim=1)
    if getattr(solver, "batch_ndim", 1) != 1:
        raise ValueError(
            "`solver` must take every image for a problem of its own: construct it "
            f"with `batch_ndim=1`; got batch_ndim={solver.batch_ndim}."
        )
    return solver


def split_key(key: PRNGKeyArray | None, num: int) -> list[PRNGKeyArray | None]:
    """`num` keys, or as many times None."""
    return [None] * num if key is None else list(jr.split(key, num))


# --- layers on whole batches ----------------------------------------------------------


def conv(
    inputs: int,
    outputs: int,
    size: int,
    *,
    key: PRNGKeyArray,
    stride: int = 1,
    bias: bool = False,
    std: float | None = None,
) -> eqx.nn.Conv2d:
    """A convolution that keeps the resolution, or divides it by `stride`.

    Args:
        inputs: channels before.
        outputs: channels after.
        size: side of the kernel, odd.
        key: decides the initial parameters.
        stride: step of the kernel.
        bias: whether there is one.
        std: initialise everything from a normal distribution of this deviation; None:
            as `equinox.nn.Conv2d` does.
    """
    layer = eqx.nn.Conv2d(
        inputs, outputs, size, stride, size // 2, use_bias=bias, key=key
    )
    if std is None:
        return layer
    leaves, structure = jax.tree.flatten(layer)
    keys = jr.split(key, len(leaves))
    normal = lambda k, w: std * jr.normal(k, w.shape, w.dtype)
    return jax.tree.unflatten(structure, map(normal, keys, leaves))


def batch_norm(
    channels: int, *, momentum: float = 0.9, affine: bool = True
) -> eqx.nn.BatchNorm:
    """A batch norm to be applied by `normalise`.

    Its momentum is that of the running statistics: PyTorch's 0.1 is 0.9 here.
    """
    return eqx.nn.BatchNorm(
        channels,
        BATCH_AXIS,
        momentum=momentum,
        channelwise_affine=affine,
        mode="batch",
    )


def normalise(
    norm: eqx.nn.BatchNorm, x: Features, state: eqx.nn.State
) -> tuple[Features, eqx.nn.State]:
    """Batch norm of a whole batch: statistics over all its images and pixels."""
    apply = jax.vmap(norm, axis_name=BATCH_AXIS, in_axes=(0, None), out_axes=(0, None))
    # equinox raises a float to the power of its integer counter.
    with jax.numpy_dtype_promotion("standard"):
        return apply(x, state)


def channel_mask(
    dropout: eqx.nn.Dropout, x: Features, key: PRNGKeyArray | None
) -> Float[Array, "batch channels 1 1"]:
    """A factor per image and channel: 0 with the layer's probability."""
    return dropout(jnp.ones((*x.shape[:2], 1, 1), x.dtype), key=key)


class ConvNorms(eqx.Module):
    """Convolutions, each followed by batch norm and ReLU: stems and merges.

    Args:
        channels: before the first, and after each.
        strides: of each.
        sizes: of the kernels.
        bias: whether the convolutions have one.
        momentum: see `batch_norm`.
        std: see `conv`.
        key: decides the initial parameters.
    """

    convs: tuple[eqx.nn.Conv2d, ...]
    norms: tuple[eqx.nn.BatchNorm, ...]

    def __init__(
        self,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        sizes: tuple[int, ...],
        *,
        bias: bool = False,
        momentum: float = 0.9,
        std: float | None = None,
        key: PRNGKeyArray,
    ):
        keys = jr.split(key, len(strides))
        self.convs = tuple(
            conv(before, after, size, stride=stride, bias=bias, std=std, key=k)
            for (before, after), stride, size, k in zip(
                itertools.pairwise(channels), strides, sizes, keys, strict=True
            )
        )
        self.norms = tuple(batch_norm(c, momentum=momentum) for c in channels[1:])

    def __call__(
        self, x: Features, state: eqx.nn.State
    ) -> tuple[Features, eqx.nn.State]:
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x, state = normalise(norm, jax.vmap(layer)(x), state)
            x = jax.nn.relu(x)
        return x, state
