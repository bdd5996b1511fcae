"""A layer of an explicit transformer."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from ._attention import Attention, Heads, Past
from ._checks import check_heads, check_sizes
from ._dropout import VariationalDropout, dropout_layer, split_key
from ._tokens import Features, over_tokens, project


class TransformerBlock(eqx.Module):
    r"""A pre-norm transformer layer: attention, then an MLP with GELU, both residual.

    Args:
        dim: width d.
        num_heads: attention heads; divides d.
        hidden: width of the MLP's hidden layer.
        dropout: rate, for the attention's output and the MLP's; each entry has a mask
            of its own.
        rotary: whether queries and keys are rotated by their positions.
        dtype: of the parameters.
        key: decides the initial parameters.

    Raises:
        ValueError: if a size or the rate is not valid.
        RuntimeError: at a call in training mode, if a key for dropout is missing.

    References:
        G. Hinton, N. Srivastava, A. Krizhevsky, I. Sutskever, R. Salakhutdinov (2012),
        Improving neural networks by preventing co-adaptation of feature detectors,
        doi:10.48550/arXiv.1207.0580.
        J. Su, M. Ahmed, Y. Lu, S. Pan, W. Bo, Y. Liu (2024), RoFormer: Enhanced
        transformer with rotary position embedding, doi:10.1016/j.neucom.2023.127063.
    """

    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    attention: Attention
    mlp: eqx.nn.MLP
    drop: Any

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        dropout: float = 0.0,
        rotary: bool = False,
        dtype: Any = jnp.float32,
        key: PRNGKeyArray,
    ):
        check_sizes(dim=dim, num_heads=num_heads, hidden=hidden)
        check_heads(dim, num_heads)
        key1, key2 = jr.split(key)
        self.norm1 = eqx.nn.LayerNorm(dim, dtype=dtype)
        self.norm2 = eqx.nn.LayerNorm(dim, dtype=dtype)
        self.attention = Attention(
            dim, num_heads, use_bias=True, rotary=rotary, dtype=dtype, key=key1
        )
        self.mlp = eqx.nn.MLP(dim, dim, hidden, 1, jax.nn.gelu, dtype=dtype, key=key2)
        self.drop = dropout_layer(dropout, VariationalDropout.dense)

    def advance(
        self, h: Features, past: Past | None, *, key: PRNGKeyArray | None = None
    ) -> tuple[Features, tuple[Heads, Heads]]:
        """The layer for tokens that follow a past, and their keys and values.

        Args:
            h: what comes in, of shape (batch, length, dim).
            past: keys and values of the tokens before; None: there are none.
            key: for dropout.
        """
        keys = split_key(key, 2)
        n = over_tokens(self.norm1, h)
        gathered, kept = self.attention(n, n, n, past)
        h = h + self.drop(gathered, key=keys[0])
        added = project(self.mlp, over_tokens(self.norm2, h))
        return h + self.drop(added, key=keys[1]), kept
