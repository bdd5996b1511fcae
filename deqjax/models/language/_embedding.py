"""What comes before and after the layers of a language model: embeddings and head."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ...nn._tokens import Features, Tokens, embed, project


class Tables(NamedTuple):
    """Embeddings of tokens and positions, and the head.

    No `positions`: layers have rotary ones. No `head`: it is tied.
    """

    tokens: eqx.nn.Embedding
    positions: eqx.nn.Embedding | None
    head: eqx.nn.Linear | None


def make_tables(
    vocab_size: int,
    dim: int,
    max_length: int,
    *,
    positions: str,
    tied: bool,
    dtype: Any,
    keys: tuple[PRNGKeyArray, PRNGKeyArray, PRNGKeyArray],
) -> Tables:
    """The tables of a model, with initial parameters from the three keys.

    A tied table starts √`dim` times smaller and `embed_tokens` multiplies its rows by
    √`dim`: what the layers are given is as large as without tying, and so are the
    logits.

    Raises:
        ValueError: if `positions` is not valid.
    """
    if positions not in ("learned", "rotary"):
        raise ValueError(
            f'`positions` must be "learned" or "rotary"; got {positions!r}. The former '
            "are added to the embeddings of tokens, the latter have no parameters."
        )
    tokens = eqx.nn.Embedding(vocab_size, dim, dtype=dtype, key=keys[0])
    places, head = None, None
    if positions == "learned":
        places = eqx.nn.Embedding(max_length, dim, dtype=dtype, key=keys[1])
    if tied:
        tokens = eqx.nn.Embedding(weight=tokens.weight / math.sqrt(dim))
    else:
        head = eqx.nn.Linear(dim, vocab_size, False, dtype, key=keys[2])
    return Tables(tokens, places, head)


def embed_tokens(
    tables: Tables, tokens: Tokens, positions: Int[Array, " length"]
) -> Features:
    """The embeddings of tokens, and of their positions if those are learned, added."""
    x = embed(tables.tokens.weight, tokens)
    if tables.head is None:
        x = x * math.sqrt(x.shape[-1])
    if tables.positions is None:
        return x
    return x + embed(tables.positions.weight, positions)


def unembed(
    tables: Tables, z: Features, dtype: Any
) -> Float[Array, "batch length vocab"]:
    """The logits.

    Args:
        tables: of the model.
        z: what the layers return.
        dtype: in which a tied head is multiplied, that of the layers' products; another
            head has one of its own.
    """
    if tables.head is not None:
        return project(tables.head, z)
    table = tables.tokens.weight.astype(dtype)
    return jnp.einsum("...d,vd->...v", z.astype(dtype), table).astype(z.dtype)
