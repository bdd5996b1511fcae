"""The DEQ-Transformer language model."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..._types import Options
from ...nn._adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from ...nn._checks import batched_solver, check_count, check_tokens
from ...nn._deq import DEQ
from ...nn._deq_transformer import (
    Context,
    DEQTransformerBlock,
    normal_linear,
    sinusoids,
)
from ...nn._dropout import VariationalDropout, split_key
from ...nn._tokens import Features, project
from ...solvers import Broyden
from ...solvers._optimistix import AnySolver
from ._interface import AbstractLanguageModel

_WIKITEXT103 = {
    "vocab_size": 267735,
    "dim": 700,
    "num_heads": 10,
    "hidden": 48000,
    "memory_length": 150,
    "cutoffs": (20000, 40000, 200000),
    "dropout": 0.05,
}


class SegmentMemory(eqx.Module):
    """What a `DEQTransformerLM` keeps of the tokens before, without gradient.

    Attributes:
        z: their equilibria, the last ones last.
        injection: their injections u.
        length: how many are there; those before are skipped.
    """

    z: Float[Array, "batch memory dim"]
    injection: Float[Array, "batch memory inner"]
    length: Int[Array, ""]


class DEQTransformerLM(AbstractLanguageModel):
    r"""The DEQ-Transformer: a language model whose one layer is solved for z*.

    $$ u = W_u\, \mathrm{embed}(w) + b_u, \qquad z^* = f(z^*, u, \mathrm{memory}),
       \qquad p = \mathrm{adaptive\ softmax}(z^*) $$

    with `deqjax.nn.DEQTransformerBlock` for f. Tables of the softmax are those of the
    embedding, and so are its projections but the first. Each sequence of a batch is a
    problem of its own.

    **Cost:** one evaluation of the block per step, and the softmax. **Memory:** that
    of solver and adjoint, and a second copy of the block's weights, normalised.

    The state that `solve` takes and returns is a `SegmentMemory`; without one there are no
    tokens before. The logits are log-probabilities of the whole vocabulary: `nll` is
    cheaper.

    | configuration | parameters | |
    |---|---|---|
    | `wikitext103` | 97,691,888 | d = 700, 10 heads, hidden layer of 48,000, memory of 150 tokens, 267,735 words cut at 20,000, 40,000 and 200,000, at most 30 steps to 10⁻³ |
    | `wikitext103_regularised` | 97,691,888 | the same with norms first, memory of 300 tokens, dropout of 0.06, of 0.01 for attention weights, and 14 steps |

    The block has 69,753,000 of these. Published beside the first: sequences of 150,
    Adam with 2.5e-4, warm-up of 16,000 and cosine over 300,000 steps, clipping at 0.25,
    batches of 56, the first 32,000 steps unrolled at depth 2 (`deqjax.nn.Pretraining`);
    beside the second: the Jacobian norm (`deqjax.regularise.jacobian_norm`) in 40% of
    the updates, with a weight of 2 that grows by 0.1 every 30,000 steps, and step
    limits drawn from 12 to 14 (`deqjax.nn.draw_options`).

    **Which source:** DEQ-Sequence, the authors' code of 2019 to 2021, from which their
    later TorchDEQ departs: with norms first, the residual of the MLP runs from the
    normed state here, from the state there.

    **Differences from the source:** tied projections are one array, which PyTorch
    has twice (`num_tied` parameters); states before the first token are masked out,
    theirs have no such; no horizon of 1,000 tokens, which these lengths do not reach;
    dropout of the embedding is drawn anew for each call, as theirs, but masks come from
    the key; `deqjax.Broyden` forwards and `deqjax.ImplicitAdjoint` backwards in place
    of Anderson and Broyden, both to a tolerance; parameters start with standard
    deviation 0.01, biases at 0, as in TorchDEQ's version.

    Args:
        vocab_size: tokens in the vocabulary, sorted by falling frequency.
        dim: width d, even.
        num_heads: attention heads; divides `dim`.
        hidden: width of the block's hidden layer.
        memory_length: how many tokens are remembered.
        cutoffs: see `AdaptiveEmbedding`.
        div_val: see `AdaptiveEmbedding`.
        pre_norm: see `DEQTransformerBlock`.
        weight_norm: see `DEQTransformerBlock`.
        dropout: rate, of embedding, distances, block and output.
        attention_dropout: see `DEQTransformerBlock`.
        solver: see `deqjax.fixed_point`; one of deqjax needs `batch_ndim=1`. None:
            `deqjax.Broyden(1e-3, batch_ndim=1)`, the method of the first source. For
            small trained models it takes 7 evaluations, as `deqjax.Anderson` does, and
            `deqjax.Picard` 11; at random weights it leaves the smallest residual.
        adjoint: as of `deqjax.fixed_point`.
        max_steps: most steps of the solver.
        scale: standard deviation of the initial parameters.
        block: tokens per block of the softmax, see `AdaptiveSoftmax`.
        key: decides the initial parameters.

    Raises:
        ValueError: if a size, a rate or the cutoffs are not valid.

    Example:
        >>> import deqjax, jax.numpy as jnp, jax.random as jr
        >>> lm = deqjax.models.DEQTransformerLM(64, 8, 2, 16, cutoffs=(8,), key=jr.key(0))
        >>> sol, memory = lm.solve(jnp.zeros((2, 5), int), lm.empty_memory(2))
        >>> lm.nll(sol.value, jnp.ones((2, 5), int)).shape
        (2, 5)

    References:
        S. Bai, J. Z. Kolter, V. Koltun (2019), Deep equilibrium models,
        doi:10.48550/arXiv.1909.01377.
        S. Bai, V. Koltun, J. Z. Kolter (2021), Stabilizing equilibrium models by
        Jacobian regularization, doi:10.48550/arXiv.2106.14342.
    """  # noqa: E501 (a row of the table cannot be broken)

    configurations: ClassVar = {
        "wikitext103": _WIKITEXT103,
        "wikitext103_regularised": {
            **_WIKITEXT103,
            "memory_length": 300,
            "dropout": 0.06,
            "attention_dropout": 0.01,
            "pre_norm": True,
            "max_steps": 14,
        },
    }

    embedding: AdaptiveEmbedding
    injection: eqx.nn.Linear
    deq: DEQ
    softmax: AdaptiveSoftmax
    drop: VariationalDropout
    memory_length: int = eqx.field(static=True)

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        memory_length: int = 0,
        cutoffs: tuple[int, ...] = (),
        div_val: int = 4,
        pre_norm: bool = False,
        weight_norm: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        solver: AnySolver | None = None,
        adjoint: optx.AbstractAdjoint | None = None,
        max_steps: int = 30,
        scale: float = 0.01,
        block: int = 512,
        key: PRNGKeyArray,
    ):
        check_count("memory_length", memory_length, 0)
        solver = batched_solver(solver, Broyden(1e-3, batch_ndim=1))
        keys = jr.split(key, 4)
        cell = DEQTransformerBlock(
            dim,
            num_heads,
            hidden,
            pre_norm=pre_norm,
            weight_norm=weight_norm,
            dropout=dropout,
            attention_dropout=attention_dropout,
            scale=scale,
            key=keys[0],
        )
        self.embedding = AdaptiveEmbedding(
            vocab_size, dim, cutoffs=cutoffs, div_val=div_val, scale=scale, key=keys[1]
        )
        self.injection = normal_linear(dim, 3 * dim, True, scale, keys[2])
        self.deq = DEQ(cell, solver=solver, adjoint=adjoint, max_steps=max_steps)
        self.softmax = AdaptiveSoftmax(
            self.embedding, block=block, scale=scale, key=keys[3]
        )
        self.drop = VariationalDropout.tokens(dropout)
        self.memory_length = memory_length

    @property
    def num_tied(self) -> int:
        """Parameters that the authors' model counts twice: tied projections."""
        return sum(p.size for p in self.embedding.projections[1:])

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
    ) -> tuple[optx.Solution, SegmentMemory]:
        # An `eqx.nn.State`, in which this model has nothing, is the beginning.
        memory = None if isinstance(state, eqx.nn.State) else state
        x, injection = self.context(inputs, memory, key=key)
        sol = self.deq.solve(
            x,
            z0=z0,
            key=self._keys(key)[2],
            max_steps=max_steps,
            throw=throw,
            options=options,
        )
        keep = lambda old, new: lax.stop_gradient(
            jnp.concatenate([old, new], axis=1)[:, new.shape[1] :]
        )
        size = x.memory.shape[1]
        length = jnp.minimum(size, x.remembered + inputs.shape[1])
        old = x.injection[:, :size]
        return sol, SegmentMemory(
            keep(x.memory, sol.value), keep(old, injection), length
        )

    def context(
        self,
        tokens: Array,
        memory: SegmentMemory | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Context, Float[Array, "batch length inner"]]:
        """What the cell takes beside z, and the injection of the new tokens.

        Args:
            tokens: see `solve`.
            memory: from the tokens before; None: there are none.
            key: see `solve`.
        """
        check_tokens("tokens", tokens)
        batch, length = tokens.shape
        memory = self.empty_memory(batch) if memory is None else memory
        if memory.z.shape[:2] != (batch, self.memory_length):
            raise ValueError(
                f"`state` must be a memory of batch {batch}, as `tokens`, and length "
                f"{self.memory_length}, the model's `memory_length`; got "
                f"{memory.z.shape[:2]}. Leave it out at the "
                "first segment, or start with `empty_memory`."
            )
        keys = self._keys(key)
        word = self.drop(self.embedding(tokens), key=keys[0])
        injection = project(self.injection, word)
        dim = word.shape[-1]
        distances = sinusoids(self.memory_length + length, dim, word.dtype)
        x = Context(
            jnp.concatenate([memory.injection, injection], axis=1),
            memory.z,
            memory.length,
            self.drop(distances, key=keys[1]),
        )
        return x, injection

    def empty_memory(self, batch: int) -> SegmentMemory:
        """The memory before the first token."""
        dtype, dim = self.injection.weight.dtype, self.injection.weight.shape[1]
        shape = (batch, self.memory_length)
        return SegmentMemory(
            jnp.zeros((*shape, dim), dtype),
            jnp.zeros((*shape, 3 * dim), dtype),
            jnp.array(0, jnp.int32),
        )

    def nll(
        self, z: Features, targets: Array, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch length"]:
        """−log p of each target, given the equilibrium.

        Args:
            z: the equilibrium.
            targets: the word that follows each position.
            key: that of `solve`.
        """
        check_tokens("targets", targets)
        z = self.drop(z, key=self._keys(key)[3])
        return self.softmax.nll(z, targets, self.embedding)

    def _logits(
        self, z: Features, state: Any, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "batch length vocab"], Any]:
        z = self.drop(z, key=self._keys(key)[3])
        return self.softmax.log_probs(z, self.embedding), state

    def log_probs(
        self, z: Features, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch length vocab"]:
        """As `logits`, which are log p here: of the whole vocabulary.

        Args:
            z: the equilibrium.
            key: that of `solve`.
        """
        return self._logits(z, None, key)[0]

    @staticmethod
    def _keys(key: PRNGKeyArray | None) -> list[PRNGKeyArray | None]:
        """Keys for embedding, distances, block and output."""
        return split_key(key, 4)
