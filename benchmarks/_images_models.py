"""The convolutional models of `train_images.py`: equilibria, or the cells once."""

import dataclasses
import itertools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

import deqjax
from benchmarks._images_config import Config, UsageError
from benchmarks.data.images import ImageData

Features = Float[Array, "batch channels height width"]


def _norm(channels: int) -> eqx.nn.GroupNorm:
    """A group norm of 16 channels per group, or of as few groups as divide them."""
    groups = max(channels // 16, 1)
    return eqx.nn.GroupNorm(groups if channels % groups == 0 else 1, channels)


def _conv(
    inputs: int, outputs: int, size: int, key: PRNGKeyArray, stride: int = 1
) -> eqx.nn.Conv2d:
    return eqx.nn.Conv2d(
        inputs, outputs, size, stride, size // 2, use_bias=False, key=key
    )


def _cast(layer: eqx.nn.Conv2d, dtype: Any) -> eqx.nn.Conv2d:
    return jax.tree.map(lambda w: w.astype(dtype), layer)


class ConvCell(eqx.Module):
    """The cell of the RevDEQ for images (McCallum, Arora, Foster, arXiv 2509.12917).

    f(z, x) = norm₃(relu(z + norm₂(x + conv₂(relu(norm₁(conv₁ z)))))), with convolutions
    of 3 × 3 without bias and group norms of 16 channels per group.
    """

    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    norm1: eqx.nn.GroupNorm
    norm2: eqx.nn.GroupNorm
    norm3: eqx.nn.GroupNorm
    dtype: Any = eqx.field(static=True)

    def __init__(self, channels: int, width: int, dtype: Any, *, key: PRNGKeyArray):
        """Initialise for states of `channels`, `width` times as many inside.

        Args:
            channels: Channels of the iterate z and of the injection x.
            width: The inside has `width * channels` channels.
            dtype: What the convolutions compute in; norms compute in at least float32.
            key: Decides the initial parameters.
        """
        key1, key2 = jr.split(key)
        self.conv1 = _conv(channels, width * channels, 3, key1)
        self.conv2 = _conv(width * channels, channels, 3, key2)
        self.norm1 = _norm(width * channels)
        self.norm2 = _norm(channels)
        self.norm3 = _norm(channels)
        self.dtype = dtype

    def initial_state(self, x: Features) -> Features:
        """Where solves start: at x, so that the explicit block is their first step.

        Not at 0, where conv₁ z = 0 sits on the kink of relu, whose derivative would
        be that of one side or the other by rounding alone.
        """
        return x

    def __call__(
        self, z: Features, x: Features, *, key: PRNGKeyArray | None = None
    ) -> Features:
        """The cell on a whole batch; the dtype of `z` comes back."""
        conv1, conv2 = _cast(self.conv1, self.dtype), _cast(self.conv2, self.dtype)

        def one(z: Array, x: Array) -> Array:
            h = conv1(z.astype(self.dtype)).astype(z.dtype)
            h = jax.nn.relu(self.norm1(h))
            h = conv2(h.astype(self.dtype)).astype(z.dtype)
            return self.norm3(jax.nn.relu(z + self.norm2(x + h)))

        return jax.vmap(one)(z, x)


class Effort(NamedTuple):
    """What the solves of a forward pass cost and reached, per image.

    Attributes:
        evaluations: Of all cells together.
        residual: ‖f(z) − z‖ / ‖f(z)‖, the worst of all scales; NaN without a solve.
    """

    evaluations: Float[Array, " batch"]
    residual: Float[Array, " batch"]


class Equilibrium(eqx.Module):
    """A cell solved for its fixed point."""

    deq: deqjax.nn.DEQ

    def __call__(self, x: Features) -> tuple[Features, Effort]:
        """z* = f(z*, x), and what it took."""
        sol = self.deq.solve(x)
        stats = jax.lax.stop_gradient(sol.stats)  # they have no derivative
        evaluations = stats["num_evals"].astype(jnp.float32)
        residual = stats["relative_residual"].astype(jnp.float32)
        shape = x.shape[:1]
        return sol.value, Effort(
            jnp.broadcast_to(evaluations, shape), jnp.broadcast_to(residual, shape)
        )


class Explicit(eqx.Module):
    """A cell applied once, z = f(x, x): an ordinary residual block."""

    cell: ConvCell

    def __call__(self, x: Features) -> tuple[Features, Effort]:
        """The block's output, for one evaluation."""
        ones = jnp.ones(x.shape[0], jnp.float32)
        return self.cell(x, x), Effort(ones, jnp.full_like(ones, jnp.nan))


class Downsample(eqx.Module):
    """A pre-activation residual block to half the resolution (He et al. 2016)."""

    norm1: eqx.nn.GroupNorm
    norm2: eqx.nn.GroupNorm
    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    shortcut: eqx.nn.Conv2d

    def __init__(self, inputs: int, outputs: int, *, key: PRNGKeyArray):
        """Initialise for `inputs` channels before and `outputs` after."""
        key1, key2, key3 = jr.split(key, 3)
        self.norm1, self.norm2 = _norm(inputs), _norm(outputs)
        self.conv1 = _conv(inputs, outputs, 3, key1, stride=2)
        self.conv2 = _conv(outputs, outputs, 3, key2)
        self.shortcut = _conv(inputs, outputs, 1, key3, stride=2)

    def __call__(self, x: Features) -> Features:
        """The features at half the resolution."""

        def one(x: Array) -> Array:
            h = jax.nn.relu(self.norm1(x))
            inner = jax.nn.relu(self.norm2(self.conv1(h)))
            return self.shortcut(h) + self.conv2(inner)

        return jax.vmap(one)(x)


class ImageClassifier(eqx.Module):
    """Stem, x ← x + block(x) at each scale with downsampling between, pooling, linear.

    Two classifiers made from one `key` with equilibrium and with explicit blocks have
    the same parameters.
    """

    stem: eqx.nn.Conv2d
    stem_norm: eqx.nn.GroupNorm
    blocks: tuple[Equilibrium | Explicit, ...]
    downs: tuple[Downsample, ...]
    head: eqx.nn.Linear
    pool: int = eqx.field(static=True)

    def __init__(
        self, config: Config, data: ImageData, explicit: bool, *, key: PRNGKeyArray
    ):
        """Initialise for the images of `data`, as `config` says.

        Raises:
            UsageError: if the images are too small for so many scales.
            ValueError: or TypeError, from deqjax, for a solver or an adjoint that is
                not possible.
        """
        channels = config.channels
        _check_resolution(config, data)
        keys = iter(jr.split(key, 2 * len(channels) + 1))
        self.stem = _conv(data.train_images.shape[1], channels[0], 3, next(keys))
        self.stem_norm = _norm(channels[0])
        dtype = jnp.dtype(config.precision)
        cells = [
            ConvCell(c, width, dtype, key=next(keys))
            for c, width in zip(channels, config.widths, strict=True)
        ]
        self.blocks = tuple(
            Explicit(cell) if explicit else Equilibrium(make_deq(cell, config))
            for cell in cells
        )
        self.downs = tuple(
            Downsample(before, after, key=next(keys))
            for before, after in itertools.pairwise(channels)
        )
        features = channels[-1] * config.pool**2
        self.head = eqx.nn.Linear(features, len(data.classes), key=next(keys))
        self.pool = config.pool

    def __call__(
        self, images: Features
    ) -> tuple[Float[Array, "batch classes"], Effort]:
        """The logits of normalised images, and what the solves took."""
        x = self.embed(images)
        efforts = []
        for i, block in enumerate(self.blocks):
            x = self.downs[i - 1](x) if i else x
            z, effort = block(x)
            x = x + z
            efforts.append(effort)
        batch, channels, height, width = x.shape
        n = self.pool
        cells = x.reshape(batch, channels, n, height // n, n, width // n)
        logits = jax.vmap(self.head)(cells.mean((3, 5)).reshape(batch, -1))
        evaluations, residuals = zip(*efforts, strict=True)
        return logits, Effort(
            jnp.sum(jnp.stack(evaluations), 0), jnp.max(jnp.stack(residuals), 0)
        )

    def embed(self, images: Features) -> Features:
        """The stem: what the first scale works on."""
        return jax.vmap(lambda x: jax.nn.relu(self.stem_norm(self.stem(x))))(images)


def residual_history(
    model: ImageClassifier, config: Config, images: Features, num_steps: int
) -> Float[Array, "scales steps batch"]:
    """‖f(z) − z‖ / ‖z‖ at each step of longer solves than the model's own.

    The solver of `config` takes `num_steps` steps whatever the tolerance; z in the
    denominator is its last iterate. Between scales the model's own solves are used, so
    that each scale sees what it sees in the model.
    """
    static = dataclasses.replace(config, rtol=None, steps=num_steps)
    x = model.embed(images)
    histories = []
    for i, block in enumerate(model.blocks):
        if isinstance(block, Explicit):
            raise TypeError("An explicit network has no residuals.")
        x = model.downs[i - 1](x) if i else x
        longer = make_deq(block.deq.cell, static)
        sol = longer.solve(x, options={"record": True})
        size = jnp.sqrt(jnp.sum(sol.value**2, axis=(1, 2, 3)))
        histories.append(sol.stats["residual_history"] / size)
        x = x + block(x)[0]
    return jnp.stack(histories)


def _check_resolution(config: Config, data: ImageData) -> None:
    """Refuse scales or pooling that the images' size does not allow."""
    height, width = data.train_images.shape[2:]
    halvings = len(config.channels) - 1
    step = 2**halvings * config.pool
    if height % step or width % step:
        raise UsageError(
            f"--channels: got {len(config.channels)} scales with --pool {config.pool}, "
            f"for which height and width must be multiples of {step}, but the images "
            f"of --data {config.data} have {height} × {width}; give fewer scales, or "
            "another --pool"
        )


def make_deq(cell: ConvCell, config: Config) -> deqjax.nn.DEQ:
    """The equilibrium layer that `config` asks for; each image is its own problem."""
    if config.solver is None or config.adjoint is None or config.steps is None:
        raise TypeError("An explicit network has no solver.")
    tolerance = {"rtol": config.rtol, "atol": None if config.rtol is None else 1e-6}
    common = {**tolerance, "beta": config.beta, "batch_ndim": 1}
    if config.solver == "reversible":
        solver = deqjax.Reversible(**common)
    else:
        solver = deqjax.Picard(**common)
    adjoint = {
        "reversible": deqjax.ReversibleAdjoint,
        "implicit": deqjax.ImplicitAdjoint,
        "unrolled": deqjax.UnrolledAdjoint,
        "jfb": deqjax.JFBAdjoint,
    }[config.adjoint]()
    return deqjax.nn.DEQ(cell, solver=solver, adjoint=adjoint, max_steps=config.steps)
