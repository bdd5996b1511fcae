"""The reversible DEQ language model."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray

from ..._fixed_point import fixed_point
from ..._types import Options
from ...nn._attention import Past
from ...nn._checks import batched_solver, check_sizes, check_tokens
from ...nn._deq import DEQ, unless_lost
from ...nn._dropout import VariationalDropout, dropout_layer, split_key
from ...nn._revdeq_block import RevDEQBlock
from ...nn._tokens import Features
from ...solvers import Reversible
from ...solvers._optimistix import AnySolver
from ._embedding import Tables, embed_tokens, make_tables, unembed
from ._generation import KVCache, check_room, static_depth, static_solve
from ._interface import AbstractLanguageModel


class RevDEQLM(AbstractLanguageModel):
    r"""The RevDEQ language model: one transformer block at its fixed point.

    $$ x_t = E_{w_t} + P_t, \qquad z^* = f(z^*, x), \qquad
       \mathrm{logits}_t = H z^*_t $$

    with `deqjax.nn.RevDEQBlock` for f, token and position embeddings E and P, and an
    untied head H without bias. Each sequence of a batch is a problem of its own.

    Options that are not in the source: with `dropout`, x and what attention and MLP add
    in f are dropped, with one mask per solve; with `positions="rotary"` there is no P,
    and queries and keys are rotated instead; with `tied=True`, H is E.

    **Cost:** 2 evaluations of the block per step (8 by default), and the head.
    **Memory:** that of the adjoint; see `deqjax.ReversibleAdjoint`.

    **Published:** `wikitext103`, 95,907,840 parameters, the block 18,296,832: d = 768,
    12 heads, MLP of 3072, 448 positions, GPT-2's vocabulary padded to 50,304 tokens,
    4 steps with β = 1/2. Trained with AdamW at 3e-4, halved on plateaus, batches of 32
    sequences, 10 epochs, without dropout.

    **Differences from the source:** states are float32, not float64, and are undone
    exactly all the same; there is no tolerance by default, since 4 steps with β = 1/2
    leave 1/16 of the start even of a constant map, so that the authors' tolerance of
    10⁻³ is never reached; the dtype of the parameters may be chosen; their layer norm
    that nothing uses (1,536 parameters), and their mask, which they hold as an array of
    floats, are left out.

    Args:
        vocab_size: tokens in the vocabulary.
        dim: width d.
        num_heads: attention heads; divides `dim`.
        hidden: width of the MLP's hidden layers; None: 4 d.
        max_length: positions.
        residual: see `RevDEQBlock`; `"input"` for solves to a tolerance.
        dropout: rate, of x and in f; see `RevDEQBlock`. It takes a `key` at the call;
            `equinox.nn.inference_mode` switches it off, and `extend` has none.
        positions: `"learned"`, embeddings that are added to those of the tokens, or
            `"rotary"`, which rotate queries and keys and have no parameters.
        tied: whether the embedding of tokens is the head as well, one array that is
            counted once. It starts with standard deviation d^(−1/2), and embeddings are
            its rows times √d, as in Vaswani et al. (2017).
        solver: see `deqjax.fixed_point`; one of deqjax needs `batch_ndim=1`. None:
            `deqjax.Reversible(None, None, beta=0.5, batch_ndim=1)`.
        adjoint: as of `deqjax.fixed_point`.
        max_steps: steps of the solver.
        dtype: of the parameters, and of the states.
        key: decides the initial parameters.

    Raises:
        ValueError: if an argument is not valid.
        RuntimeError: at a call in training mode, if a key for dropout is missing.

    Example:
        >>> import deqjax, jax.numpy as jnp, jax.random as jr
        >>> lm = deqjax.models.RevDEQLM(16, 8, 2, max_length=12, key=jr.key(0))
        >>> lm(jnp.zeros((2, 5), int)).shape
        (2, 5, 16)

    References:
        S. McCallum, K. Arora, J. Foster (2025), Reversible deep equilibrium models,
        doi:10.48550/arXiv.2509.12917.
        Y. Gal, Z. Ghahramani (2016), A theoretically grounded application of dropout
        in recurrent neural networks, doi:10.48550/arXiv.1512.05287.
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
            "hidden": 3072,
            "max_length": 448,
        },
    }

    tokens: eqx.nn.Embedding
    positions: eqx.nn.Embedding | None
    deq: DEQ
    head: eqx.nn.Linear | None
    drop: Any
    max_length: int = eqx.field(static=True)

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_heads: int,
        *,
        max_length: int,
        hidden: int | None = None,
        residual: str = "state",
        dropout: float = 0.0,
        positions: str = "learned",
        tied: bool = False,
        solver: AnySolver | None = None,
        adjoint: optx.AbstractAdjoint | None = None,
        max_steps: int = 4,
        dtype: Any = jnp.float32,
        key: PRNGKeyArray,
    ):
        check_sizes(vocab_size=vocab_size, max_length=max_length)
        default = Reversible(None, None, beta=0.5, batch_ndim=1)
        solver = batched_solver(solver, default)
        keys = jr.split(key, 4)
        hidden = 4 * dim if hidden is None else hidden
        cell = RevDEQBlock(
            dim,
            num_heads,
            hidden,
            residual=residual,
            dropout=dropout,
            rotary=positions == "rotary",
            dtype=dtype,
            key=keys[0],
        )
        self.tokens, self.positions, self.head = make_tables(
            vocab_size,
            dim,
            max_length,
            positions=positions,
            tied=tied,
            dtype=dtype,
            keys=(keys[1], keys[2], keys[3]),
        )
        self.deq = DEQ(cell, solver=solver, adjoint=adjoint, max_steps=max_steps)
        self.drop = dropout_layer(dropout, VariationalDropout.tokens)
        self.max_length = max_length

    def _solve(
        self,
        inputs: Any,
        state: Any,
        *,
        z0: Features | None,
        key: PRNGKeyArray | None,
        max_steps: int | None,
        throw: bool,
        options: Options | None,
    ) -> tuple[optx.Solution, Any]:
        check_tokens("tokens", inputs, self.max_length)
        keys = split_key(key, 2)
        x = embed_tokens(self._tables, inputs, jnp.arange(inputs.shape[1]))
        x = self.drop(x, key=keys[0])
        sol = self.deq.solve(
            x, z0=z0, key=keys[1], max_steps=max_steps, throw=throw, options=options
        )
        return sol, state

    def _logits(
        self, z: Features, state: Any, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "batch length vocab"], Any]:
        dtype = self.deq.cell.attention.output.weight.dtype
        return unembed(self._tables, z, dtype), state

    @property
    def _tables(self) -> Tables:
        return Tables(self.tokens, self.positions, self.head)

    # Token by token

    def empty_cache(self, batch: int, max_length: int | None = None) -> KVCache:
        """A cache for `extend`, of `max_length` tokens (None: all positions).

        A solve to a tolerance needs the keys and values at the equilibrium alone; one
        of a static length those of each of its evaluations.
        """
        depth = static_depth(self.deq.solver, self.deq.max_steps) or 1
        heads = self.deq.cell.attention.num_heads
        dim = self.tokens.weight.shape[1]
        length = self.max_length if max_length is None else max_length
        check_room(length, self.max_length)
        return KVCache.empty(
            depth, batch, length, heads, dim // heads, self.tokens.weight.dtype
        )

    def extend(
        self,
        tokens: Array,
        cache: KVCache,
        *,
        options: dict[str, Any] | None = None,
    ) -> tuple[Features, KVCache]:
        """The equilibrium at tokens that follow those of the cache, without dropout.

        Args:
            tokens: any number of them, one at least.
            cache: from `empty_cache`, or from here.
            options: `{"beta": value}` for another weight on the cell.

        Returns:
            z* of the new tokens (NaN for tokens that do not fit in the cache), and the
            cache with them.
        """
        check_tokens("tokens", tokens)
        solver, max_steps = self.deq.solver, self.deq.max_steps
        depth = static_depth(solver, max_steps)
        cache.check(depth or 1, tokens)
        x = embed_tokens(self._tables, tokens, cache.positions(tokens))
        cell = eqx.nn.inference_mode(self.deq.cell)
        z0 = self.deq.initial_state(x)
        options = {} if options is None else options
        if depth is not None:

            def evaluate(z: Features, kept: tuple) -> tuple[Features, tuple]:
                return cell.advance(z, x, Past(kept[0], kept[1], cache.length))

            pasts = (cache.keys, cache.values)
            z, kept = static_solve(solver, evaluate, z0, pasts, options)
            cache = cache.add(*kept)
        else:
            past = cache.past(0)
            sol = fixed_point(
                lambda z, args: args[0].advance(z, *args[1:])[0],
                z0,
                (cell, x, past),
                solver=solver,
                adjoint=self.deq.adjoint,
                max_steps=max_steps,
                options=options,
            )
            z = unless_lost(sol, solver).value
            _, (keys, values) = cell.advance(z, x, past)
            worst = jax.lax.stop_gradient(sol.stats["relative_residual"])
            cache = cache.add(keys[None], values[None], worst)
        return cache.guard(z), cache
