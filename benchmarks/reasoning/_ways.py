"""One model, four ways: what its updates differentiate."""

from collections.abc import Callable
from typing import Any

import deqjax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree

from ._config import Config

TITLES = {
    "one-step": "one-step gradient",
    "last-k": "last k steps",
    "exact": "exact, all steps",
    "stack": "stack without loop",
}


def adjoint_of(config: Config, way: str) -> Any:
    """The adjoint of a way that loops."""
    if way == "one-step":
        return deqjax.JFBAdjoint()
    if way == "last-k":
        return deqjax.UnrolledAdjoint(last=config.last)
    return deqjax.ReversibleAdjoint(record_bits=config.record_bits)


def solver_of(config: Config) -> deqjax.Reversible:
    """The iteration of every way that loops: a fixed number of reversible steps."""
    return deqjax.Reversible(None, None, beta=config.beta, batch_ndim=1)


def apply_cell(z: PyTree, args: tuple[Callable, PyTree]) -> PyTree:
    """The map that is iterated."""
    cell, x = args
    return cell(z, x)


class Looped(eqx.Module):
    """A model whose one cell is iterated.

    Attributes:
        model: embedding, cell and read-out.
        config: the choices of the run.
        way: what an update differentiates.
    """

    model: Any
    config: Config = eqx.field(static=True)
    way: str = eqx.field(static=True)

    def state(self, inputs: Array, budget: Array | None = None) -> PyTree:
        """The state after the steps of training, or after the first `budget`."""
        x = self.model.inject(inputs)
        return deqjax.fixed_point(
            apply_cell,
            self.model.initial_state(x),
            (self.model.cell, x),
            solver=solver_of(self.config),
            adjoint=adjoint_of(self.config, self.way),
            max_steps=self.config.steps,
            options=None if budget is None else {"step_budget": budget},
        ).value


class Stack(eqx.Module):
    """The same model with a cell of its own for each of its layers.

    z ← (1 − β) z + β f_l(z, x), each layer recomputed in the backward pass.
    """

    model: Any
    cells: Any
    config: Config = eqx.field(static=True)

    @property
    def num_layers(self) -> int:
        """As many layers as the loop has evaluations, or one."""
        return num_layers(self.config)

    def states(self, inputs: Array) -> tuple[PyTree, PyTree]:
        """The last state, and those after every layer."""
        x = self.model.inject(inputs)
        arrays, static = eqx.partition(self.cells, eqx.is_array)
        beta = self.config.beta if self.num_layers > 1 else 1.0

        @jax.checkpoint
        def layer(z: PyTree, arrays: PyTree) -> tuple[PyTree, PyTree]:
            f = eqx.combine(arrays, static)(z, x)
            z = jtu.tree_map(lambda a, b: (1 - beta) * a + beta * b, z, f)
            return z, z

        return lax.scan(layer, self.model.initial_state(x), arrays)

    def state(self, inputs: Array, budget: Array | None = None) -> PyTree:
        """The state after all layers: a stack has one depth."""
        return self.states(inputs)[0]


def num_layers(config: Config) -> int:
    """Layers of the stack."""
    return 2 * config.steps if config.stack == "evaluations" else 1


def build(
    make: Callable[[PRNGKeyArray], Any], config: Config, way: str, key: PRNGKeyArray
) -> Looped | Stack:
    """The untrained model of a way; equal keys give equal embeddings and first cells."""
    model = make(key)
    if way != "stack":
        return Looped(model, config, way)
    keys = jr.split(key, num_layers(config)).at[0].set(key)
    cells = eqx.filter_vmap(lambda key: make(key).cell)(keys)
    # The model keeps no cell of its own, which would be counted.
    return Stack(eqx.tree_at(lambda m: m.cell, model, None), cells, config)
