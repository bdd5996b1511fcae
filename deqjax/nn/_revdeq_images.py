"""Reversible deep equilibrium models for images."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray

from ..solvers import Reversible
from ._checks import (
    Images,
    batched_solver,
    check_images,
    check_list,
    check_sizes,
)
from ._deq import DEQ
from ._images import ConvNorms, Features, conv


def _norm(channels: int) -> eqx.nn.GroupNorm:
    """16 channels per group where they divide, else one group."""
    groups = max(channels // 16, 1)
    return eqx.nn.GroupNorm(groups if channels % groups == 0 else 1, channels)


class ConvCell(eqx.Module):
    r"""The cell of the RevDEQ for images.

    $$ f(z, x) = N_3\,\mathrm{relu}\bigl(z + N_2(x + C_2\,
       \mathrm{relu}(N_1 C_1 z))\bigr) $$

    with convolutions C of 3 × 3 without bias and group norms N of 16 channels per
    group, on arrays (batch, channels, height, width).

    Args:
        channels: of z and of x.
        width: there are `width` times as many channels between C₁ and C₂.
        key: decides the initial parameters.

    Raises:
        ValueError: if an argument is not valid.

    References:
        S. McCallum, K. Arora, J. Foster (2025), Reversible deep equilibrium models,
        doi:10.48550/arXiv.2509.12917.
    """

    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    norm1: eqx.nn.GroupNorm
    norm2: eqx.nn.GroupNorm
    norm3: eqx.nn.GroupNorm

    def __init__(self, channels: int, width: int = 1, *, key: PRNGKeyArray):
        check_sizes(channels=channels, width=width)
        key1, key2 = jr.split(key)
        self.conv1 = conv(channels, width * channels, 3, key=key1)
        self.conv2 = conv(width * channels, channels, 3, key=key2)
        self.norm1 = _norm(width * channels)
        self.norm2, self.norm3 = _norm(channels), _norm(channels)

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
        h = jax.nn.relu(self.norm1(self.conv1(z)))
        return self.norm3(jax.nn.relu(z + self.norm2(x + self.conv2(h))))


class _Downsample(eqx.Module):
    """A residual block with norms before its convolutions, to half the resolution."""

    norm1: eqx.nn.GroupNorm
    norm2: eqx.nn.GroupNorm
    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    shortcut: eqx.nn.Conv2d

    def __init__(self, inputs: int, outputs: int, *, key: PRNGKeyArray):
        key1, key2, key3 = jr.split(key, 3)
        self.norm1, self.norm2 = _norm(inputs), _norm(outputs)
        self.conv1 = conv(inputs, outputs, 3, stride=2, key=key1)
        self.conv2 = conv(outputs, outputs, 3, key=key2)
        self.shortcut = conv(inputs, outputs, 1, stride=2, key=key3)

    def __call__(self, x: Features) -> Features:
        return jax.vmap(self._one)(x)

    def _one(self, x: Array) -> Array:
        h = jax.nn.relu(self.norm1(x))
        inner = jax.nn.relu(self.norm2(self.conv1(h)))
        return self.shortcut(h) + self.conv2(inner)


class RevDEQClassifier(eqx.Module):
    r"""The reversible deep equilibrium model as a classifier of images.

    A convolution 3 × 3 with batch norm and ReLU; at each scale
    $x \leftarrow x + z^*$ with $z^* = f(z^*, x)$, f being a `ConvCell` of its own, and
    between scales a residual block with norms before its convolutions, to half the
    resolution; mean over pixels, linear.

    | constructor | parameters | channels | widths | images |
    |---|---|---|---|---|
    | `cifar10` | 10,319,754 | 128, 256, 256, 128 | 1, 3, 3, 1 | 3 × 32 × 32 |
    | `cifar10_single` | 19,882 | 32 | 1 | 3 × 32 × 32 |

    The batch norm of the stem is as in `MDEQClassifier`: the model is made and called
    as equinox's models with a state are.

    **Cost:** 2 evaluations of a cell per step and scale; 4 steps by default.
    **Memory:** see `deqjax.ReversibleAdjoint`.

    **Differences from the source:** states are float32, not float64, and are
    undone exactly all the same; all `max_steps` steps are taken, where the authors stop
    below a relative residual of 1e-6, which 4 steps do not reach. The paper gives the
    channels, the widths and the cell; the kernels of the blocks between scales (1 × 1
    in the shortcut) are ours, and with them the number of parameters, published as
    about 10M.

    Args:
        channels: of each scale.
        widths: of each scale's cell, see `ConvCell`.
        num_classes: length of the output.
        in_channels: of the images.
        beta: weight on the cells, 0 < beta < 1.
        solver: in place of `deqjax.Reversible(None, None, beta=beta, batch_ndim=1)`;
            one of deqjax needs `batch_ndim=1`.
        adjoint: see `deqjax.fixed_point`.
        max_steps: steps per scale.
        key: decides the initial parameters.

    Raises:
        TypeError, ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, equinox as eqx, jax, jax.numpy as jnp
        >>> make = eqx.nn.make_with_state(deqjax.nn.RevDEQClassifier.cifar10)
        >>> model, state = eqx.filter_eval_shape(make, key=jax.random.key(0))
        >>> images = jnp.zeros((1, 3, 32, 32))
        >>> eqx.filter_eval_shape(model, images, state)[0].shape
        (1, 10)

    References:
        S. McCallum, K. Arora, J. Foster (2025), Reversible deep equilibrium models,
        doi:10.48550/arXiv.2509.12917.
    """

    stem: ConvNorms
    deqs: tuple[DEQ, ...]
    downs: tuple[_Downsample, ...]
    head: eqx.nn.Linear

    def __init__(
        self,
        channels: tuple[int, ...],
        widths: tuple[int, ...],
        num_classes: int,
        *,
        in_channels: int = 3,
        beta: float = 0.8,
        solver: Any = None,
        adjoint: optx.AbstractAdjoint | None = None,
        max_steps: int = 4,
        key: PRNGKeyArray,
    ):
        channels = check_list("channels", channels)
        widths = check_list("widths", widths)
        check_sizes(num_classes=num_classes, in_channels=in_channels)
        if len(widths) != len(channels):
            raise ValueError(
                "`widths` must have one entry per scale; got "
                f"{len(widths)} for {len(channels)} scales."
            )
        default = Reversible(None, None, beta=beta, batch_ndim=1)
        solver = batched_solver(solver, default)
        keys = iter(jr.split(key, 2 * len(channels) + 1))
        self.stem = ConvNorms((in_channels, channels[0]), (1,), (3,), key=next(keys))
        self.deqs = tuple(
            DEQ(
                ConvCell(c, width, key=next(keys)),
                solver=solver,
                adjoint=adjoint,
                max_steps=max_steps,
            )
            for c, width in zip(channels, widths, strict=True)
        )
        self.downs = tuple(
            _Downsample(before, after, key=next(keys))
            for before, after in itertools.pairwise(channels)
        )
        self.head = eqx.nn.Linear(channels[-1], num_classes, key=next(keys))

    def __call__(
        self,
        images: Images,
        state: eqx.nn.State,
        *,
        options: dict[str, Any] | None = None,
    ) -> tuple[Float[Array, "batch classes"], eqx.nn.State]:
        """The logits and the new state of the batch norm.

        Args:
            images: of shape (batch, channels, height, width).
            state: as `eqx.nn.make_with_state` returned it, or the last call.
            options: of the solves; see `deqjax.fixed_point`.
        """
        features, _, state = self.solve(images, state, options=options)
        return self.logits(features), state

    def solve(
        self,
        images: Images,
        state: eqx.nn.State,
        *,
        throw: bool = False,
        options: dict[str, Any] | None = None,
    ) -> tuple[Features, tuple[optx.Solution, ...], eqx.nn.State]:
        """What `logits` needs, the equilibrium of each scale, and the state.

        The equilibria come with all that `deqjax.fixed_point` returns: their `value`
        and, in `stats["residual"]`, one residual per image.

        Args:
            images: see `__call__`.
            state: see there.
            throw: see `deqjax.fixed_point`.
            options: see there.
        """
        weight = self.stem.convs[0].weight
        scales = len(self.deqs)
        x = check_images(
            images,
            weight.shape[1],
            weight.dtype,
            multiple=2 ** (scales - 1),
            why=f" for {scales} scales",
        )
        x, state = self.stem(x, state)
        sols = []
        for i, deq in enumerate(self.deqs):
            x = self.downs[i - 1](x) if i else x
            sol = deq.solve(x, throw=throw, options=options)
            x = x + sol.value
            sols.append(sol)
        return x, tuple(sols), state

    def logits(self, features: Features) -> Float[Array, "batch classes"]:
        """The logits that belong to the features of the last scale.

        Args:
            features: the first of what `solve` returns.
        """
        return jax.vmap(self.head)(jnp.mean(features, (2, 3)))

    # Published configurations

    @classmethod
    def cifar10(cls, *, key: PRNGKeyArray, **settings: Any) -> "RevDEQClassifier":
        """Four scales; `settings` are arguments in place of the published."""
        published = {
            "channels": (128, 256, 256, 128),
            "widths": (1, 3, 3, 1),
            "num_classes": 10,
        }
        return cls(**{**published, **settings}, key=key)

    @classmethod
    def cifar10_single(
        cls, *, key: PRNGKeyArray, **settings: Any
    ) -> "RevDEQClassifier":
        """One scale; `settings` are arguments in place of the published."""
        published = {"channels": (32,), "widths": (1,), "num_classes": 10}
        return cls(**{**published, **settings}, key=key)
