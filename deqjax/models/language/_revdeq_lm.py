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
from ...nn._revdeq_block import RevDEQBlock
from ...nn._tokens import Features, Tokens, embed_at, project
from ...solvers import Reversible
from ...solvers._optimistix import AnySolver
from ._generation import KVCache, check_room, static_depth, static_solve
from ._interface import AbstractLanguageModel


class RevDEQLM(AbstractLanguageModel):
    r"""The RevDEQ language model: one transformer block at its fixed point.

    $$ x_t = E_{w_t} + P_t, \qquad z^* = f(z^*, x), \qquad
       \mathrm{logits}_t = H z^*_t $$

    with `deqjax.nn.RevDEQBlock` for f, token and position embeddings E and P, and an
    untied head H without bias. Each sequence of a batch is a problem of its own.

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
        solver: see `deqjax.fixed_point`; one of deqjax needs `batch_ndim=1`. None:
            `deqjax.Reversible(None, None, beta=0.5, batch_ndim=1)`.
        adjoint: as of `deqjax.fixed_point`.
        max_steps: steps of the solver.
        dtype: of the parameters, and of the states.
        key: decides the initial parameters.

    Raises:
        ValueError: if a size is not valid.

    Example:
        >>> import deqjax, jax.numpy as jnp, jax.random as jr
        >>> lm = deqjax.models.RevDEQLM(16, 8, 2, max_length=12, key=jr.key(0))
        >>> lm(jnp.zeros((2, 5), int)).shape
        (2, 5, 16)

    References:
        S. McCallum, K. Arora, J. Foster (2025), Reversible deep equilibrium models,
        doi:10.48550/arXiv.2509.12917.
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
    positions: eqx.nn.Embedding
    deq: DEQ
    head: eqx.nn.Linear

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_heads: int,
        *,
        max_length: int,
        hidden: int | None = None,
        residual: str = "state",
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
            dim, num_heads, hidden, residual=residual, dtype=dtype, key=keys[0]
        )
        self.tokens = eqx.nn.Embedding(vocab_size, dim, dtype=dtype, key=keys[1])
        self.positions = eqx.nn.Embedding(max_length, dim, dtype=dtype, key=keys[2])
        self.deq = DEQ(cell, solver=solver, adjoint=adjoint, max_steps=max_steps)
        self.head = eqx.nn.Linear(dim, vocab_size, False, dtype, key=keys[3])

    @property
    def max_length(self) -> int:
        """The longest sequence that the model has positions for."""
        return self.positions.weight.shape[0]

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
        x = self._inject(inputs, jnp.arange(inputs.shape[1]))
        sol = self.deq.solve(
            x, z0=z0, max_steps=max_steps, throw=throw, options=options
        )
        return sol, state

    def _logits(
        self, z: Features, state: Any, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "batch length vocab"], Any]:
        return project(self.head, z), state

    def _inject(self, tokens: Tokens, positions: Array) -> Features:
        return embed_at(tokens, positions, table=self.tokens, places=self.positions)

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
        """The equilibrium at tokens that follow those of the cache.

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
        x = self._inject(tokens, cache.positions(tokens))
        cell, z0 = self.deq.cell, self.deq.initial_state(x)
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
