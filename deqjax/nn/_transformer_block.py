"""A layer of an explicit transformer."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from ._attention import Attention, Heads, Past
from ._checks import check_heads, check_sizes
from ._tokens import Features, over_tokens, project


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
