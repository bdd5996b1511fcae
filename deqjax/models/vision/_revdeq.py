"""Reversible deep equilibrium models for images."""

import itertools
from typing import Any, ClassVar, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray

from ..._types import Options
from ...nn._checks import (
    Images,
    batched_solver,
    check_images,
    check_list,
    check_sizes,
)
from ...nn._conv_cell import ConvCell, group_norm
from ...nn._deq import DEQ
from ...nn._images import Features, batch_norm, conv, normalise
from ...solvers import Reversible
from ...solvers._optimistix import AnySolver
from .._interface import AbstractModel, check_state

Norm: TypeAlias = str  # "batch" or "group"
MOMENTUM = 0.99


class _Stem(eqx.Module):
    """A convolution with batch norm and ReLU, or with bias and group norm."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm | eqx.nn.GroupNorm

    def __init__(self, inputs: int, outputs: int, kind: Norm, *, key: PRNGKeyArray):
        self.conv = conv(inputs, outputs, 3, bias=kind == "group", key=key)
        self.norm = _norm(kind, outputs)

    def __call__(
        self, x: Features, state: eqx.nn.State
    ) -> tuple[Features, eqx.nn.State]:
        x, state = _apply(self.norm, jax.vmap(self.conv)(x), state)
        return (x if isinstance(self.norm, eqx.nn.GroupNorm) else jax.nn.relu(x)), state


class _Downsample(eqx.Module):
    """A residual block with norms before its convolutions, to half the resolution.

    With batch norms the shortcut is of x itself, with group norms of relu(norm(x)).
    """

    norm1: eqx.nn.BatchNorm | eqx.nn.GroupNorm
    norm2: eqx.nn.BatchNorm | eqx.nn.GroupNorm
    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    shortcut: eqx.nn.Conv2d

    def __init__(self, inputs: int, outputs: int, kind: Norm, *, key: PRNGKeyArray):
        key1, key2, key3 = jr.split(key, 3)
        self.norm1, self.norm2 = _norm(kind, inputs), _norm(kind, outputs)
        self.conv1 = conv(inputs, outputs, 3, stride=2, key=key1)
        self.conv2 = conv(outputs, outputs, 3, key=key2)
        self.shortcut = conv(inputs, outputs, 1, stride=2, key=key3)

    def __call__(
        self, x: Features, state: eqx.nn.State
    ) -> tuple[Features, eqx.nn.State]:
        h, state = _apply(self.norm1, x, state)
        h = jax.nn.relu(h)
        inner, state = _apply(self.norm2, jax.vmap(self.conv1)(h), state)
        inner = jax.vmap(self.conv2)(jax.nn.relu(inner))
        source = h if isinstance(self.norm1, eqx.nn.GroupNorm) else x
        return jax.vmap(self.shortcut)(source) + inner, state


def _norm(kind: Norm, channels: int) -> eqx.nn.BatchNorm | eqx.nn.GroupNorm:
    if kind == "batch":
        return batch_norm(channels, momentum=MOMENTUM)
    return group_norm(channels)


def _apply(
    norm: eqx.nn.BatchNorm | eqx.nn.GroupNorm, x: Features, state: eqx.nn.State
) -> tuple[Features, eqx.nn.State]:
    if isinstance(norm, eqx.nn.GroupNorm):
        return jax.vmap(norm)(x), state
    return normalise(norm, x, state)


class RevDEQClassifier(AbstractModel):
    r"""The reversible deep equilibrium model as a classifier of images.

    A stem, one convolution 3 × 3 with a norm; at each scale
    $x \leftarrow x + z^*$ with $z^* = f(z^*, x)$, f being a `ConvCell` of its own, and
    between scales a residual block with norms before its convolutions, to half the
    resolution; mean over squares of pixels, linear.

    | configuration | parameters | channels | widths | images |
    |---|---|---|---|---|
    | `cifar10` | 10,319,754 | 128, 256, 256, 128 | 1, 3, 3, 1 | 3 × 32 × 32 |
    | `cifar10_single` | 24,714 | 32 | 1 | 3 × 32 × 32 |

    With several scales the stem has a batch norm and a ReLU, and 4 steps are taken at
    each; with one scale it has a bias, a group norm and no ReLU, the head reads z*
    alone, averaged to 4 × 4, and 2 steps are taken. Both have β = 0.8. Trained with
    AdamW (weight decay 1e-4), halved on plateaus, batches of 64, at most 100 epochs,
    random crops of images padded by 4, and flips; the learning rate is 3e-4 with
    several scales, 1e-3 with one.

    `solve` returns one solution for all scales. Its `value` is what the head reads; its
    statistics are the evaluations and steps of all scales together and, for each image,
    the largest residual; `aux` holds the solution of each scale.

    **Cost:** 2 evaluations of a cell per step and scale. **Memory:** see
    `deqjax.ReversibleAdjoint`.

    **Differences from the source,** the authors' code: states are float32, not float64,
    and are undone exactly all the same; all `max_steps` steps are taken, where the
    authors stop below a relative residual of 1e-6, which 4 steps do not reach.

    Args:
        channels: of each scale.
        widths: of each scale's cell, see `ConvCell`.
        num_classes: length of the output.
        in_channels: of the images.
        stem: `"batch"`: batch norm and ReLU; `"group"`: bias, group norm, no ReLU.
        between: norms between scales. `"batch"`: the authors' batch norms, and a
            shortcut of x; `"group"`: group norms, and a shortcut of relu(norm(x)),
            which keeps images of a batch apart.
        skip: whether x is added to z*.
        pool: the head reads means over pool × pool squares of the image.
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
        >>> make = eqx.nn.make_with_state(deqjax.models.RevDEQClassifier.published)
        >>> model, state = eqx.filter_eval_shape(make, "cifar10", key=jax.random.key(0))
        >>> images = jnp.zeros((1, 3, 32, 32))
        >>> eqx.filter_eval_shape(model, images, state)[0].shape
        (1, 10)

    References:
        S. McCallum, K. Arora, J. Foster (2025), Reversible deep equilibrium models,
        doi:10.48550/arXiv.2509.12917.
    """

    configurations: ClassVar = {
        "cifar10": {
            "channels": (128, 256, 256, 128),
            "widths": (1, 3, 3, 1),
            "num_classes": 10,
        },
        "cifar10_single": {
            "channels": (32,),
            "widths": (1,),
            "num_classes": 10,
            "stem": "group",
            "skip": False,
            "pool": 4,
            "max_steps": 2,
        },
    }

    stem: _Stem
    deqs: tuple[DEQ, ...]
    downs: tuple[_Downsample, ...]
    head: eqx.nn.Linear
    skip: bool = eqx.field(static=True)
    pool: int = eqx.field(static=True)

    def __init__(
        self,
        channels: tuple[int, ...],
        widths: tuple[int, ...],
        num_classes: int,
        *,
        in_channels: int = 3,
        stem: Norm = "batch",
        between: Norm = "batch",
        skip: bool = True,
        pool: int = 1,
        beta: float = 0.8,
        solver: AnySolver | None = None,
        adjoint: optx.AbstractAdjoint | None = None,
        max_steps: int = 4,
        key: PRNGKeyArray,
    ):
        channels = check_list("channels", channels)
        widths = check_list("widths", widths)
        check_sizes(num_classes=num_classes, in_channels=in_channels, pool=pool)
        for name, kind in (("stem", stem), ("between", between)):
            if kind not in ("batch", "group"):
                raise ValueError(f'`{name}` must be "batch" or "group"; got {kind!r}.')
        if len(widths) != len(channels):
            raise ValueError(
                "`widths` must have one entry per scale; got "
                f"{len(widths)} for {len(channels)} scales."
            )
        default = Reversible(None, None, beta=beta, batch_ndim=1)
        solver = batched_solver(solver, default)
        keys = iter(jr.split(key, 2 * len(channels) + 1))
        self.stem = _Stem(in_channels, channels[0], stem, key=next(keys))
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
            _Downsample(before, after, between, key=next(keys))
            for before, after in itertools.pairwise(channels)
        )
        self.head = eqx.nn.Linear(channels[-1] * pool**2, num_classes, key=next(keys))
        self.skip, self.pool = skip, pool

    def _solve(
        self,
        inputs: Images,
        state: Any,
        *,
        z0: tuple[Features | None, ...] | None,
        key: PRNGKeyArray | None,
        max_steps: int | None,
        throw: bool,
        options: Options | None,
    ) -> tuple[optx.Solution, Any]:
        check_state(state)
        weight = self.stem.conv.weight
        scales = len(self.deqs)
        starts = (None,) * scales if z0 is None else z0
        if len(starts) != scales:
            raise ValueError(
                "`z0` must have one entry per scale, an array or None; got "
                f"{len(starts)} for {scales} scales."
            )
        x = check_images(
            inputs,
            weight.shape[1],
            weight.dtype,
            multiple=2 ** (scales - 1) * self.pool,
            why=f" for {scales} scales and `pool` = {self.pool}",
        )
        x, state = self.stem(x, state)
        sols = []
        for i, (deq, start) in enumerate(zip(self.deqs, starts, strict=True)):
            if i:
                x, state = self.downs[i - 1](x, state)
            sol = deq.solve(
                x, z0=start, max_steps=max_steps, throw=throw, options=options
            )
            x = x + sol.value if self.skip else sol.value
            sols.append(sol)
        return _together(x, sols), state

    def _logits(
        self, z: Features, state: Any, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "batch classes"], Any]:
        pool = eqx.nn.AdaptiveAvgPool2d(self.pool)
        features = jax.vmap(pool)(z).reshape(len(z), -1)
        return jax.vmap(self.head)(features), state


def _together(value: Features, sols: list[optx.Solution]) -> optx.Solution:
    """One solution for those of all scales, which `aux` holds."""
    results, result = optx.RESULTS, sols[0].result
    for sol in sols[1:]:
        result = results.where(result == results.successful, sol.result, result)
    parts = {k: [sol.stats[k] for sol in sols] for k in sols[0].stats}
    worst = lambda x: jnp.max(jnp.stack(x), axis=0)
    ways = {
        "num_evals": sum,
        "num_steps": sum,
        "residual": worst,
        "relative_residual": worst,
        "converged": lambda x: jnp.all(jnp.stack(x), axis=0),
    }
    stats = {
        k: ways[k](v)
        for k, v in parts.items()
        if k in ways and all(part is not None for part in v)
    }
    return optx.Solution(value, result, tuple(sols), stats, None)
