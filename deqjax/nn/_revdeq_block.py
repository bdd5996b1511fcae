"""The cell of the reversible DEQ language model."""

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


class RevDEQBlock(eqx.Module):
    r"""The cell of the RevDEQ language model.

    $$ h = z + \mathrm{MHA}(Qn, Kn, Vn), \quad n = \mathrm{LN}_1(z + x), \qquad
       f(z, x) = h + \mathrm{MLP}(\mathrm{LN}_2(h)) $$

    Q, K and V are linear maps before the attention's own projections; the MLP has two
    hidden layers with GELU. Attention is causal.

    As published, f adds to z, so that its Jacobian is I plus that of what it adds: few
    solves with random weights converge. With `residual="input"` f adds to x instead
    (h = x + …), and they do for weights of moderate size; this is not in the source.

    With `dropout`, what attention and MLP add is dropped before it is added, with masks
    that the key of the solve decides: f is the same map at every evaluation, so that
    its fixed point is defined and a reversible gradient stays exact.

    Args:
        dim: width d.
        num_heads: attention heads; divides d.
        hidden: width of the MLP's hidden layers.
        residual: what f adds to, `"state"` or `"input"`.
        dropout: rate, for the attention's output and the MLP's; one mask per sequence
            and solve, the same for all tokens, as of `VariationalDropout.tokens`.
        rotary: whether queries and keys are rotated by their positions.
        dtype: of the parameters.
        key: decides the initial parameters.

    Raises:
        ValueError: if a size or the rate is not valid.
        RuntimeError: at a call in training mode, if a key for dropout is missing.

    References:
        S. McCallum, K. Arora, J. Foster (2025), Reversible deep equilibrium models,
        doi:10.48550/arXiv.2509.12917.
        Y. Gal, Z. Ghahramani (2016), A theoretically grounded application of dropout
        in recurrent neural networks, doi:10.48550/arXiv.1512.05287.
        J. Su, M. Ahmed, Y. Lu, S. Pan, W. Bo, Y. Liu (2024), RoFormer: Enhanced
        transformer with rotary position embedding, doi:10.1016/j.neucom.2023.127063.
    """

    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    attention: Attention
    mlp: eqx.nn.MLP
    drop: Any
    residual: str = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        residual: str = "state",
        dropout: float = 0.0,
        rotary: bool = False,
        dtype: Any = jnp.float32,
        key: PRNGKeyArray,
    ):
        check_sizes(dim=dim, num_heads=num_heads, hidden=hidden)
        check_heads(dim, num_heads)
        if residual not in ("state", "input"):
            raise ValueError(
                f'`residual` must be "state" or "input"; got {residual!r}.'
            )
        self.residual = residual
        keys = jr.split(key, 5)
        self.norm1 = eqx.nn.LayerNorm(dim, dtype=dtype)
        self.norm2 = eqx.nn.LayerNorm(dim, dtype=dtype)
        self.query, self.key, self.value = (
            eqx.nn.Linear(dim, dim, dtype=dtype, key=k) for k in keys[:3]
        )
        self.attention = Attention(
            dim, num_heads, use_bias=False, rotary=rotary, dtype=dtype, key=keys[3]
        )
        self.mlp = eqx.nn.MLP(
            dim, dim, hidden, 2, jax.nn.gelu, dtype=dtype, key=keys[4]
        )
        self.drop = dropout_layer(dropout, VariationalDropout.tokens)

    def __call__(
        self, z: Features, x: Features, *, key: PRNGKeyArray | None = None
    ) -> Features:
        """f(z, x).

        Args:
            z: the state, of shape (batch, length, dim).
            x: what is injected, of the same shape.
            key: for dropout.
        """
        return self.advance(z, x, None, key=key)[0]

    def advance(
        self,
        z: Features,
        x: Features,
        past: Past | None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Features, tuple[Heads, Heads]]:
        """f for tokens that follow a past, and their keys and values at z.

        Args:
            z: their states.
            x: what is injected.
            past: keys and values of the tokens before; None: there are none.
            key: for dropout.
        """
        keys = split_key(key, 2)
        n = over_tokens(self.norm1, z + x)
        q, k, v = (project(p, n) for p in (self.query, self.key, self.value))
        gathered, kept = self.attention(q, k, v, past)
        h = z if self.residual == "state" else x
        h = h + self.drop(gathered, key=keys[0])
        added = project(self.mlp, over_tokens(self.norm2, h))
        return h + self.drop(added, key=keys[1]), kept
