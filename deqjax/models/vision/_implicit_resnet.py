"""The implicit residual network of Jacobian-free backpropagation."""

import functools as ft
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray

from ..._types import Options
from ...adjoints import JFBAdjoint
from ...nn._checks import (
    Images,
    batched_solver,
    check_images,
    check_rate,
    check_sizes,
)
from ...nn._deq import DEQ
from ...nn._dropout import VariationalDropout, split_key
from ...nn._images import Features, batch_norm, conv, normalise
from ...nn._implicit_resnet_cell import ImplicitResNetCell, Residual, leaky
from ...solvers import Anderson
from ...solvers._optimistix import AnySolver
from .._interface import AbstractModel, check_state

# What the authors put around the images: the mean of a pixel of ImageNet.
PADDING = 0.449


class ImplicitResNet(AbstractModel):
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
    γ-Lipschitz; nothing here does. They iterate plainly, at most 50 times on CIFAR-10,
    and stop where no pixel of the batch changes by more than 0.1 (‖·‖₂ over channels);
    `solver=deqjax.Picard(0.0, 0.1, batch_ndim=1)` does so where no *image* does.

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
        >>> make = eqx.nn.make_with_state(deqjax.models.ImplicitResNet.published)
        >>> model, state = eqx.filter_eval_shape(
        ...     make, "cifar10", key=jax.random.key(0))
        >>> deqjax.nn.count_parameters(model)
        843430

    References:
        S. W. Fung, H. Heaton, Q. Li, D. McKenzie, S. Osher, W. Yin (2022), JFB:
        Jacobian-free backpropagation for implicit networks,
        doi:10.1609/aaai.v36i6.20619.
    """

    configurations: ClassVar = {
        "cifar10": {
            "channels": 35,
            "data_blocks": 16,
            "cell_blocks": 5,
            "num_classes": 10,
        },
    }

    first: eqx.nn.Conv2d
    stages: tuple[tuple[Residual, ...], ...]
    norms: tuple[tuple[eqx.nn.BatchNorm, ...], ...]
    data_dropout: VariationalDropout
    deq: DEQ
    last: eqx.nn.Conv2d
    head_dropout: eqx.nn.Dropout
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
        solver: AnySolver | None = None,
        adjoint: optx.AbstractAdjoint | None = None,
        max_steps: int = 50,
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
            tuple(Residual(channels, key=next(keys)) for _ in range(data_blocks))
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
        self.head_dropout = eqx.nn.Dropout(head_dropout)
        rest = -(-(side + 8) // 8)
        self.head = eqx.nn.Linear(
            channels * rest**2, num_classes, use_bias=False, key=next(keys)
        )
        self.side = side

    def _solve(
        self,
        inputs: Images,
        state: Any,
        *,
        z0: Features | None,
        key: PRNGKeyArray | None,
        max_steps: int | None,
        throw: bool,
        options: Options | None,
    ) -> tuple[optx.Solution, Any]:
        check_state(state)
        x, state = self._embed(inputs, state, split_key(key, 2)[0])
        sol = self.deq.solve(
            x, z0=z0, max_steps=max_steps, throw=throw, options=options
        )
        return sol, state

    def _logits(
        self, z: Features, state: Any, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "batch classes"], Any]:
        y = leaky(jax.vmap(self.last)(z)).reshape(len(z), -1)
        y = self.head_dropout(y, key=split_key(key, 2)[1])
        return jax.vmap(self.head)(y), state

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
            x = jax.vmap(eqx.nn.AvgPool2d(2, 2))(x)
        return x, state
