"""Every named configuration of deqjax's models, with the shapes of its data.

Nothing is allocated: models are counted, and gradients compiled, from shapes alone.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from deqjax.models import (
    AbstractLanguageModel,
    AbstractModel,
    DEQTransformerLM,
    ImplicitResNet,
    MDEQClassifier,
    MDEQSegmenter,
    MonotoneClassifier,
    RevDEQClassifier,
    RevDEQLM,
    TransformerLM,
)


class Row(NamedTuple):
    """A configuration.

    Attributes:
        model: The class.
        configuration: Its name there.
        inputs: The input of one example, in words.
        data: The shapes of one example's input and target.
        source: Where the configuration is from.
        cell: What of the model is evaluated again and again; None: nothing.
    """

    model: type[AbstractModel]
    configuration: str
    inputs: str
    data: Any
    source: str
    cell: Callable[[Any], Any]

    @property
    def name(self) -> str:
        """Class and configuration."""
        return f"{self.model.__name__}.{self.configuration}"


# --- inputs ---------------------------------------------------------------------------


def tokens(length: int) -> tuple[Any, Any]:
    """The shapes of one sequence, and of what follows each of its tokens."""
    shape = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return shape, shape


def image(height: int, width: int, *labels: int) -> tuple[Any, Any]:
    """The shapes of one image, and of its label or labels."""
    shape = jax.ShapeDtypeStruct((1, 3, height, width), jnp.float32)
    return shape, jax.ShapeDtypeStruct((1, *labels), jnp.int32)


def run(model: Any, state: Any, data: Any, key: Any) -> tuple[Any, Any]:
    """The mean of −log p of one example's targets, and its equilibria."""
    inputs, targets = data
    sol, state = model.solve(inputs, state, key=key)
    if isinstance(model, AbstractLanguageModel):
        return jnp.mean(model.nll(sol.value, targets, key=key)), sol
    logits, _ = model.logits(sol.value, state, key=key)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked), sol


MCCALLUM = "McCallum et al. (2025)"
MDEQ = "Bai et al. (2020)"
MONDEQ = "Winston & Kolter (2020)"

CIFAR, IMAGENET = ("3 × 32 × 32", image(32, 32)), ("3 × 224 × 224", image(224, 224))
STREETS = ("3 × 512 × 1024", image(512, 1024, 128, 256))
WIDE_STREETS = ("3 × 768 × 1024", image(768, 1024, 192, 256))
DIGITS = jax.ShapeDtypeStruct((1, 784), jnp.float32), image(28, 28)[1]

of_deq = lambda model: model.deq
of_backbone = lambda model: model.backbone.deq
LONG = ("448 tokens", tokens(448))
MONOTONE = (MONDEQ, lambda model: model.layer.operator)
REVERSIBLE = (MCCALLUM, lambda model: model.deqs)

ROWS = [
    Row(RevDEQLM, "wikitext103", *LONG, MCCALLUM, of_deq),
    Row(
        TransformerLM,
        "wikitext103",
        *LONG,
        "of equal size, for comparison",
        lambda model: None,
    ),
    Row(
        DEQTransformerLM,
        "wikitext103",
        "150 tokens, memory of 150",
        tokens(150),
        "Bai et al. (2019)",
        of_deq,
    ),
    Row(
        DEQTransformerLM,
        "wikitext103_regularised",
        "150 tokens, memory of 300",
        tokens(150),
        "Bai et al. (2021)",
        of_deq,
    ),
    Row(MDEQClassifier, "cifar10_tiny", *CIFAR, MDEQ, of_backbone),
    Row(MDEQClassifier, "cifar10_large", *CIFAR, MDEQ, of_backbone),
    Row(MDEQClassifier, "imagenet_small", *IMAGENET, MDEQ, of_backbone),
    Row(MDEQClassifier, "imagenet_large", *IMAGENET, MDEQ, of_backbone),
    Row(MDEQSegmenter, "cityscapes_small", *STREETS, MDEQ, of_backbone),
    Row(MDEQSegmenter, "cityscapes_large", *STREETS, MDEQ, of_backbone),
    Row(MDEQSegmenter, "cityscapes_xl", *WIDE_STREETS, MDEQ, of_backbone),
    Row(RevDEQClassifier, "cifar10", *CIFAR, *REVERSIBLE),
    Row(RevDEQClassifier, "cifar10_single", *CIFAR, *REVERSIBLE),
    Row(ImplicitResNet, "cifar10", *CIFAR, "Fung et al. (2022)", of_deq),
    Row(MonotoneClassifier, "mnist_dense", "784", DIGITS, *MONOTONE),
    Row(MonotoneClassifier, "cifar10_conv", *CIFAR, *MONOTONE),
    Row(MonotoneClassifier, "cifar10_tiers", *CIFAR, *MONOTONE),
    Row(MonotoneClassifier, "cifar10_conv_large", *CIFAR, *MONOTONE),
    Row(MonotoneClassifier, "cifar10_tiers_large", *CIFAR, *MONOTONE),
]


# --- models and gradients -----------------------------------------------------------


def init(row: Row, key: Any, **settings: Any) -> tuple[Any, Any]:
    """The model, and the state of its batch norms (empty where it has none)."""
    make = eqx.nn.make_with_state(row.model.published)
    return make(row.configuration, key=key, **settings)


@ft.cache
def shapes(row: Row) -> tuple[Any, Any]:
    """What `init` returns, in shapes."""
    return eqx.filter_eval_shape(init, row, jr.key(0))


def gradient(model: Any, state: Any) -> tuple[Callable, Any]:
    """A function of arrays, and the arrays it takes beside data and key.

    It returns the loss of one example and its gradient.
    """
    moving, fixed = eqx.partition(model, _is_inexact)
    arrays, static = eqx.partition(state, _is_array)

    def evaluate(arrays: Any, data: Any, key: Any) -> Any:
        moving, state = arrays

        def loss(moving: Any) -> Any:
            state_ = eqx.combine(state, static)
            return run(eqx.combine(moving, fixed), state_, data, key)[0]

        return jax.value_and_grad(loss)(moving)

    return evaluate, (moving, arrays)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype")


def _is_inexact(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
