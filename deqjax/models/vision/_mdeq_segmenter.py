"""The multiscale deep equilibrium model for segmentation."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray

from ..._types import Options
from ...nn._checks import Images, check_sizes
from ...nn._images import ConvNorms, Features, conv
from ...nn._mdeq_cell import INIT_STD, Scales
from ...solvers._optimistix import AnySolver
from .._interface import AbstractModel, check_state
from ._mdeq_backbone import MDEQBackbone


class MDEQSegmenter(AbstractModel):
    r"""The multiscale deep equilibrium model as a classifier of pixels.

    Stem, injection and equilibrium as in `MDEQClassifier`; the states of all scales,
    interpolated linearly to the finest and put beside one another; 1 × 1 convolution,
    batch norm, ReLU, 1 × 1 convolution. The logits have the resolution of scale 0: a
    quarter of the image's, after the two halvings of the published models. The state
    of the batch norms, `eqx.nn.inference_mode` and dropout are as in `MDEQClassifier`.

    | configuration | parameters | channels | images |
    |---|---|---|---|
    | `cityscapes_small` | 8,968,467 | 32, 64, 128, 256 | 3 × 512 × 1024 |
    | `cityscapes_large` | 55,955,859 | 80, 160, 320, 640 | 3 × 512 × 1024 |
    | `cityscapes_xl` | 79,551,755 | 88, 176, 352, 704 | 3 × 768 × 1024 |

    The numbers of parameters follow from the authors' definitions and configuration
    files; no document of theirs states them.

    **Differences from the source:** as for `MDEQClassifier`; the authors run up to 27
    evaluations of Broyden's method.

    Args:
        channels: of each scale.
        num_classes: channels of the output.
        in_channels: of the images.
        halvings: how many convolutions of the stem have stride 2; 0, 1 or 2.
        expansion: see `MDEQCell`.
        groups: see `MDEQCell`.
        dropout: see `MDEQCell`.
        post_affine: see `MDEQCell`.
        solver: see `MDEQClassifier`.
        adjoint: see `deqjax.fixed_point`.
        max_steps: see `deqjax.fixed_point`.
        key: decides the initial parameters.

    Raises:
        TypeError, ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, equinox as eqx, jax, jax.numpy as jnp
        >>> make = eqx.nn.make_with_state(deqjax.models.MDEQSegmenter.published)
        >>> model, state = eqx.filter_eval_shape(
        ...     make, "cityscapes_small", key=jax.random.key(0))
        >>> images = jnp.zeros((1, 3, 64, 128))
        >>> eqx.filter_eval_shape(model, images, state, key=jax.random.key(1))[0].shape
        (1, 19, 16, 32)

    References:
        S. Bai, V. Koltun, J. Z. Kolter (2020), Multiscale deep equilibrium models,
        doi:10.48550/arXiv.2006.08656.
    """

    configurations: ClassVar = {
        "cityscapes_small": {
            "channels": (32, 64, 128, 256),
            "num_classes": 19,
            "dropout": 0.05,
        },
        "cityscapes_large": {
            "channels": (80, 160, 320, 640),
            "num_classes": 19,
            "dropout": 0.03,
        },
        "cityscapes_xl": {
            "channels": (88, 176, 352, 704),
            "num_classes": 19,
            "dropout": 0.04,
            "expansion": 6,
        },
    }

    backbone: MDEQBackbone
    mix: ConvNorms
    head: eqx.nn.Conv2d

    def __init__(
        self,
        channels: tuple[int, ...],
        num_classes: int,
        *,
        in_channels: int = 3,
        halvings: int = 2,
        expansion: int = 5,
        groups: int = 8,
        dropout: float = 0.0,
        post_affine: bool = True,
        solver: AnySolver | None = None,
        adjoint: optx.AbstractAdjoint | None = None,
        max_steps: int = 27,
        key: PRNGKeyArray,
    ):
        check_sizes(num_classes=num_classes)
        key1, key2, key3 = jr.split(key, 3)
        # The running statistics move slowly: batches of large images are small.
        momentum = 0.99
        self.backbone = MDEQBackbone(
            channels,
            in_channels=in_channels,
            halvings=halvings,
            expansion=expansion,
            groups=groups,
            dropout=dropout,
            post_affine=post_affine,
            momentum=momentum,
            solver=solver,
            adjoint=adjoint,
            max_steps=max_steps,
            key=key1,
        )
        c = sum(self.backbone.deq.cell.channels)
        biased = {"bias": True, "std": INIT_STD}
        self.mix = ConvNorms((c, c), (1,), (1,), momentum=momentum, **biased, key=key2)
        self.head = conv(c, num_classes, 1, **biased, key=key3)

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
    ) -> tuple[Float[Array, "batch classes height width"], Any]:
        check_state(state)
        parts = [resize(a, *z[0].shape[2:]) for a in z]
        y, state = self.mix(jnp.concatenate(parts, 1), state)
        return jax.vmap(self.head)(y), state


def resize(x: Features, height: int, width: int) -> Features:
    """Linear interpolation in which the corner pixels keep their places.

    `jax.image.resize` aligns the edges of the pixels at the border instead.
    """
    rows, columns = _weights(x.shape[2], height), _weights(x.shape[3], width)
    return jnp.einsum(
        "ih,jw,nchw->ncij", rows.astype(x.dtype), columns.astype(x.dtype), x
    )


def _weights(before: int, after: int) -> np.ndarray:
    """The matrix that interpolates `before` points at `after` points."""
    places = np.linspace(0, before - 1, after)
    return np.maximum(1 - np.abs(places[:, None] - np.arange(before)), 0)
