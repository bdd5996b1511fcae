"""The training of `train_images.py`: compiled steps, and what they are measured by."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt8

from benchmarks._images_config import Config, UsageError
from benchmarks._images_models import ImageClassifier, residual_history
from benchmarks.common.training import ProgressDisplay, TrainingError
from benchmarks.data.images import ImageData

_TEST_BATCH = 256
_RESIDUAL_IMAGES = 128
_METRICS = ("loss", "accuracy", "evaluations", "residual")
# By how many pixels images are shifted, and whether they are mirrored.
_AUGMENTATION = {"digits": (1, False), "cifar10": (4, True)}

TITLES = {"revdeq": "RevDEQ", "deq": "DEQ", "explicit": "explicit network"}

Bytes = UInt8[Array, "batch channels height width"]
Labels = Int[Array, " batch"]


@dataclasses.dataclass
class Run:
    """A trained model and everything that was measured on the way.

    Attributes:
        name: `"revdeq"`, `"deq"` or `"explicit"`.
        title: The name as people read it.
        model: With its trained parameters.
        history: One row of averages per epoch.
        parameters: How many numbers were trained.
        compile_seconds: Tracing and compiling the steps of training and of testing.
        train_seconds: All epochs with their tests, without compiling.
        temp_bytes: The compiler's account of the temporary memory of one gradient;
            None where the platform gives none.
        test: Averages over all test images after the last epoch.
        predictions: The class that the trained model gives each test image.
        residuals: `"before"` and `"after"` training, relative, of shape
            (scales, steps, images); empty for an explicit network.
    """

    name: str
    title: str
    model: ImageClassifier
    history: list[dict[str, float]]
    parameters: int
    compile_seconds: float
    train_seconds: float
    temp_bytes: int | None
    test: dict[str, float]
    predictions: np.ndarray
    residuals: dict[str, np.ndarray]


def normalise(images: Bytes, data: ImageData, dtype: Any) -> Float[Array, "..."]:
    """Bytes as numbers of mean 0 and variance 1 in each channel of the training set."""
    scaled = images.astype(dtype) / data.white
    return (scaled - data.mean.astype(dtype)) / data.std.astype(dtype)


def augment(images: Bytes, key: PRNGKeyArray, pad: int, mirror: bool) -> Bytes:
    """Shift each image by up to `pad` pixels, zeros coming in; mirror half of them."""
    key1, key2 = jr.split(key)
    offsets = jr.randint(key1, (images.shape[0], 2), 0, 2 * pad + 1)
    padded = jnp.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)))

    def crop(image: Array, offset: Array) -> Array:
        start = (jnp.zeros_like(offset[0]), offset[0], offset[1])
        return jax.lax.dynamic_slice(image, start, images.shape[1:])

    images = jax.vmap(crop)(padded, offsets)
    if mirror:
        turned = jr.bernoulli(key2, 0.5, (images.shape[0], 1, 1, 1))
        images = jnp.where(turned, images[..., ::-1], images)
    return images


def _dtype(config: Config) -> Any:
    return jnp.dtype("float64" if config.precision == "float64" else "float32")


def check_batch_size(config: Config, data: ImageData) -> None:
    """Refuse a batch that the training images do not fill."""
    count = len(data.train_images)
    if config.batch_size > count:
        raise UsageError(
            f"--batch-size: got {config.batch_size}, but there are only {count} "
            f"training images; choose at most {count}"
        )


def check_model(model: ImageClassifier, config: Config, data: ImageData) -> None:
    """Trace one gradient, so that what is not possible is said before it costs time.

    Raises:
        ValueError: or TypeError, from deqjax, if solver, adjoint and cell do not fit.
    """
    params, static = eqx.partition(model, eqx.is_inexact_array)
    shape = (config.batch_size, *data.train_images.shape[1:])
    jax.eval_shape(
        make_gradient(config, data, static),
        params,
        jax.ShapeDtypeStruct(shape, jnp.uint8),
        jax.ShapeDtypeStruct(shape[:1], jnp.int32),
        jax.ShapeDtypeStruct(shape[:1], jnp.int32),
        jr.key(0),
    )


def _measure(
    model: ImageClassifier, images: Bytes, labels: Labels, data: ImageData, dtype: Any
) -> tuple[Float[Array, "metrics batch"], Int[Array, " batch"]]:
    """The metrics of each image, loss first, and its predicted class."""
    logits, effort = model(normalise(images, data, dtype))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    predicted = jnp.argmax(logits, 1).astype(labels.dtype)
    correct = (predicted == labels).astype(loss.dtype)
    rows = (loss, correct, effort.evaluations, effort.residual)
    return jnp.stack([row.astype(loss.dtype) for row in rows]), predicted


def make_gradient(
    config: Config, data: ImageData, static: PyTree
) -> Callable[..., Any]:
    """The function that is differentiated and compiled: one batch's gradient.

    It takes `(params, images, labels, indices, key)`, all training images and labels
    with the indices of the batch, and returns the gradient and the batch's metrics.
    """
    dtype = _dtype(config)

    def loss_fn(params, images, labels, indices, key):
        model = eqx.combine(params, static)
        batch = images[indices]
        if config.augment:
            batch = augment(batch, key, *_AUGMENTATION[config.data])
        metrics, _ = _measure(model, batch, labels[indices], data, dtype)
        means = jnp.mean(metrics, 1)
        return means[0], means

    return jax.grad(loss_fn, has_aux=True)


def make_optimiser(config: Config, steps: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients, a short warm-up and a cosine to zero."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.lr, max(steps // 10, 1), steps
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, weight_decay=config.weight_decay),
    )


class _Tester:
    """Metrics and predictions over all test images, in batches of one shape."""

    def __init__(self, config: Config, data: ImageData, params: PyTree, static: PyTree):
        count = len(data.test_images)
        size = min(_TEST_BATCH, count)
        order = np.arange(-(-count // size) * size)
        self._weights = (order < count).reshape(-1, size)
        self._batches = np.where(order < count, order, 0).reshape(-1, size)
        self._images = jnp.asarray(data.test_images)
        self._labels = jnp.asarray(data.test_labels)
        dtype = _dtype(config)

        def run(params, images, labels, indices):
            model = eqx.combine(params, static)
            return _measure(model, images[indices], labels[indices], data, dtype)

        lowered = jax.jit(run).lower(
            params, self._images, self._labels, self._batches[0]
        )
        self._run = lowered.compile()

    def __call__(self, params: PyTree) -> tuple[dict[str, float], np.ndarray]:
        metrics, predictions = [], []
        for batch, weights in zip(self._batches, self._weights, strict=True):
            rows, predicted = self._run(params, self._images, self._labels, batch)
            metrics.append(np.asarray(rows)[:, weights])
            predictions.append(np.asarray(predicted)[weights])
        means = np.concatenate(metrics, 1).mean(1)
        return _named(means), np.concatenate(predictions)


def _named(means: Any) -> dict[str, float]:
    return dict(zip(_METRICS, map(float, np.asarray(means)), strict=True))


def _epoch_row(means: Any) -> dict[str, float]:
    row = _named(means)
    return {
        "loss": row["loss"],
        "train_accuracy": row["accuracy"],
        "evaluations": row["evaluations"],
        "residual": row["residual"],
    }


class _Residuals:
    """Relative residuals of some test images over more steps than the model takes."""

    def __init__(self, config: Config, data: ImageData, params: PyTree, static: PyTree):
        images = jnp.asarray(data.test_images[:_RESIDUAL_IMAGES])
        steps = max(4 * config.steps, 24) if config.steps else 0
        dtype = _dtype(config)

        def run(params, images):
            model = eqx.combine(params, static)
            return residual_history(
                model, config, normalise(images, data, dtype), steps
            )

        self._run, self._images = jax.jit(run), images

    def __call__(self, params: PyTree) -> np.ndarray:
        return np.asarray(self._run(params, self._images))


class _Trainer:
    """The compiled steps of one model's training."""

    def __init__(self, model: ImageClassifier, config: Config, data: ImageData):
        self._size = config.batch_size
        self.steps = len(data.train_images) // self._size
        self.params, self.static = eqx.partition(model, eqx.is_inexact_array)
        self._images = jnp.asarray(data.train_images)
        self._labels = jnp.asarray(data.train_labels)
        optimiser = make_optimiser(config, config.epochs * self.steps)
        self._state = jax.jit(optimiser.init)(self.params)
        self._keys = jr.split(jr.key(config.seed), (config.epochs, self.steps))
        self._zero = jnp.zeros(len(_METRICS), _dtype(config))
        self._order = np.random.default_rng(config.seed)

        def update(params, state, grads, total, means):
            updates, state = optimiser.update(grads, state, params)
            return optax.apply_updates(params, updates), state, total + means

        # The gradient is a program of its own, so that its memory can be told.
        gradient = jax.jit(make_gradient(config, data, self.static))
        batch = np.zeros(self._size, np.int32)
        args = (self.params, self._images, self._labels, batch, self._keys[0, 0])
        self._gradient = gradient.lower(*args).compile()
        args = (self.params, self._state, self.params, self._zero, self._zero)
        self._update = jax.jit(update).lower(*args).compile()

    @property
    def temp_bytes(self) -> int | None:
        """The temporary memory of one gradient, by the compiler's account."""
        memory = self._gradient.memory_analysis()
        return None if memory is None else int(memory.temp_size_in_bytes)

    def epoch(self, epoch: int, display: ProgressDisplay) -> dict[str, float]:
        """All training images once, in a new order; the averages on the way."""
        order = self._order.permutation(len(self._images)).astype(np.int32)
        total = self._zero
        for step in range(self.steps):
            batch = order[step * self._size : (step + 1) * self._size]
            grads, means = self._gradient(
                self.params, self._images, self._labels, batch, self._keys[epoch, step]
            )
            self.params, self._state, total = self._update(
                self.params, self._state, grads, total, means
            )
            so_far, count = total, step + 1
            done = epoch * self.steps + count
            display.step(done, lambda t=so_far, n=count: _epoch_row(t / n))
        return _epoch_row(total / self.steps)


def _hint(config: Config) -> str:
    """What else makes a gradient NaN: steps that could not be undone."""
    if config.adjoint != "reversible":
        return ""
    return ", or --adjoint unrolled: what undoes the steps may have drifted"


def train(
    model: ImageClassifier,
    config: Config,
    data: ImageData,
    name: str,
    display: ProgressDisplay,
) -> Run:
    """Train `model`, called `name`, on `data` as `config` says.

    Raises:
        TrainingError: if the loss is no longer finite.
    """
    steps = len(data.train_images) // config.batch_size
    total = config.epochs * steps
    with display.training(TITLES[name], total, per_unit=steps):
        return _train(model, config, data, name, display)


def _train(
    model: ImageClassifier,
    config: Config,
    data: ImageData,
    name: str,
    display: ProgressDisplay,
) -> Run:
    display.note("compiling")
    start = time.perf_counter()
    trainer = _Trainer(model, config, data)
    tester = _Tester(config, data, trainer.params, trainer.static)
    compile_seconds = time.perf_counter() - start

    residuals = {}
    curves = _Residuals(config, data, trainer.params, trainer.static)
    if name != "explicit":
        residuals["before"] = curves(trainer.params)

    history = []
    test, predictions = {}, np.zeros(0, np.int32)
    start = time.perf_counter()
    for epoch in range(config.epochs):
        row = trainer.epoch(epoch, display)
        test, predictions = tester(trainer.params)
        row |= {"test_loss": test["loss"], "test_accuracy": test["accuracy"]}
        row["seconds"] = time.perf_counter() - start
        history.append(row)
        display.evaluated((epoch + 1) * trainer.steps, row)
        if not np.isfinite(row["loss"]) or not np.isfinite(row["test_loss"]):
            raise TrainingError(
                f"the {TITLES[name]} diverged in epoch {epoch + 1} (training loss "
                f"{row['loss']:g}, test loss {row['test_loss']:g}); try a lower --lr "
                f"than {config.lr:g}{_hint(config)}"
            )
    train_seconds = time.perf_counter() - start

    if name != "explicit":
        residuals["after"] = curves(trainer.params)
    return Run(
        name=name,
        title=TITLES[name],
        model=eqx.combine(trainer.params, trainer.static),
        history=history,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(trainer.params)),
        compile_seconds=compile_seconds,
        train_seconds=train_seconds,
        temp_bytes=trainer.temp_bytes,
        test=test,
        predictions=predictions,
        residuals=residuals,
    )
