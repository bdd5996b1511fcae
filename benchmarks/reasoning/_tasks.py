"""The tasks: what is asked, how examples are made, and which model answers."""

import abc
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from ._cells import GatedCell, LoopModel, OrthogonalShift, TokenEmbedding
from ._config import Config
from ._groups import group_table
from ._sudoku import draw_puzzles, split_grids


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
    """A source of examples, with the model that learns from them.

    Attributes:
        config: the choices of the run.
        lengths: of the test sets, the one that is trained on first.
    """

    def __init__(self, config: Config):
        self.config = config
        self.lengths = (config.length, *config.test_lengths)

    @abc.abstractmethod
    def draw(self, seed: int, number: int, size: int, length: int) -> Examples:
        """Examples as a function of seed, number and shape alone."""

    @abc.abstractmethod
    def model(self, key: PRNGKeyArray) -> LoopModel:
        """The untrained model."""

    def test(self, length: int) -> Examples:
        """A test set; its draws are none of those of training."""
        return self.draw(_TEST_SEED, 0, self.config.test_size, length)

    def test_steps(self, length: int) -> int:
        """Steps at test time: as many per position as in training, times a factor."""
        share = self.config.test_depth * length / self.config.length
        return math.ceil(self.config.steps * share)


_TEST_SEED = 2**31 - 1


class Batches:
    """The batches of a training by the number of their update."""

    def __init__(self, task: Task, seed: int):
        self._task, self._seed = task, seed

    def __getitem__(self, index: int) -> Examples:
        config = self._task.config
        return self._task.draw(self._seed, index, config.batch_size, config.length)


def make_task(config: Config) -> Task:
    """The task that was chosen."""
    kinds = {"chains": Chains, "prefix": Prefix, "groups": Groups, "sudoku": Sudoku}
    return kinds[config.task](config)


class _Sequences(Task):
    """Sequences of any length, drawn afresh for every update."""

    def __init__(self, config: Config):
        super().__init__(config)
        self._drawn = jax.jit(self.sequences, static_argnums=(1, 2))

    @abc.abstractmethod
    def sequences(
        self, key: PRNGKeyArray, size: int, length: int
    ) -> tuple[Array, Array]:
        """Inputs, and the answer at every position."""

    def draw(self, seed: int, number: int, size: int, length: int) -> Examples:
        key = jr.fold_in(jr.fold_in(jr.key(seed), 1), number)
        inputs, targets = self._drawn(key, size, length)
        asked = jnp.ones((size, length), bool)
        if self.config.ask == "last":
            asked = jnp.zeros((size, length), bool).at[:, -1].set(True)
        return Examples(inputs, targets, asked)


class Chains(_Sequences):
    """A chain of nodes, in which only the first was told the label.

    The first node has 32 features: one is the label, 1 or −1, the others are noise.
    Every node hears its left neighbour alone.
    """

    features = 32

    def sequences(
        self, key: PRNGKeyArray, size: int, length: int
    ) -> tuple[Array, Array]:
        key1, key2 = jr.split(key)
        label = jr.bernoulli(key1, shape=(size,))
        noise = jr.normal(key2, (size, self.features))
        first = noise.at[:, 0].set(jnp.where(label, 1.0, -1.0))
        inputs = jnp.zeros((size, length, self.features)).at[:, 0].set(first)
        return inputs, jnp.broadcast_to(label[:, None], (size, length)).astype(int)

    def model(self, key: PRNGKeyArray) -> LoopModel:
        key1, key2, key3 = jr.split(key, 3)
        width = self.config.width
        return LoopModel(
            eqx.nn.Linear(self.features, width, use_bias=False, key=key1),
            OrthogonalShift(width, key=key2),
            eqx.nn.Linear(width, 2, key=key3),
        )


class Prefix(_Sequences):
    """Strings of bits; a position is asked for the parity of the bits up to it."""

    def sequences(
        self, key: PRNGKeyArray, size: int, length: int
    ) -> tuple[Array, Array]:
        bits = jr.bernoulli(key, shape=(size, length)).astype(jnp.int32)
        return bits, jnp.cumsum(bits, axis=1) % 2

    def model(self, key: PRNGKeyArray) -> LoopModel:
        return _token_model(self.config, 2, 2, "left", key)


class Groups(_Sequences):
    """Words in a group; a position is asked for the product of those up to it."""

    def __init__(self, config: Config):
        super().__init__(config)
        self._table = group_table(config.group)

    def sequences(
        self, key: PRNGKeyArray, size: int, length: int
    ) -> tuple[Array, Array]:
        words = jr.randint(key, (size, length), 0, len(self._table))
        return words, running_products(words, self._table)

    def model(self, key: PRNGKeyArray) -> LoopModel:
        order = len(self._table)
        return _token_model(self.config, order, order, "left", key)


class Sudoku(Task):
    """Sudokus of four by four; every empty cell is asked for its digit.

    A fifth of the 288 solved grids is held out: test puzzles are made of those alone.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self._train, self._test = split_grids()

    def draw(self, seed: int, number: int, size: int, length: int) -> Examples:
        grids = self._test if seed == _TEST_SEED else self._train
        rng = np.random.default_rng([seed, number])
        puzzles, solutions = draw_puzzles(grids, size, rng)
        return Examples(
            jnp.asarray(puzzles), jnp.asarray(solutions - 1), jnp.asarray(puzzles == 0)
        )

    def model(self, key: PRNGKeyArray) -> LoopModel:
        return _token_model(self.config, 5, 4, "units", key)


def running_products(
    words: Int[Array, "batch length"], table: np.ndarray
) -> Int[Array, "batch length"]:
    """The products w₁, w₁w₂, …, element 0 being the identity."""

    def times(product: Array, element: Array) -> tuple[Array, Array]:
        product = jnp.asarray(table)[product, element]
        return product, product

    _, products = lax.scan(times, jnp.zeros(len(words), words.dtype), words.T)
    return products.T


def _token_model(
    config: Config, tokens: int, classes: int, look: str, key: Any
) -> LoopModel:
    key1, key2, key3 = jr.split(key, 3)
    return LoopModel(
        TokenEmbedding(tokens, config.width, key=key1),
        GatedCell(config.width, config.width, look, key=key2),
        eqx.nn.Linear(config.width, classes, key=key3),
    )
