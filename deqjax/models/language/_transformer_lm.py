"""An explicit transformer, for comparison."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray

from ..._types import Options
from ...nn._checks import check_sizes, check_tokens
from ...nn._tokens import Features, Tokens, embed_at, over_tokens, project
from ...nn._transformer_block import TransformerBlock
from ._generation import KVCache, check_room
from ._interface import AbstractLanguageModel


class TransformerLM(AbstractLanguageModel):
    r"""An explicit transformer language model of L layers, each with its own weights.

    Pre-norm layers, learned positions, a norm before an untied head without bias: what
    `RevDEQLM` is compared with, in the same interface.

    `solve` returns the last layer's output as the `value` of a solution, whose
    statistics have L evaluations and no residual.

    **Configuration:** `wikitext103`, not published: 95,925,120 parameters, as many as
    `RevDEQLM`'s to 2 in 10,000. The same width, heads, positions and vocabulary; its
    block of 18.3 million parameters as 3 layers with MLPs of 2432.

    **Cost:** L layers and the head.

    Args:
        vocab_size: tokens in the vocabulary.
        dim: width.
        num_heads: attention heads; divides `dim`.
        num_layers: L.
        hidden: width of the MLPs' hidden layer; None: 4 × `dim`.
        max_length: positions.
        dtype: of the parameters.
        key: decides the initial parameters.

    Raises:
        ValueError: if a size is not valid.

    Example:
        >>> import deqjax, jax.numpy as jnp, jax.random as jr
        >>> lm = deqjax.models.TransformerLM(16, 8, 2, 3, max_length=12, key=jr.key(0))
        >>> lm(jnp.zeros((2, 5), int)).shape
        (2, 5, 16)

    References:
        A. Radford, J. Wu, R. Child, D. Luan, D. Amodei, I. Sutskever (2019), Language
        models are unsupervised multitask learners.
    """

    configurations: ClassVar = {
        "wikitext103": {
            "vocab_size": 50304,
            "dim": 768,
            "num_heads": 12,
            "num_layers": 3,
            "hidden": 2432,
            "max_length": 448,
        },
    }

    tokens: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    layers: tuple[TransformerBlock, ...]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_heads: int,
        num_layers: int,
        *,
        max_length: int,
        hidden: int | None = None,
        dtype: Any = jnp.float32,
        key: PRNGKeyArray,
    ):
        check_sizes(vocab_size=vocab_size, max_length=max_length, num_layers=num_layers)
        keys = jr.split(key, num_layers + 3)
        hidden = 4 * dim if hidden is None else hidden
        self.layers = tuple(
            TransformerBlock(dim, num_heads, hidden, dtype=dtype, key=k)
            for k in keys[3:]
        )
        self.tokens = eqx.nn.Embedding(vocab_size, dim, dtype=dtype, key=keys[0])
        self.positions = eqx.nn.Embedding(max_length, dim, dtype=dtype, key=keys[1])
        self.norm = eqx.nn.LayerNorm(dim, dtype=dtype)
        self.head = eqx.nn.Linear(dim, vocab_size, False, dtype, key=keys[2])

    @property
    def max_length(self) -> int:
        """The longest sequence that the model has positions for."""
        return self.positions.weight.shape[0]

    def _solve(
        self,
        inputs: Any,
        state: Any,
        *,
        z0: Any,
        key: PRNGKeyArray | None,
        max_steps: int | None,
        throw: bool,
        options: Options | None,
    ) -> tuple[optx.Solution, Any]:
        given = {"z0": z0, "max_steps": max_steps, "options": options}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"`{name}` must be None: an explicit model solves nothing; got "
                    f"{value!r}."
                )
        check_tokens("tokens", inputs, self.max_length)
        h = self._embed(inputs, jnp.arange(inputs.shape[1]))
        for layer in self.layers:
            h, _ = layer.advance(h, None)
        depth = jnp.array(len(self.layers), jnp.int32)
        stats = {"num_evals": depth, "num_steps": depth}
        return optx.Solution(h, optx.RESULTS.successful, None, stats, None), state

    def _logits(
        self, z: Features, state: Any, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "batch length vocab"], Any]:
        return project(self.head, over_tokens(self.norm, z)), state

    def _embed(self, tokens: Tokens, positions: Array) -> Features:
        return embed_at(tokens, positions, table=self.tokens, places=self.positions)

    # Token by token

    def empty_cache(self, batch: int, max_length: int | None = None) -> KVCache:
        """A cache for `extend`, of `max_length` tokens (None: all positions)."""
        heads = self.layers[0].attention.num_heads
        dim = self.tokens.weight.shape[1]
        length = self.max_length if max_length is None else max_length
        check_room(length, self.max_length)
        dtype = self.tokens.weight.dtype
        return KVCache.empty(
            len(self.layers), batch, length, heads, dim // heads, dtype
        )

    def extend(self, tokens: Array, cache: KVCache) -> tuple[Features, KVCache]:
        """The last layer's output at tokens that follow those of the cache.

        Args:
            tokens: any number of them, one at least.
            cache: from `empty_cache`, or from here.

        Returns:
            The output (NaN for tokens that do not fit in the cache), and the cache
            with the new tokens.
        """
        check_tokens("tokens", tokens)
        cache.check(len(self.layers), tokens)
        h = self._embed(tokens, cache.positions(tokens))
        kept = []
        for i, layer in enumerate(self.layers):
            h, new = layer.advance(h, cache.past(i))
            kept.append(new)
        keys, values = (jnp.stack(parts) for parts in zip(*kept, strict=True))
        cache = cache.add(keys, values)
        return cache.guard(h), cache
