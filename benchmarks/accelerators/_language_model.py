"""The RevDEQ language model, its training step, and the parts of one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax

import deqjax
from deqjax.models import RevDEQLM

from .. import _reversal_costs as costs
from ._cells import structs


class Step(NamedTuple):
    """A training step to measure."""

    dtype: str
    adjoint: str  # "reversible", "unrolled" or "implicit"
    depth: int  # steps of the solve

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.dtype}, {self.adjoint}, {self.depth} steps"


def operations(model: RevDEQLM, batch: int, depth: int) -> tuple[float, float]:
    """Floating-point operations of a training step: of the model, and as executed.

    Two for each weight of a matrix and token, and those of attention, all pairs of
    tokens counted. A pull-back counts as two evaluations. A model's operations leave
    out what is evaluated again, which a reversible backward pass does once.
    """
    length, dim = model.max_length, model.tokens.weight.shape[1]
    weights = sum(x.size for x in jtu.tree_leaves(model.deq.cell) if _is_matrix(x))
    block = 2 * batch * length * weights + 4 * batch * length**2 * dim
    head = 2 * batch * length * model.tokens.weight.size
    evals = 2 * depth
    return 3 * evals * block + 3 * head, 4 * evals * block + 3 * head


def _is_matrix(x: Any) -> bool:
    return eqx.is_inexact_array(x) and x.ndim == 2


def cast(tree: Any, dtype: str) -> Any:
    """Floating-point arrays in this dtype."""
    move = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
    return jtu.tree_map(move, tree)


def loss_of(static: Any, step: Step) -> Callable:
    """(params, probe, tokens, targets) -> loss, computed in the dtype of the step.

    Parameters are float32, and cast at the start, as in mixed-precision training.
    """

    def loss(params: Any, probe: Any, tokens: Any, targets: Any) -> jax.Array:
        model = eqx.combine(cast(params, step.dtype), static)
        if step.adjoint == "reversible":
            adjoint = deqjax.ReversibleAdjoint(probe=probe)
        elif step.adjoint == "implicit":
            adjoint = deqjax.ImplicitAdjoint(probe=probe)
        else:
            adjoint = deqjax.UnrolledAdjoint()
        model = eqx.tree_at(
            lambda m: m.deq.adjoint, model, adjoint, is_leaf=lambda x: x is None
        )
        sol = model.solve(tokens, max_steps=step.depth)
        return jnp.mean(model.nll(sol.value, targets))

    return loss


def train_step(static: Any, step: Step, optimiser: Any) -> Callable:
    """(params, optimiser's state, probe, tokens, targets) -> new ones, loss, record."""
    gradient = jax.value_and_grad(loss_of(static, step), argnums=(0, 1))

    def run(params: Any, state: Any, probe: Any, tokens: Any, targets: Any) -> Any:
        value, (grads, stats) = gradient(params, probe, tokens, targets)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, stats

    return run


def parts(
    model: RevDEQLM, step: Step, batch: int, optimiser: Any
) -> list[tuple[str, tuple]]:
    """What a reversible step is made of: (name, (function, shapes of arguments))."""
    length, dim = model.max_length, model.tokens.weight.shape[1]
    wide = eqx.partition(model, eqx.is_inexact_array)[0]
    weights, static = eqx.partition(cast(model, step.dtype), eqx.is_inexact_array)
    state = jax.ShapeDtypeStruct((batch, length, dim), step.dtype)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def fn(z: jax.Array, args: Any) -> jax.Array:
        weights, x = args
        return eqx.combine(weights, static.deq.cell)(z, x)

    cell = costs.Cell(fn, None, state.shape, state.dtype)
    given = structs(weights.deq.cell), state

    def ends(weights: Any, z: Any, tokens: Any, targets: Any) -> Any:
        """Embedding, head and loss, with their gradients."""

        def loss(weights: Any, z: jax.Array) -> jax.Array:
            model = eqx.combine(weights, static)
            embedded = model.tokens.weight[tokens] + model.positions.weight
            return jnp.mean(model.nll(z + embedded, targets))

        return jax.value_and_grad(loss, argnums=(0, 1))(weights, z)

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    optimiser_state = jax.eval_shape(optimiser.init, wide)
    made = {
        "evaluations": (costs.forward_part(cell, step.depth), (given,)),
        "evaluations and pull-backs": (
            costs.backward_part(cell, step.depth),
            (given,),
        ),
        "embedding, head and loss": (ends, (structs(weights), state, tokens, tokens)),
        "update": (update, (structs(wide), optimiser_state, structs(wide))),
    }
    return list(made.items())
