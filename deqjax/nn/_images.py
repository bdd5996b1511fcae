"""What the image models share: layers on whole batches."""

import itertools
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

Features: TypeAlias = Float[Array, "batch _ _ _"]

# The batch statistics of a batch norm are taken over this axis of `jax.vmap`.
BATCH_AXIS = "deqjax_batch"


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
    norm = eqx.nn.BatchNorm(
        channels,
        BATCH_AXIS,
        momentum=momentum,
        channelwise_affine=affine,
        mode="batch",
    )
    # After n updates equinox divides mean and variance by 1 − momentumⁿ, which is
    # right for averages that begin at 0; it begins that of the variance at 1.
    where = lambda n: n.batch_state_index.init
    return eqx.tree_at(where, norm, jax.tree.map(jnp.zeros_like, where(norm)))


def normalise(
    norm: eqx.nn.BatchNorm, x: Features, state: eqx.nn.State
) -> tuple[Features, eqx.nn.State]:
    """Batch norm of a whole batch: statistics over all its images and pixels.

    In inference mode they are the running ones, and before the first update mean 0 and
    variance 1.
    """
    apply = jax.vmap(norm, axis_name=BATCH_AXIS, in_axes=(0, None), out_axes=(0, None))
    # equinox raises a float to the power of its integer counter.
    with jax.numpy_dtype_promotion("standard"):
        if not norm.inference:
            return apply(x, state)
        index, counter = norm.batch_state_index, norm.batch_counter
        assert index is not None and counter is not None
        own = state.substate(norm)
        mean, variance = own.get(index)
        variance = jnp.where(own.get(counter) == 0, 1, variance)
        return apply(x, own.set(index, (mean, variance)))[0], state


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
