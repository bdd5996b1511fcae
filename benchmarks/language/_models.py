"""The models in one interface, sized to equal numbers of parameters."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

import deqjax
from deqjax.models import (
    AbstractLanguageModel,
    DEQTransformerLM,
    RevDEQLM,
    TransformerLM,
)
from deqjax.nn import count_parameters

from ._config import Config
from ._errors import UsageError


def make_model(config: Config, vocab_size: int) -> eqx.Module:
    """The untrained model.

    `config.hidden` is the width of the RevDEQ's MLP. The hidden layers of the other
    models get the width with which their parameters are nearest to the RevDEQ's.

    Raises:
        UsageError: for choices that the model does not have.
        ValueError: for sizes that do not fit.
    """
    if config.model == "deq":
        _check_deq(config)
    key = jr.key(config.seed)
    hidden = config.hidden
    if config.model != "revdeq":
        hidden = equal_width(config, vocab_size)
    return eqx.filter_jit(_make)(config, vocab_size, hidden, key)


def equal_width(config: Config, vocab_size: int) -> int:
    """The hidden width that gives a model as many parameters as the RevDEQ has."""
    reversible = dataclasses.replace(config, model="revdeq")
    target = _size(reversible, vocab_size, config.hidden)
    # The number of parameters is linear in the width.
    low, high = (_size(config, vocab_size, width) for width in (1, 2))
    return max(round((target - low) / (high - low)) + 1, 1)


def _size(config: Config, vocab_size: int, hidden: int) -> int:
    shapes = eqx.filter_eval_shape(_make, config, vocab_size, hidden, jr.key(0))
    return count_parameters(shapes)


def _make(config: Config, vocab_size: int, hidden: int, key: PRNGKeyArray) -> Any:
    if config.model == "deq":
        return DEQTransformerLM(
            vocab_size,
            config.dim,
            config.heads,
            hidden,
            solver=deqjax.Broyden(1e-2, batch_ndim=1),
            adjoint=deqjax.ImplicitAdjoint(),
            max_steps=12,
            scale=0.02,
            dropout=config.dropout,
            key=key,
        )
    choices = {
        "max_length": config.length,
        "hidden": hidden,
        "dropout": config.dropout,
        "positions": config.positions,
        "tied": config.tied,
        "key": key,
    }
    if config.model == "explicit":
        return TransformerLM(
            vocab_size, config.dim, config.heads, config.layers, **choices
        )
    solver = deqjax.Reversible(None, None, beta=config.beta, batch_ndim=1)
    return RevDEQLM(
        vocab_size,
        config.dim,
        config.heads,
        solver=solver,
        adjoint=deqjax.ReversibleAdjoint(),
        max_steps=config.solver_steps,
        **choices,
    )


def _check_deq(config: Config) -> None:
    """Raise for choices that the DEQ-Transformer does not leave open."""
    if config.positions != "learned":
        raise UsageError(
            f"--positions: got {config.positions} with --model deq, which has relative "
            "positions of its own; leave it out, or choose another --model"
        )
    if config.tied:
        raise UsageError(
            "--tied: of no use with --model deq, whose embedding and head are tied "
            "anyway; leave it out, or choose another --model"
        )


def token_nll(
    model: AbstractLanguageModel,
    windows: Int[Array, "batch length_1"],
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "batch length"], Float[Array, " batch"]]:
    """−log p in nats of each token after the first, and evaluations per sequence.

    Args:
        model: in inference mode, if there is no key.
        windows: tokens, each sequence with the one after its last.
        key: for dropout.
    """
    tokens, targets = windows[:, :-1], windows[:, 1:]
    sol = model.solve(tokens, key=key)
    rows = jnp.ones(tokens.shape[0], jnp.float32)
    evals = rows * jax.lax.stop_gradient(sol.stats["num_evals"])
    return model.nll(sol.value, targets, key=key).astype(jnp.float32), evals
