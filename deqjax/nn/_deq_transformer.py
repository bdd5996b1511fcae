"""The cell of the DEQ-Transformer: one layer with relative attention."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .. import _tree
from .._tree import wide
from ._attention import confine
from ._checks import check_heads, check_positive, check_sizes
from ._dropout import VariationalDropout, split_key
from ._tokens import Features, over_tokens, project


class Context(NamedTuple):
    """What the cell takes beside the iterate.

    Attributes:
        injection: u, of the remembered tokens, then of these: to be added to the
            queries, keys and values, which it holds side by side.
        memory: z* of the remembered tokens.
        remembered: how many of the remembered tokens are there, the last ones.
        distances: sinusoids of the distances, the largest first.
    """

    injection: Float[Array, "batch keys inner"]
    memory: Float[Array, "batch memory dim"]
    remembered: Int[Array, ""]
    distances: Float[Array, "keys dim"]


class DEQTransformerBlock(eqx.Module):
    r"""One transformer layer with relative attention: the DEQ-Transformer's cell.

    $$ \begin{align*}
       (q, k, v)_j &= W_{qkv} z_j + u_j, \qquad
       a_{ij} \propto \exp \frac{(q_i + b_w)^\top k_j + (q_i + b_r)^\top W_r s_{i-j}}
                                {\sqrt{d_h}} \\
       h_i &= \mathrm{LN}(z_i + W_o \textstyle\sum_{j \le i} a_{ij} v_j + b_o), \qquad
       f(z)_i = \mathrm{LN}(h_i + W_2\, \mathrm{relu}(W_1 h_i + b_1) + b_2)
       \end{align*} $$

    | symbol | meaning |
    |---|---|
    | $u$ | injection of the input |
    | $s_n$ | sinusoids of the distance n |
    | $j$ | remembered tokens and these, up to i |
    | $d_h$ | width of a head |

    What belongs to remembered tokens, distances and normalised weights is computed once
    per solve. With `pre_norm`, norms come before the products: h = z + attention(LN z),
    f = n + MLP(n) with n = LN h.

    Args:
        dim: width d, even.
        num_heads: attention heads; divides d.
        hidden: width of the hidden layer.
        pre_norm: see above. Norms have no parameters.
        weight_norm: whether W_qkv, W_r, W_o, W_1 and W_2 are
            `equinox.nn.WeightNorm`s, by row.
        dropout: rate for the attention's output, the hidden layer and its output; one
            mask per sequence and solve, the same for all tokens.
        attention_dropout: rate for the weights a.
        scale: standard deviation of the initial parameters; biases of layers are 0.
        key: decides them.

    Raises:
        ValueError: if a size or a rate is not valid.

    References:
        S. Bai, J. Z. Kolter, V. Koltun (2019), Deep equilibrium models,
        doi:10.48550/arXiv.1909.01377.
        Z. Dai, Z. Yang, Y. Yang, J. Carbonell, Q. V. Le, R. Salakhutdinov (2019),
        Transformer-XL, doi:10.18653/v1/P19-1285.
    """

    qkv: Any
    distance: Any
    output: Any
    mlp1: Any
    mlp2: Any
    content_bias: Float[Array, "heads head_dim"]
    distance_bias: Float[Array, "heads head_dim"]
    norm: eqx.nn.LayerNorm
    drop: VariationalDropout
    drop_weights: VariationalDropout
    pre_norm: bool = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        pre_norm: bool = False,
        weight_norm: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        scale: float = 0.01,
        key: PRNGKeyArray,
    ):
        check_sizes(dim=dim, num_heads=num_heads, hidden=hidden)
        check_heads(dim, num_heads)
        check_positive("scale", scale)
        if dim % 2:
            raise ValueError(
                f"`dim` must be even, for sines and cosines of distances; got {dim}."
            )
        keys = jr.split(key, 7)

        def linear(inputs: int, outputs: int, use_bias: bool, key: Array) -> Any:
            layer = normal_linear(inputs, outputs, use_bias, scale, key)
            return eqx.nn.WeightNorm(layer) if weight_norm else layer

        self.qkv = linear(dim, 3 * dim, False, keys[0])
        self.distance = linear(dim, dim, False, keys[1])
        self.output = linear(dim, dim, True, keys[2])
        self.mlp1 = linear(dim, hidden, True, keys[3])
        self.mlp2 = linear(hidden, dim, True, keys[4])
        heads = (num_heads, dim // num_heads)
        self.content_bias = scale * jr.normal(keys[5], heads)
        self.distance_bias = scale * jr.normal(keys[6], heads)
        self.norm = eqx.nn.LayerNorm(dim, use_weight=False, use_bias=False)
        self.drop = VariationalDropout.tokens(dropout)
        self.drop_weights = VariationalDropout.dense(attention_dropout)
        self.pre_norm = pre_norm

    def initial_state(self, x: Context) -> Features:
        """Zeros."""
        length = x.injection.shape[1] - x.memory.shape[1]
        return _tree.zeros_for(x.injection, (length, x.memory.shape[2]))

    def __call__(
        self, z: Features, x: Context, *, key: PRNGKeyArray | None = None
    ) -> Features:
        """The layer at the new tokens.

        Args:
            z: their states, of shape (batch, length, dim).
            x: what the cell takes beside them.
            key: for dropout.
        """
        keys = split_key(key, 4)
        gathered = self._attend(z, x, keys[0])
        h = z + self.drop(project(self.output, gathered), key=keys[1])
        h = over_tokens(self.norm, h)
        if self.pre_norm:
            # The layer's residual runs from the normed state, as in the source.
            return h + self._mlp(h, keys[2:])
        return over_tokens(self.norm, h + self._mlp(h, keys[2:]))

    def _mlp(self, h: Features, keys: list) -> Features:
        hidden = jax.nn.relu(project(self.mlp1, h))
        hidden = self.drop(hidden, key=keys[0])
        return self.drop(project(self.mlp2, hidden), key=keys[1])

    def _attend(self, z: Features, x: Context, key: PRNGKeyArray | None) -> Features:
        memory, size = x.memory, x.memory.shape[1]
        if self.pre_norm:
            z, memory = over_tokens(self.norm, z), over_tokens(self.norm, memory)
        # Apart, so that what does not depend on z is computed once per solve.
        new = project(self.qkv, z) + x.injection[:, size:]
        old = project(self.qkv, memory) + x.injection[:, :size]
        q, k, v = (self._split(part) for part in jnp.split(new, 3, axis=-1))
        _, old_k, old_v = (self._split(part) for part in jnp.split(old, 3, axis=-1))
        k = jnp.concatenate([old_k, k], axis=1)
        v = jnp.concatenate([old_v, v], axis=1)
        k, v = confine(k, v)
        s = project(self.distance, x.distances)
        s = s.reshape(len(s), *self.content_bias.shape)

        dtype, by = wide(z.dtype), q.shape[-1] ** -0.5
        bias = self.content_bias.astype(z.dtype)
        content = jnp.einsum(
            "bihd,bjhd->bhij", (q + bias) * by, k, preferred_element_type=dtype
        )
        bias = self.distance_bias.astype(z.dtype)
        apart = jnp.einsum(
            "bihd,jhd->bhij", (q + bias) * by, s, preferred_element_type=dtype
        )
        scores = content + by_distance(apart)
        i = jnp.arange(z.shape[1])[:, None] + size
        j = jnp.arange(size + z.shape[1])
        seen = (j <= i) & (j >= size - x.remembered.astype(j.dtype))
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        weights = self.drop_weights(weights.astype(v.dtype), key=key)
        return jnp.einsum("bhij,bjhd->bihd", weights, v).reshape(z.shape)

    def _split(self, x: Features) -> Float[Array, "batch keys heads head_dim"]:
        return x.reshape(*x.shape[:2], *self.content_bias.shape)


def by_distance(
    scores: Float[Array, "... queries keys"],
) -> Float[Array, "... queries keys"]:
    """Scores by distance, the largest first, to scores by key.

    Of n queries, number i is n − 1 − i keys before the last one, so that its row moves
    to the left by as many. Adding a column and reading the rows one entry shorter does
    that (Dai et al. 2019, appendix B). What comes in from the row below lies after the
    query's own position.
    """
    *batch, n, m = scores.shape
    pad = [(0, 0)] * (len(batch) + 1)
    rows = jnp.pad(scores, [*pad, (1, 0)]).reshape(*batch, m + 1, n)
    return rows[..., 1:, :].reshape(scores.shape)


def sinusoids(length: int, dim: int, dtype: Any) -> Float[Array, "length dim"]:
    """Sines, then cosines, of the distances length − 1, …, 1, 0.

    Computed in at least float32, and in float64 for a float64 model.
    """
    inner = wide(dtype)
    distance = jnp.arange(length - 1, -1, -1, dtype=inner)
    frequency = 1e-4 ** (jnp.arange(0, dim, 2, dtype=inner) / dim)
    angle = distance[:, None] * frequency
    out = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return out.astype(dtype)


def normal_linear(
    inputs: int, outputs: int, use_bias: bool, scale: float, key: Array
) -> eqx.nn.Linear:
    """A linear layer with normally distributed weights and a bias of 0."""
    layer = eqx.nn.Linear(inputs, outputs, use_bias, key=key)
    weight = scale * jr.normal(key, layer.weight.shape)
    layer = eqx.tree_at(lambda p: p.weight, layer, weight)
    if not use_bias:
        return layer
    return eqx.tree_at(lambda p: p.bias, layer, jnp.zeros(outputs))
