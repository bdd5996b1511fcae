"""Adaptive embedding and softmax: fewer dimensions for rarer tokens."""

import itertools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from .._tree import wide
from ._checks import check_list, check_positive, check_sizes
from ._tokens import embed, signed


class AdaptiveEmbedding(eqx.Module):
    r"""Embeddings of fewer dimensions for rarer tokens.

    The vocabulary, sorted by falling frequency, is cut into clusters; cluster i has a
    table of ⌊d / div_valⁱ⌋ columns and a projection to d:

    $$ \mathrm{embed}(w) = \sqrt{d}\; P_i\, E_i[w - \mathrm{cutoff}_i] $$

    **Cost:** one lookup and projection per cluster and token.

    Args:
        vocab_size: tokens in the vocabulary.
        dim: width d.
        cutoffs: where the clusters after the first begin; `()`: one cluster.
        div_val: by how much each cluster's width is smaller than the one before.
        scale: standard deviation of the initial parameters.
        key: decides them.

    Raises:
        ValueError: if the cutoffs do not grow, or a cluster has no dimension left.

    Example:
        >>> import deqjax, jax.numpy as jnp, jax.random as jr
        >>> table = deqjax.nn.AdaptiveEmbedding(
        ...     100, 16, cutoffs=(10, 40), key=jr.key(0))
        >>> table(jnp.array([[3, 20, 99]])).shape, [t.shape for t in table.tables]
        ((1, 3, 16), [(10, 16), (30, 4), (60, 1)])

    References:
        A. Baevski, M. Auli (2019), Adaptive input representations for neural language
        modeling, doi:10.48550/arXiv.1809.10853.
    """

    tables: tuple[Float[Array, "rows width"], ...]
    projections: tuple[Float[Array, "dim width"], ...]
    bounds: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        cutoffs: tuple[int, ...] = (),
        div_val: int = 4,
        scale: float = 0.01,
        key: PRNGKeyArray,
    ):
        check_sizes(vocab_size=vocab_size, dim=dim, div_val=div_val)
        check_positive("scale", scale)
        cutoffs = check_list("cutoffs", cutoffs, 1) if cutoffs else ()
        self.bounds = (0, *cutoffs, vocab_size)
        pairs = list(itertools.pairwise(self.bounds))
        if any(a >= b for a, b in pairs):
            raise ValueError(
                "`cutoffs` must grow, above 0 and below `vocab_size`; got "
                f"{tuple(cutoffs)} with vocab_size={vocab_size}."
            )
        widths = [dim // div_val**i for i in range(len(pairs))]
        if widths[-1] == 0:
            raise ValueError(
                f"`div_val` = {div_val} leaves the last of {len(pairs)} clusters no "
                f"dimension of `dim` = {dim}; lower it, or give fewer `cutoffs`."
            )
        keys = jr.split(key, 2 * len(pairs))
        self.tables = tuple(
            scale * jr.normal(k, (b - a, width))
            for k, (a, b), width in zip(keys[::2], pairs, widths, strict=True)
        )
        self.projections = tuple(
            scale * jr.normal(k, (dim, width))
            for k, width in zip(keys[1::2], widths, strict=True)
        )

    def __call__(self, tokens: Int[Array, "..."]) -> Float[Array, "... dim"]:
        """Embeddings, NaN for tokens that are not in the vocabulary.

        Args:
            tokens: of any shape.
        """
        tokens = signed(tokens)
        known = (tokens >= 0) & (tokens < self.bounds[-1])
        out = jnp.where(known, 0.0, jnp.nan)[..., None].astype(self.tables[0].dtype)
        for low, table, projection in zip(
            self.bounds[:-1], self.tables, self.projections, strict=True
        ):
            here = (tokens >= low) & (tokens < low + len(table))
            rows = embed(table, jnp.where(here, tokens - low, 0))
            out = out + jnp.where(here[..., None], rows, 0) @ projection.T
        return out * self.projections[0].shape[0] ** 0.5


class AdaptiveSoftmax(eqx.Module):
    r"""The softmax over clusters that belongs to an `AdaptiveEmbedding`.

    $$ \log p(w) = \log p(\mathrm{cluster}_i) + \log p(w \mid \mathrm{cluster}_i) $$

    where a first softmax decides among the tokens of the first cluster and the other
    clusters. The output tables are those of the embedding, and so are the projections,
    except the first, which is this module's own.

    **Order of the clusters:** row i of `clusters` belongs to cluster i + 1, in the
    order of the vocabulary. Transformer-XL's code, and with it the DEQ-Transformer's,
    has the rows in reverse; `with_source_clusters` takes them from there.

    **Cost** of `nll`: the first softmax for every token; a cluster's for the blocks of
    tokens, sorted by cluster, in which it occurs. **Memory:** the logits of one block
    and cluster, which are computed again backwards.

    Under `jax.vmap` every block pays for every cluster; give it a batch instead.

    Args:
        embedding: gives the sizes; pass it, or its successor, at each call.
        block: tokens per block.
        scale: standard deviation of the initial parameters.
        key: decides them.

    Raises:
        ValueError: if `block` is not a positive integer.

    References:
        E. Grave, A. Joulin, M. Cissé, D. Grangier, H. Jégou (2017), Efficient softmax
        approximation for GPUs, doi:10.48550/arXiv.1609.04309.
    """

    clusters: Float[Array, "clusters dim"]
    cluster_bias: Float[Array, " clusters"]
    biases: tuple[Float[Array, " rows"], ...]
    projection: Float[Array, "dim dim"]
    block: int = eqx.field(static=True)

    def __init__(
        self,
        embedding: AdaptiveEmbedding,
        *,
        block: int = 512,
        scale: float = 0.01,
        key: PRNGKeyArray,
    ):
        check_sizes(block=block)
        check_positive("scale", scale)
        key1, key2 = jr.split(key)
        tables, dim = embedding.tables, embedding.projections[0].shape[0]
        self.clusters = scale * jr.normal(key1, (len(tables) - 1, dim))
        self.cluster_bias = jnp.zeros(len(tables) - 1)
        self.biases = tuple(jnp.zeros(len(table)) for table in tables)
        self.projection = scale * jr.normal(key2, (dim, dim))
        self.block = block

    def with_source_clusters(
        self, weight: ArrayLike, bias: ArrayLike
    ) -> "AdaptiveSoftmax":
        """The module with cluster weights of Transformer-XL's or DEQ-Sequence's code.

        There row i belongs to the cluster that is i-th from the end: copied in order,
        they would give wrong probabilities, and no error.

        Args:
            weight: `cluster_weight` there, of shape (clusters, dim).
            bias: `cluster_bias` there, of shape (clusters,).

        Raises:
            ValueError: if a shape is not that of this module.
        """
        new = []
        for name, old, value in (
            ("weight", self.clusters, weight),
            ("bias", self.cluster_bias, bias),
        ):
            if jnp.shape(value) != old.shape:
                raise ValueError(
                    f"`{name}` must have the shape {old.shape} of this module's "
                    f"clusters; got {jnp.shape(value)}."
                )
            new.append(jnp.asarray(value, old.dtype)[::-1])
        return eqx.tree_at(lambda s: (s.clusters, s.cluster_bias), self, tuple(new))

    def nll(
        self,
        hidden: Float[Array, "batch length dim"],
        targets: Int[Array, "..."],
        embedding: AdaptiveEmbedding,
    ) -> Float[Array, "batch length"]:
        """−log p of each target, in at least float32; NaN for those out of range.

        Args:
            hidden: what the softmax is of.
            targets: a token for each vector.
            embedding: the one that this module was made for, or its successor.

        Raises:
            ValueError: if there is not one target for each vector.
        """
        if targets.shape != hidden.shape[:-1]:
            raise ValueError(
                "`targets` must be one for each state, of shape "
                f"{hidden.shape[:-1]}; got {targets.shape}."
            )
        flat = hidden.reshape(-1, hidden.shape[-1])
        wanted = signed(targets).reshape(-1)
        bounds = jnp.asarray(embedding.bounds, wanted.dtype)
        cluster = jnp.sum(wanted[:, None] >= bounds[1:-1], axis=-1)
        first = len(embedding.tables[0])
        # In the first softmax, cluster i > 0 follows the first cluster's tokens.
        entry = jnp.where(cluster == 0, wanted, first - 1 + cluster)
        out = jnp.zeros(len(wanted), wide(hidden.dtype))

        order = jnp.argsort(cluster)
        size = min(self.block, len(wanted))
        blocks = lambda x: _blocks(x, size)
        parts = blocks(flat[order]), blocks(entry[order])

        @jax.checkpoint
        def head(hidden: Array, entry: Array) -> Array:
            return _pick(self._head(hidden, embedding), entry)

        out = lax.map(lambda part: head(*part), parts).reshape(-1)
        for i in range(1, len(embedding.tables)):
            inside = blocks((wanted - bounds[i])[order])
            mine = blocks((cluster == i)[order])
            tail = self._tail_of_block(i, embedding)
            part = lax.map(tail, (parts[0], inside, mine))
            out = out + part.reshape(-1)
        out = out[: len(wanted)][jnp.argsort(order)]
        known = (wanted >= 0) & (wanted < embedding.bounds[-1])
        return jnp.where(known, -out, jnp.nan).reshape(targets.shape)

    def log_probs(
        self, hidden: Float[Array, "... dim"], embedding: AdaptiveEmbedding
    ) -> Float[Array, "... vocab"]:
        """log p of the whole vocabulary.

        Args:
            hidden: what the softmax is of.
            embedding: see `nll`.
        """
        head = self._head(hidden, embedding)
        first = len(embedding.tables[0])
        parts = [head[..., :first]]
        for i in range(1, len(embedding.tables)):
            tail = self._tail(i, hidden, embedding)
            parts.append(tail + head[..., first + i - 1, None])
        return jnp.concatenate(parts, axis=-1)

    def _head(self, hidden: Array, embedding: AdaptiveEmbedding) -> Array:
        table = jnp.concatenate([embedding.tables[0], self.clusters])
        bias = jnp.concatenate([self.biases[0], self.cluster_bias])
        return _log_softmax(hidden, self.projection, table, bias)

    def _tail(self, i: int, hidden: Array, embedding: AdaptiveEmbedding) -> Array:
        table, projection = embedding.tables[i], embedding.projections[i]
        return _log_softmax(hidden, projection, table, self.biases[i])

    def _tail_of_block(self, i: int, embedding: AdaptiveEmbedding) -> Callable:
        """log p within cluster i of a block's targets in it, 0 for the others."""

        @jax.checkpoint
        def present(hidden: Array, inside: Array, mine: Array) -> Array:
            scores = self._tail(i, hidden, embedding)
            return jnp.where(mine, _pick(scores, jnp.where(mine, inside, 0)), 0)

        def absent(hidden: Array, inside: Array, mine: Array) -> Array:
            return jnp.zeros(mine.shape, wide(hidden.dtype))

        return lambda part: lax.cond(jnp.any(part[-1]), present, absent, *part)


def _log_softmax(hidden: Array, projection: Array, table: Array, bias: Array) -> Array:
    dtype = wide(hidden.dtype)
    small = hidden.astype(projection.dtype) @ projection
    logits = jnp.einsum("...e,ve->...v", small, table, preferred_element_type=dtype)
    return jax.nn.log_softmax(logits.astype(dtype) + bias.astype(dtype))


def _pick(scores: Array, index: Array) -> Array:
    return jnp.take_along_axis(scores, index[:, None], axis=1)[:, 0]


def _blocks(x: Array, size: int) -> Array:
    """Rows in blocks, the last one filled up with zeros."""
    short = -len(x) % size
    x = jnp.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])
