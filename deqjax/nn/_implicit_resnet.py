"""The implicit residual network of Jacobian-free backpropagation."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray

from ..adjoints import JFBAdjoint
from ..solvers import Anderson
from ._checks import (
    Images,
    batched_solver,
    check_groups,
    check_images,
    check_rate,
    check_sizes,
)
from ._deq import DEQ
from ._dropout import VariationalDropout, split_key
from ._images import Features, average, batch_norm, conv, normalise

# What the authors put around the images: the mean of a pixel of ImageNet.
PADDING = 0.449
SLOPE = 0.1


class _Residual(eqx.Module):
    """x + C₂ leaky(C₁ x), without what the two uses of it do next."""

    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d

    def __init__(self, channels: int, *, key: PRNGKeyArray):
        key1, key2 = jr.split(key)
        self.conv1 = conv(channels, channels, 3, bias=True, key=key1)
        self.conv2 = conv(channels, channels, 3, bias=True, key=key2)

    def __call__(self, x: Array, drop: Callable = lambda h: h) -> Array:
        return x + self.conv2(drop(leaky(self.conv1(x))))


class ImplicitResNetCell(eqx.Module):
    r"""The cell of the implicit residual network.

    $$ h_0 = x + \gamma z, \qquad
       h_{i+1} = N\,\mathrm{leaky}\bigl(h_i + C_i'\,\mathrm{leaky}(C_i h_i)\bigr),
       \qquad f(z, x) = h_n $$

    with convolutions 3 × 3 with bias, leaky ReLUs of slope 0.1, and norms N without
    parameters.

    Args:
        channels: of z and x.
        num_blocks: n.
        gamma: γ, the weight of the state.
        groups: of the group norms N.
        key: decides the initial parameters.

    Raises:
        ValueError: if an argument is not valid.

    References:
        S. W. Fung, H. Heaton, Q. Li, D. McKenzie, S. Osher, W. Yin (2022), JFB:
        Jacobian-free backpropagation for implicit networks,
        doi:10.1609/aaai.v36i6.20619.
    """

    blocks: tuple[_Residual, ...]
    norm: eqx.nn.GroupNorm
    gamma: float = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        num_blocks: int = 5,
        *,
        gamma: float = 0.5,
        groups: int = 1,
        key: PRNGKeyArray,
    ):
        check_sizes(channels=channels, num_blocks=num_blocks)
        check_groups((channels,), groups)
        if isinstance(gamma, bool) or not (
            isinstance(gamma, int | float) and 0 < gamma < 1
        ):
            raise ValueError(f"`gamma` must satisfy 0 < gamma < 1; got {gamma!r}.")
        self.blocks = tuple(
            _Residual(channels, key=k) for k in jr.split(key, num_blocks)
        )
        self.norm = eqx.nn.GroupNorm(groups, channels, channelwise_affine=False)
        self.gamma = gamma

    def __call__(
        self, z: Features, x: Features, *, key: PRNGKeyArray | None = None
    ) -> Features:
        """f for a whole batch.

        Args:
            z: the state, of shape (batch, channels, height, width).
            x: what is injected, of the same shape.
            key: not used: nothing here is random.
        """
        return jax.vmap(self._one)(z, x)

    def _one(self, z: Array, x: Array) -> Array:
        h = x + self.gamma * z
        for block in self.blocks:
            h = self.norm(leaky(block(h)))
        return h


class ImplicitResNet(eqx.Module):
    r"""The implicit residual network trained by Jacobian-free backpropagation.

    A convolution 7 × 7; two stages of residual blocks, each followed by a mean over
    2 × 2 pixels; the equilibrium of an `ImplicitResNetCell` from zero; a convolution
    3 × 3 of stride 2; linear. `cifar10` has 843,430 parameters, on images 3 × 32 × 32
    with four pixels around: published as 0.84M. The default adjoint is
    `deqjax.JFBAdjoint`.

    The batch norms of the residual stages are as in `MDEQClassifier`: the model is made
    and called as equinox's models with a state are.

    **Differences from the source:** the norms in the cell are group norms of each
    image, where the authors have batch norms in the iterated map, which couple the
    images and have a state to update (neither has parameters). The authors rescale the
    cell's weights during training whenever they measure on noise that it is not
    γ-Lipschitz; nothing here does. They iterate plainly, and stop at an absolute change
    of 0.1 in every pixel, after 200 steps at most.

    Args:
        channels: everywhere.
        data_blocks: residual blocks in each of the two stages.
        cell_blocks: residual blocks in the cell.
        num_classes: length of the output.
        side: of the images, which are square.
        in_channels: of the images.
        gamma: see `ImplicitResNetCell`.
        groups: see `ImplicitResNetCell`.
        data_dropout: probability of dropping a channel in the residual stages.
        head_dropout: probability of dropping an entry before the last layer.
        solver: see `deqjax.fixed_point`; one of deqjax needs `batch_ndim=1`. None:
            `deqjax.Anderson(batch_ndim=1)`, which at random weights takes 13 to 14
            evaluations to 10⁻⁴, where `deqjax.Picard`, the authors' iteration, takes 21
            to 24.
        adjoint: see `deqjax.fixed_point`; default: `deqjax.JFBAdjoint()`.
        max_steps: see `deqjax.fixed_point`.
        key: decides the initial parameters.

    Raises:
        TypeError, ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, equinox as eqx, jax
        >>> make = eqx.nn.make_with_state(deqjax.nn.ImplicitResNet.cifar10)
        >>> model, state = eqx.filter_eval_shape(make, key=jax.random.key(0))
        >>> deqjax.nn.count_parameters(model)
        843430

    References:
        S. W. Fung, H. Heaton, Q. Li, D. McKenzie, S. Osher, W. Yin (2022), JFB:
        Jacobian-free backpropagation for implicit networks,
        doi:10.1609/aaai.v36i6.20619.
    """

    first: eqx.nn.Conv2d
    stages: tuple[tuple[_Residual, ...], ...]
    norms: tuple[tuple[eqx.nn.BatchNorm, ...], ...]
    data_dropout: VariationalDropout
    deq: DEQ
    last: eqx.nn.Conv2d
    head_dropout: VariationalDropout
    head: eqx.nn.Linear
    side: int = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        data_blocks: int,
        cell_blocks: int,
        num_classes: int,
        *,
        side: int = 32,
        in_channels: int = 3,
        gamma: float = 0.5,
        groups: int = 1,
        data_dropout: float = 0.15,
        head_dropout: float = 0.1,
        solver: Any = None,
        adjoint: optx.AbstractAdjoint | None = None,
        max_steps: int = 200,
        key: PRNGKeyArray,
    ):
        check_sizes(
            data_blocks=data_blocks,
            num_classes=num_classes,
            side=side,
            in_channels=in_channels,
        )
        check_rate("data_dropout", data_dropout)
        check_rate("head_dropout", head_dropout)
        if side % 4:
            raise ValueError(f"`side` must be a multiple of 4; got {side}.")
        keys = iter(jr.split(key, 2 * data_blocks + 4))
        cell = ImplicitResNetCell(
            channels, cell_blocks, gamma=gamma, groups=groups, key=next(keys)
        )
        self.first = eqx.nn.Conv2d(in_channels, channels, 7, key=next(keys))
        stages = range(2)
        self.stages = tuple(
            tuple(_Residual(channels, key=next(keys)) for _ in range(data_blocks))
            for _ in stages
        )
        self.norms = tuple(
            tuple(batch_norm(channels, affine=False) for _ in range(data_blocks))
            for _ in stages
        )
        self.data_dropout = VariationalDropout.channels(data_dropout)
        self.deq = DEQ(
            cell,
            solver=batched_solver(solver, Anderson(batch_ndim=1)),
            adjoint=JFBAdjoint() if adjoint is None else adjoint,
            max_steps=max_steps,
        )
        self.last = conv(channels, channels, 3, stride=2, bias=True, key=next(keys))
        self.head_dropout = VariationalDropout.dense(head_dropout)
        rest = -(-(side + 8) // 8)
        self.head = eqx.nn.Linear(
            channels * rest**2, num_classes, use_bias=False, key=next(keys)
        )
        self.side = side

    def __call__(
        self,
        images: Images,
        state: eqx.nn.State,
        *,
        z0: Features | None = None,
        key: PRNGKeyArray | None = None,
        max_steps: int | None = None,
    ) -> tuple[Float[Array, "batch classes"], eqx.nn.State]:
        """The logits and the new state of the batch norms.

        Args:
            images: of shape (batch, channels, side, side).
            state: as `eqx.nn.make_with_state` returned it, or the last call.
            z0: the initial iterate; None: zeros.
            key: for dropout.
            max_steps: in place of the model's own.
        """
        key1, key2 = split_key(key, 2)
        sol, state = self.solve(images, state, z0=z0, key=key1, max_steps=max_steps)
        return self.logits(sol.value, key=key2), state

    def solve(
        self,
        images: Images,
        state: eqx.nn.State,
        *,
        z0: Features | None = None,
        key: PRNGKeyArray | None = None,
        max_steps: int | None = None,
        throw: bool = False,
        options: dict[str, Any] | None = None,
    ) -> tuple[optx.Solution, eqx.nn.State]:
        """The equilibrium, with all that `deqjax.fixed_point` returns, and the state.

        `logits` of its `value` are what the model returns; `stats["residual"]` has one
        entry per image. Arguments as of `__call__` and `deqjax.nn.DEQ.solve`.
        """
        x, state = self._embed(images, state, key)
        sol = self.deq.solve(
            x, z0=z0, max_steps=max_steps, throw=throw, options=options
        )
        return sol, state

    def logits(
        self, z: Features, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch classes"]:
        """The logits that belong to an equilibrium; `key` is for dropout."""
        y = leaky(jax.vmap(self.last)(z)).reshape(len(z), -1)
        return jax.vmap(self.head)(self.head_dropout(y, key=key))

    def _embed(
        self, images: Images, state: eqx.nn.State, key: PRNGKeyArray | None
    ) -> tuple[Features, eqx.nn.State]:
        weight = self.first.weight
        x = check_images(images, weight.shape[1], weight.dtype)
        if x.shape[2:] != (self.side, self.side):
            raise ValueError(
                f"`images` must have the sides {self.side} × {self.side} that the "
                f"model was made for; got {x.shape[2]} × {x.shape[3]}. Resize them, or "
                "give `side` to the constructor."
            )
        x = jnp.pad(x, ((0, 0), (0, 0), (4, 4), (4, 4)), constant_values=PADDING)
        # The first convolution continues the images by their last pixels.
        x = jnp.pad(x, ((0, 0), (0, 0), (3, 3), (3, 3)), mode="edge")
        x = leaky(jax.vmap(self.first)(x))
        keys = split_key(key, sum(len(stage) for stage in self.stages))
        # A key for each block and image.
        keys = iter(None if k is None else jr.split(k, len(x)) for k in keys)
        residual = lambda block, x, k: block(x, ft.partial(self.data_dropout, key=k))
        for blocks, norms in zip(self.stages, self.norms, strict=True):
            for block, norm in zip(blocks, norms, strict=True):
                h = jax.vmap(ft.partial(residual, block))(x, next(keys))
                x, state = normalise(norm, leaky(h), state)
            x = average(x, 2)
        return x, state

    # The published configuration

    @classmethod
    def cifar10(cls, *, key: PRNGKeyArray, **settings: Any) -> "ImplicitResNet":
        """843,430 parameters; `settings` are arguments in place of the published."""
        published = {
            "channels": 35,
            "data_blocks": 16,
            "cell_blocks": 5,
            "num_classes": 10,
        }
        return cls(**{**published, **settings}, key=key)


def leaky(x: Array) -> Array:
    """The leaky ReLU of the authors."""
    return jax.nn.leaky_relu(x, SLOPE)
