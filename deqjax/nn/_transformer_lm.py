"""An explicit transformer, for comparison."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from ._attention import Attention, Heads, Past
from ._checks import check_heads, check_sizes, check_tokens
from ._generation import Cache, check_room
from ._tokens import Features, Tokens, embed_at, over_tokens, project


class TransformerBlock(eqx.Module):
    r"""A pre-norm transformer layer: attention, then an MLP with GELU, both residual.

    Args:
        dim: width d.
        num_heads: attention heads; divides d.
        hidden: width of the MLP's hidden layer.
        dtype: of the parameters.
        key: decides the initial parameters.

    Raises:
        ValueError: if a size is not valid.
    """

    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    attention: Attention
    mlp: eqx.nn.MLP

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        dtype: Any = jnp.float32,
        key: PRNGKeyArray,
    ):
        check_sizes(dim=dim, num_heads=num_heads, hidden=hidden)
        check_heads(dim, num_heads)
        key1, key2 = jr.split(key)
        self.norm1 = eqx.nn.LayerNorm(dim, dtype=dtype)
        self.norm2 = eqx.nn.LayerNorm(dim, dtype=dtype)
        self.attention = Attention(dim, num_heads, use_bias=True, dtype=dtype, key=key1)
        self.mlp = eqx.nn.MLP(dim, dim, hidden, 1, jax.nn.gelu, dtype=dtype, key=key2)

    def advance(
        self, h: Features, past: Past | None
    ) -> tuple[Features, tuple[Heads, Heads]]:
        """The layer for tokens that follow a past, and their keys and values.

        Args:
            h: what comes in, of shape (batch, length, dim).
            past: keys and values of the tokens before; None: there are none.
        """
        n = over_tokens(self.norm1, h)
        gathered, kept = self.attention(n, n, n, past)
        h = h + gathered
        return h + project(self.mlp, over_tokens(self.norm2, h)), kept


class TransformerLM(eqx.Module):
    r"""An explicit transformer language model of L layers, each with its own weights.

    Pre-norm layers, learned positions, a norm before an untied head without bias: what
    `RevDEQLM` is compared with, in the same interface.

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
        >>> lm = deqjax.nn.TransformerLM(16, 8, 2, 3, max_length=12, key=jr.key(0))
        >>> lm(jnp.zeros((2, 5), int)).shape
        (2, 5, 16)

    References:
        A. Radford, J. Wu, R. Child, D. Luan, D. Amodei, I. Sutskever (2019), Language
        models are unsupervised multitask learners.
    """

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

    @classmethod
    def wikitext103(cls, *, key: PRNGKeyArray, **kwargs: Any) -> "TransformerLM":
        """As many parameters as `RevDEQLM.wikitext103`, to 2 in 10,000: 95,925,120.

        The same width, heads, positions and vocabulary; its block of 18.3 million
        parameters as 3 layers with MLPs of 2432.

        Args:
            key: decides the initial parameters.
            **kwargs: what shall differ, by the names of the constructor.
        """
        config: dict[str, Any] = {
            "vocab_size": 50304,
            "dim": 768,
            "num_heads": 12,
            "num_layers": 3,
            "hidden": 2432,
            "max_length": 448,
        }
        return cls(**{**config, **kwargs}, key=key)

    @property
    def max_length(self) -> int:
        """The longest sequence that the model has positions for."""
        return self.positions.weight.shape[0]

    def __call__(self, tokens: Array) -> Float[Array, "batch length vocab"]:
        """The logits of the token that follows each position.

        Args:
            tokens: shape (batch, length), at most `max_length` long.
        """
        check_tokens("tokens", tokens, self.max_length)
        h = self._embed(tokens, jnp.arange(tokens.shape[1]))
        for layer in self.layers:
            h, _ = layer.advance(h, None)
        return self.logits(h)

    def logits(self, h: Features) -> Float[Array, "batch length vocab"]:
        """The logits that belong to the last layer's output."""
        return project(self.head, over_tokens(self.norm, h))

    def _embed(self, tokens: Tokens, positions: Array) -> Features:
        return embed_at(tokens, positions, table=self.tokens, places=self.positions)

    # Token by token

    def empty_cache(self, batch: int, max_length: int | None = None) -> Cache:
        """A cache for `extend`, of `max_length` tokens (None: all positions)."""
        heads = self.layers[0].attention.num_heads
        dim = self.tokens.weight.shape[1]
        length = self.max_length if max_length is None else max_length
        check_room(length, self.max_length)
        dtype = self.tokens.weight.dtype
        return Cache.empty(len(self.layers), batch, length, heads, dim // heads, dtype)

    def extend(self, tokens: Array, cache: Cache) -> tuple[Features, Cache]:
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
