"""The tasks: what is asked, how examples are made, and which model answers."""

import abc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from ._cells import LocalCell, LoopModel, OrthogonalShift, TokenEmbedding
from ._config import Config, UsageError
from ._groups import group_table


class Examples(NamedTuple):
    """A batch: what is given, what is asked, and where.

    Attributes:
        inputs: tokens (batch, length), or features (batch, length, features).
        targets: a class for every position.
        asked: the positions that count.
    """

    inputs: Array
    targets: Int[Array, "batch length"]
    asked: Bool[Array, "batch length"]


class Task(abc.ABC):
    """A source of examples with the model that learns from them.

    Attributes:
        unit: what a test set is named by, `"length"` for example.
        test_sets: the values of it, with the one that is trained on first.
    """

    unit: str = "length"
    test_sets: tuple[int, ...]

    def __init__(self, config: Config):
        self.config = config
        self.test_sets = (config.length, *config.test_lengths)

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, size: int) -> Examples:
        """Examples to train on; may be traced."""

    @abc.abstractmethod
    def test(self, key: PRNGKeyArray, size: int, test_set: int) -> Examples:
        """Examples of a test set, which training never sees."""

    @abc.abstractmethod
    def model(self, key: PRNGKeyArray) -> Any:
        """The untrained model."""

    def steps(self, test_set: int) -> int:
        """How many steps an answer may take at test time: as many per position."""
        return math.ceil(self.config.steps * test_set / self.config.length)


class _Sequences(Task):
    """Sequences of any length, drawn afresh for every update."""

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray, size: int, length: int) -> Examples:
        """Examples of a length."""

    def sample(self, key: PRNGKeyArray, size: int) -> Examples:
        return self.draw(key, size, self.config.length)

    def test(self, key: PRNGKeyArray, size: int, test_set: int) -> Examples:
        return self.draw(key, size, test_set)


class Chains(_Sequences):
    """A chain of nodes; the last one is asked what only the first one was told.

    The first node has `features` numbers, of which the sign of one is the label; the
    others are noise. Every node hears its left neighbour alone.
    """

    features = 32

    def draw(self, key: PRNGKeyArray, size: int, length: int) -> Examples:
        key1, key2 = jr.split(key)
        label = jr.bernoulli(key1, shape=(size,))
        noise = jr.normal(key2, (size, self.features))
        first = noise.at[:, 0].set(jnp.where(label, 1.0, -1.0))
        inputs = jnp.zeros((size, length, self.features)).at[:, 0].set(first)
        targets = jnp.broadcast_to(label[:, None], (size, length)).astype(jnp.int32)
        asked = jnp.zeros((size, length), bool).at[:, -1].set(True)
        if self.config.ask == "all":
            asked = jnp.ones((size, length), bool)
        return Examples(inputs, targets, asked)

    def model(self, key: PRNGKeyArray) -> LoopModel:
        key1, key2, key3 = jr.split(key, 3)
        width = self.config.width
        return LoopModel(
            eqx.nn.Linear(self.features, width, use_bias=False, key=key1),
            OrthogonalShift(width, key=key2),
            eqx.nn.Linear(width, 2, key=key3),
        )


class PrefixSums(_Sequences):
    """Strings of bits; every position is asked for the parity of those up to it."""

    def draw(self, key: PRNGKeyArray, size: int, length: int) -> Examples:
        bits = jr.bernoulli(key, shape=(size, length)).astype(jnp.int32)
        targets = jnp.cumsum(bits, axis=1) % 2
        return Examples(bits, targets, jnp.ones((size, length), bool))

    def model(self, key: PRNGKeyArray) -> LoopModel:
        return _local_model(self.config, 2, 2, (-1, 0, 1), key)


class States(_Sequences):
    """Words in a group; every position is asked for the product of those up to it."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.table = jnp.asarray(group_table(config.group))

    def draw(self, key: PRNGKeyArray, size: int, length: int) -> Examples:
        order = len(self.table)
        words = jr.randint(key, (size, length), 0, order)
        targets = running_products(words, self.table)
        return Examples(words, targets, jnp.ones((size, length), bool))

    def model(self, key: PRNGKeyArray) -> LoopModel:
        order = len(self.table)
        return _local_model(self.config, order, order, (-1, 0), key)


def running_products(
    words: Int[Array, "batch length"], table: Int[Array, "order order"]
) -> Int[Array, "batch length"]:
    """The products w₁, w₁w₂, …, element 0 being the identity."""
    from jax import lax

    def times(product: Array, element: Array) -> tuple[Array, Array]:
        product = table[product, element]
        return product, product

    _, products = lax.scan(times, jnp.zeros(len(words), words.dtype), words.T)
    return products.T


def _local_model(
    config: Config, tokens: int, classes: int, offsets: tuple[int, ...], key: Any
) -> LoopModel:
    key1, key2, key3 = jr.split(key, 3)
    return LoopModel(
        TokenEmbedding(tokens, config.width, key=key1),
        LocalCell(config.width, 2 * config.width, offsets, key=key2),
        eqx.nn.Linear(config.width, classes, key=key3),
    )
