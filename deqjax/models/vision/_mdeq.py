"""Multiscale deep equilibrium models for classification and segmentation."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray

from ..._types import Options
from ...nn._checks import Images, check_list, check_sizes
from ...nn._images import ConvNorms, Features, batch_norm, conv, normalise
from ...nn._mdeq_cell import INIT_STD, Scales
from ...solvers._optimistix import AnySolver
from .._interface import AbstractModel, check_state
from ._mdeq_backbone import MDEQBackbone

_IMAGENET = {
    "final_channels": 2048,
    "num_classes": 1000,
    "halvings": 2,
    "max_steps": 26,
}


class _Bottleneck(eqx.Module):
    """A residual bottleneck of the head, from c to 4 h channels."""

    convs: tuple[eqx.nn.Conv2d, ...]
    norms: tuple[eqx.nn.BatchNorm, ...]
    shortcut: tuple[eqx.nn.Conv2d, eqx.nn.BatchNorm] | None

    def __init__(self, channels: int, inside: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        widths = ((channels, inside, 1), (inside, inside, 3), (inside, 4 * inside, 1))
        self.convs = tuple(
            conv(*width, std=INIT_STD, key=k)
            for width, k in zip(widths, keys[:3], strict=True)
        )
        self.norms = tuple(batch_norm(width[1], affine=False) for width in widths)
        self.shortcut = (
            None
            if channels == 4 * inside
            else (
                conv(channels, 4 * inside, 1, std=INIT_STD, key=keys[3]),
                batch_norm(4 * inside),
            )
        )

    def __call__(
        self, x: Features, state: eqx.nn.State
    ) -> tuple[Features, eqx.nn.State]:
        h = x
        for i, (layer, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = jax.nn.relu(h) if i else h
            h, state = normalise(norm, jax.vmap(layer)(h), state)
        if self.shortcut is not None:
            layer, norm = self.shortcut
            x, state = normalise(norm, jax.vmap(layer)(x), state)
        return jax.nn.relu(h + x), state


class MDEQClassifier(AbstractModel):
    r"""The multiscale deep equilibrium model as a classifier of images.

    An `MDEQBackbone`; a bottleneck per scale, merged from fine to coarse by strided
    convolutions; 1 × 1 convolution, batch norm, ReLU, mean over pixels, linear.

    | configuration | parameters | channels | images |
    |---|---|---|---|
    | `cifar10_tiny` | 158,890 | 24, 24 | 3 × 32 × 32 |
    | `cifar10_large` | 11,097,438 | 32, 64, 128, 256 | 3 × 32 × 32 |
    | `imagenet_small` | 16,808,936 | 32, 64, 128, 256 | 3 × 224 × 224 |
    | `imagenet_large` | 67,063,624 | 80, 160, 320, 640 | 3 × 224 × 224 |

    Batch norms stand outside the equilibrium alone: inside, they would couple the
    images of a batch, and have a state to update at every evaluation. Their statistics
    are those of the whole batch given. The model is made and called as equinox's
    models with a state are: see the example; `eqx.nn.inference_mode` switches to the
    running statistics, and dropout off.

    **Differences from the source:** the solver is a deqjax one with its stopping rule,
    per image, where the authors' code runs Broyden's method on the batch jointly, up to
    18 (CIFAR-10) or 26 (ImageNet) evaluations: `max_steps` is that by default. Weights
    with weight norm are initialised as `equinox.nn.Conv2d` does, all other convolutions
    from a normal distribution of deviation 0.01. Running variances are biased ones.

    Args:
        channels: of each scale.
        head_channels: h of each scale; its bottleneck has 4 h channels.
        final_channels: before the mean over pixels.
        num_classes: length of the output.
        in_channels: of the images.
        halvings: how many convolutions of the stem have stride 2; 0, 1 or 2.
        expansion: see `MDEQCell`.
        groups: see `MDEQCell`.
        dropout: see `MDEQCell`.
        post_affine: see `MDEQCell`.
        solver: see `deqjax.fixed_point`; one of deqjax needs `batch_ndim=1`. None:
            `deqjax.Anderson(batch_ndim=1)`. At random weights no solver converges
            within `max_steps`, and this one comes nearest; after training with it, it
            takes as many evaluations as `deqjax.Broyden`, and `deqjax.Picard` fails.
        adjoint: see `deqjax.fixed_point`.
        max_steps: see `deqjax.fixed_point`.
        key: decides the initial parameters.

    Raises:
        TypeError, ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, equinox as eqx, jax
        >>> make = eqx.nn.make_with_state(deqjax.models.MDEQClassifier.published)
        >>> model, state = eqx.filter_eval_shape(
        ...     make, "cifar10_tiny", key=jax.random.key(0))
        >>> deqjax.nn.count_parameters(model)
        158890

    References:
        S. Bai, V. Koltun, J. Z. Kolter (2020), Multiscale deep equilibrium models,
        doi:10.48550/arXiv.2006.08656.
    """

    configurations: ClassVar = {
        "cifar10_tiny": {
            "channels": (24, 24),
            "head_channels": (8, 16),
            "final_channels": 200,
            "num_classes": 10,
            "dropout": 0.25,
            "post_affine": False,
        },
        "cifar10_large": {
            "channels": (32, 64, 128, 256),
            "head_channels": (14, 28, 56, 112),
            "final_channels": 1680,
            "num_classes": 10,
            "dropout": 0.3,
            "post_affine": False,
        },
        "imagenet_small": {
            "channels": (32, 64, 128, 256),
            "head_channels": (24, 48, 96, 192),
            **_IMAGENET,
        },
        "imagenet_large": {
            "channels": (80, 160, 320, 640),
            "head_channels": (32, 64, 128, 256),
            **_IMAGENET,
        },
    }

    backbone: MDEQBackbone
    bottlenecks: tuple[_Bottleneck, ...]
    merges: tuple[ConvNorms, ...]
    final: ConvNorms
    head: eqx.nn.Linear

    def __init__(
        self,
        channels: tuple[int, ...],
        head_channels: tuple[int, ...],
        final_channels: int,
        num_classes: int,
        *,
        in_channels: int = 3,
        halvings: int = 0,
        expansion: int = 5,
        groups: int = 8,
        dropout: float = 0.0,
        post_affine: bool = True,
        solver: AnySolver | None = None,
        adjoint: optx.AbstractAdjoint | None = None,
        max_steps: int = 18,
        key: PRNGKeyArray,
    ):
        head_channels = check_list("head_channels", head_channels)
        check_sizes(final_channels=final_channels, num_classes=num_classes)
        keys = iter(jr.split(key, 2 * len(head_channels) + 2))
        self.backbone = MDEQBackbone(
            channels,
            in_channels=in_channels,
            halvings=halvings,
            expansion=expansion,
            groups=groups,
            dropout=dropout,
            post_affine=post_affine,
            solver=solver,
            adjoint=adjoint,
            max_steps=max_steps,
            key=next(keys),
        )
        channels = self.backbone.deq.cell.channels
        if len(head_channels) != len(channels):
            raise ValueError(
                "`head_channels` must have one entry per scale; got "
                f"{len(head_channels)} for {len(channels)} scales."
            )
        self.bottlenecks = tuple(
            _Bottleneck(c, h, key=next(keys))
            for c, h in zip(channels, head_channels, strict=True)
        )
        wide = tuple(4 * h for h in head_channels)
        biased = {"bias": True, "std": INIT_STD}
        self.merges = tuple(
            ConvNorms(wide[i : i + 2], (2,), (3,), **biased, key=next(keys))
            for i in range(len(wide) - 1)
        )
        self.final = ConvNorms(
            (wide[-1], final_channels), (1,), (1,), **biased, key=next(keys)
        )
        self.head = eqx.nn.Linear(final_channels, num_classes, key=next(keys))

    def _solve(
        self,
        inputs: Images,
        state: Any,
        *,
        z0: Scales | None,
        key: PRNGKeyArray | None,
        max_steps: int | None,
        throw: bool,
        options: Options | None,
    ) -> tuple[optx.Solution, Any]:
        return self.backbone(
            inputs,
            state,
            z0=z0,
            key=key,
            max_steps=max_steps,
            throw=throw,
            options=options,
        )

    def _logits(
        self, z: Scales, state: Any, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "batch classes"], Any]:
        check_state(state)
        y, state = self.bottlenecks[0](z[0], state)
        for a, block, merge in zip(
            z[1:], self.bottlenecks[1:], self.merges, strict=True
        ):
            h, state = block(a, state)
            y, state = merge(y, state)
            y = h + y
        y, state = self.final(y, state)
        return jax.vmap(self.head)(jnp.mean(y, (2, 3))), state
