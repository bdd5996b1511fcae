"""The cell of the multiscale deep equilibrium model."""

import functools as ft
from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .. import _tree
from ._checks import check_groups, check_list, check_rate, check_sizes
from ._dropout import VariationalDropout, split_key
from ._images import Features, conv

Scales: TypeAlias = tuple[Float[Array, "batch _ _ _"], ...]
Image: TypeAlias = Float[Array, "_ _ _"]

# Convolutions without weight norm start small, as the authors' do; most are followed
# by a norm.
INIT_STD = 0.01


class _Block(eqx.Module):
    """The residual block of one scale, on one example."""

    conv1: eqx.nn.WeightNorm
    conv2: eqx.nn.WeightNorm
    norm1: eqx.nn.GroupNorm
    norm2: eqx.nn.GroupNorm
    norm3: eqx.nn.GroupNorm

    def __init__(self, channels: int, inside: int, groups: int, *, key: PRNGKeyArray):
        key1, key2 = jr.split(key)
        self.conv1 = eqx.nn.WeightNorm(conv(channels, inside, 3, key=key1))
        self.conv2 = eqx.nn.WeightNorm(conv(inside, channels, 3, key=key2))
        self.norm1 = eqx.nn.GroupNorm(groups, inside)
        self.norm2 = eqx.nn.GroupNorm(groups, channels)
        self.norm3 = eqx.nn.GroupNorm(groups, channels)

    def __call__(self, z: Image, x: Image | None, drop: Callable) -> Image:
        h = jax.nn.relu(self.norm1(self.conv1(z)))
        h = drop(self.conv2(h))
        h = self.norm2(h if x is None else h + x)
        return self.norm3(jax.nn.relu(h + z))


class _Down(eqx.Module):
    """From a finer scale to a coarser: strided convolutions with norms between."""

    convs: tuple[eqx.nn.Conv2d, ...]
    norms: tuple[eqx.nn.GroupNorm, ...]

    def __init__(
        self, inputs: int, outputs: int, levels: int, groups: int, *, key: PRNGKeyArray
    ):
        widths = [inputs] * (levels - 1) + [outputs]
        keys = jr.split(key, levels)
        self.convs = tuple(
            conv(inputs, width, 3, stride=2, std=INIT_STD, key=k)
            for width, k in zip(widths, keys, strict=True)
        )
        self.norms = tuple(eqx.nn.GroupNorm(groups, width) for width in widths)

    def __call__(self, z: Image) -> Image:
        for i, (layer, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            z = norm(layer(jax.nn.relu(z) if i else z))
        return z


class _Up(eqx.Module):
    """From a coarser scale to a finer: 1 × 1 convolution, norm, repetition."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    factor: int = eqx.field(static=True)

    def __init__(
        self, inputs: int, outputs: int, levels: int, groups: int, *, key: PRNGKeyArray
    ):
        self.conv = conv(inputs, outputs, 1, std=INIT_STD, key=key)
        self.norm = eqx.nn.GroupNorm(groups, outputs)
        self.factor = 2**levels

    def __call__(self, z: Image) -> Image:
        z = self.norm(self.conv(z))
        return jnp.repeat(jnp.repeat(z, self.factor, 1), self.factor, 2)


class _Post(eqx.Module):
    """What follows the sum of all scales: ReLU, 1 × 1 convolution, norm."""

    conv: eqx.nn.WeightNorm
    norm: eqx.nn.GroupNorm

    def __init__(self, channels: int, groups: int, affine: bool, *, key: PRNGKeyArray):
        self.conv = eqx.nn.WeightNorm(conv(channels, channels, 1, key=key))
        self.norm = eqx.nn.GroupNorm(groups, channels, channelwise_affine=affine)

    def __call__(self, z: Image) -> Image:
        return self.norm(self.conv(jax.nn.relu(z)))


class MDEQCell(eqx.Module):
    r"""The cell of the multiscale DEQ: residual blocks per scale, then fusion.

    $$ h_i = N\bigl(\mathrm{relu}(z_i + N(m_i \, C_2\, \mathrm{relu}(N(C_1 z_i))
       + x\,[i = 0]))\bigr), \qquad
       z_i' = N\Bigl(C\,\mathrm{relu}\bigl(h_i + \sum_{j \ne i} F_{ij} h_j\bigr)\Bigr) $$

    | symbol | meaning |
    |---|---|
    | $z_i$ | state of scale i, at half the resolution of scale i − 1 |
    | $x$ | injection, at the resolution of scale 0 |
    | $C_1, C_2, C$ | convolutions 3 × 3, 3 × 3, 1 × 1 with weight norm, no bias |
    | $N$ | group norms |
    | $F_{ij}$ | from finer to coarser strided 3 × 3 convolutions with norms, and ReLU between; from coarser to finer 1 × 1 convolution, norm, repetition of pixels |
    | $m_i$ | dropout of whole channels, one mask per solve |

    `z` is a tuple of arrays (batch, channels[i], height / 2ⁱ, width / 2ⁱ). Weights are
    normalised once per solve: `deqjax.fixed_point` finds that they do not depend on z.

    Args:
        channels: of each scale; two scales at least.
        expansion: the blocks have `expansion` times as many channels inside.
        groups: of all norms but the last, which has half as many.
        dropout: probability with which a channel is dropped; needs a `key`.
        post_affine: whether the last norm of each scale has scales and offsets.
        key: decides the initial parameters.

    Raises:
        ValueError: if an argument is not valid, or the sides of x cannot be halved
            often enough.

    References:
        S. Bai, V. Koltun, J. Z. Kolter (2020), Multiscale deep equilibrium models,
        doi:10.48550/arXiv.2006.08656.
    """  # noqa: E501 (a row of the table cannot be broken)

    blocks: tuple[_Block, ...]
    fusions: tuple[tuple[_Down | _Up | None, ...], ...]
    posts: tuple[_Post, ...]
    dropout: VariationalDropout
    channels: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        channels: tuple[int, ...],
        *,
        expansion: int = 5,
        groups: int = 8,
        dropout: float = 0.0,
        post_affine: bool = True,
        key: PRNGKeyArray,
    ):
        channels = check_list("channels", channels, 2)
        check_sizes(expansion=expansion)
        check_groups(channels, groups)
        check_rate("dropout", dropout)
        n = len(channels)
        keys = iter(jr.split(key, 2 * n + n * n))
        self.blocks = tuple(
            _Block(c, expansion * c, groups, key=next(keys)) for c in channels
        )
        self.posts = tuple(
            _Post(c, max(groups // 2, 1), post_affine, key=next(keys)) for c in channels
        )

        def fusion(i: int, j: int) -> _Down | _Up | None:
            if i == j:
                return None
            kind = _Up if j > i else _Down
            return kind(channels[j], channels[i], abs(i - j), groups, key=next(keys))

        self.fusions = tuple(tuple(fusion(i, j) for j in range(n)) for i in range(n))
        self.dropout = VariationalDropout.channels(dropout)
        self.channels = channels

    def initial_state(self, x: Features) -> Scales:
        """Zeros at every scale.

        Args:
            x: the injection.
        """
        height, width = x.shape[2:]
        step = 2 ** (len(self.channels) - 1)
        if height % step or width % step:
            raise ValueError(
                f"`x` must have sides that are multiples of {step} for "
                f"{len(self.channels)} scales; got {height} × {width}."
            )
        return tuple(
            _tree.zeros_for(x, (c, height >> i, width >> i))
            for i, c in enumerate(self.channels)
        )

    def __call__(
        self, z: Scales, x: Features, *, key: PRNGKeyArray | None = None
    ) -> Scales:
        """The new states of all scales, for a whole batch.

        Args:
            z: the states.
            x: the injection, of shape (batch, channels[0], height, width).
            key: for dropout: one mask for each image and scale.
        """
        # A key for each image: its mask does not depend on the others.
        keys = None if key is None else jr.split(key, len(x))
        return jax.vmap(self._one)(z, x, keys)

    def _one(
        self, z: tuple[Image, ...], x: Image, key: PRNGKeyArray | None
    ) -> tuple[Image, ...]:
        keys = split_key(key, len(z))
        drops = [ft.partial(self.dropout, key=k) for k in keys]
        h = [
            block(z[i], None if i else x, drops[i])
            for i, block in enumerate(self.blocks)
        ]

        def fuse(i: int) -> Image:
            pairs = zip(self.fusions[i], h, strict=True)
            parts = [a if f is None else f(a) for f, a in pairs]
            return self.posts[i](sum(parts[1:], parts[0]))

        return tuple(fuse(i) for i in range(len(h)))
