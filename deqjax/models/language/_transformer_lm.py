"""An explicit transformer, for comparison."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray

from ..._types import Options
from ...nn._checks import check_sizes, check_tokens
from ...nn._dropout import VariationalDropout, dropout_layer, split_key
from ...nn._tokens import Features, over_tokens
from ...nn._transformer_block import TransformerBlock
from ._embedding import Tables, embed_tokens, make_tables, unembed
from ._generation import KVCache, check_room
from ._interface import AbstractLanguageModel


class TransformerLM(AbstractLanguageModel):
    r"""An explicit transformer language model of L layers, each with its own weights.

    Pre-norm layers, learned positions, a norm before an untied head without bias: what
    `RevDEQLM` is compared with, in the same interface. Options: `dropout`, rotary
    positions in place of the learned ones, and a tied head.

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
        dropout: rate, of the embeddings and of what attention and MLPs add; each entry
            has a mask of its own. It takes a `key` at the call;
            `equinox.nn.inference_mode` switches it off, and `extend` has none.
        positions: `"learned"`, embeddings that are added to those of the tokens, or
            `"rotary"`, which rotate queries and keys and have no parameters.
        tied: whether the embedding of tokens is the head as well, one array that is
            counted once. It starts with standard deviation `dim`^(−1/2), and embeddings
            are its rows times √`dim`, as in Vaswani et al. (2017).
        dtype: of the parameters.
        key: decides the initial parameters.

    Raises:
        ValueError: if an argument is not valid.
        RuntimeError: at a call in training mode, if a key for dropout is missing.

    Example:
        >>> import deqjax, jax.numpy as jnp, jax.random as jr
        >>> lm = deqjax.models.TransformerLM(16, 8, 2, 3, max_length=12, key=jr.key(0))
        >>> lm(jnp.zeros((2, 5), int)).shape
        (2, 5, 16)

    References:
        A. Radford, J. Wu, R. Child, D. Luan, D. Amodei, I. Sutskever (2019), Language
        models are unsupervised multitask learners.
        G. Hinton, N. Srivastava, A. Krizhevsky, I. Sutskever, R. Salakhutdinov (2012),
        Improving neural networks by preventing co-adaptation of feature detectors,
        doi:10.48550/arXiv.1207.0580.
        J. Su, M. Ahmed, Y. Lu, S. Pan, W. Bo, Y. Liu (2024), RoFormer: Enhanced
        transformer with rotary position embedding, doi:10.1016/j.neucom.2023.127063.
        O. Press, L. Wolf (2017), Using the output embedding to improve language models,
        doi:10.18653/v1/E17-2025.
        A. Vaswani, N. Shazeer, N. Parmar, J. Uszkoreit, L. Jones, A. N. Gomez,
        Ł. Kaiser, I. Polosukhin (2017), Attention is all you need,
        doi:10.48550/arXiv.1706.03762.
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
    positions: eqx.nn.Embedding | None
    layers: tuple[TransformerBlock, ...]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear | None
    drop: Any
    max_length: int = eqx.field(static=True)

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_heads: int,
        num_layers: int,
        *,
        max_length: int,
        hidden: int | None = None,
        dropout: float = 0.0,
        positions: str = "learned",
        tied: bool = False,
        dtype: Any = jnp.float32,
        key: PRNGKeyArray,
    ):
        check_sizes(vocab_size=vocab_size, max_length=max_length, num_layers=num_layers)
        keys = jr.split(key, num_layers + 3)
        hidden = 4 * dim if hidden is None else hidden
        self.layers = tuple(
            TransformerBlock(
                dim,
                num_heads,
                hidden,
                dropout=dropout,
                rotary=positions == "rotary",
                dtype=dtype,
                key=k,
            )
            for k in keys[3:]
        )
        self.tokens, self.positions, self.head = make_tables(
            vocab_size,
            dim,
            max_length,
            positions=positions,
            tied=tied,
            dtype=dtype,
            keys=(keys[0], keys[1], keys[2]),
        )
        self.norm = eqx.nn.LayerNorm(dim, dtype=dtype)
        self.drop = dropout_layer(dropout, VariationalDropout.dense)
        self.max_length = max_length

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
        first, *keys = split_key(key, len(self.layers) + 1)
        h = embed_tokens(self._tables, inputs, jnp.arange(inputs.shape[1]))
        h = self.drop(h, key=first)
        for layer, own in zip(self.layers, keys, strict=True):
            h, _ = layer.advance(h, None, key=own)
        depth = jnp.array(len(self.layers), jnp.int32)
        stats = {"num_evals": depth, "num_steps": depth}
        return optx.Solution(h, optx.RESULTS.successful, None, stats, None), state

    def _logits(
        self, z: Features, state: Any, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "batch length vocab"], Any]:
        dtype = self.layers[0].attention.output.weight.dtype
        return unembed(self._tables, over_tokens(self.norm, z), dtype), state

    @property
    def _tables(self) -> Tables:
        return Tables(self.tokens, self.positions, self.head)

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
        """The last layer's output at tokens that follow the cache's, without dropout.

        Args:
            tokens: any number of them, one at least.
            cache: from `empty_cache`, or from here.

        Returns:
            The output (NaN for tokens that do not fit in the cache), and the cache
            with the new tokens.
        """
        check_tokens("tokens", tokens)
        cache.check(len(self.layers), tokens)
        h = embed_tokens(self._tables, tokens, cache.positions(tokens))
        kept = []
        for i, layer in enumerate(eqx.nn.inference_mode(self.layers)):
            h, new = layer.advance(h, cache.past(i))
            kept.append(new)
        keys, values = (jnp.stack(parts) for parts in zip(*kept, strict=True))
        cache = cache.add(keys, values)
        return cache.guard(h), cache
