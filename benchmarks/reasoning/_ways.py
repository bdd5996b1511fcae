"""One model, four ways: what its updates differentiate."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree

import deqjax

from ._cells import LoopModel
from ._config import Config


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


def solve(model: LoopModel, x: Array, config: Config, adjoint: Any) -> Array:
    """The state after the steps of training, with a gradient of one's choice."""
    return deqjax.fixed_point(
        apply_cell,
        model.initial_state(x),
        (model.cell, x),
        solver=solver_of(config),
        adjoint=adjoint,
        max_steps=config.steps,
    ).value


class Looped(eqx.Module):
    """A model whose one cell is iterated.

    Attributes:
        model: embedding, cell and read-out.
        config: the choices of the run.
        way: what an update differentiates.
    """

    model: LoopModel
    config: Config = eqx.field(static=True)
    way: str = eqx.field(static=True)

    def __call__(self, inputs: Array) -> Array:
        """The answers after the steps of training."""
        x = self.model.inject(inputs)
        z = solve(self.model, x, self.config, adjoint_of(self.config, self.way))
        return self.model.logits(z)


class Stack(eqx.Module):
    """The same model with a cell of its own for each evaluation of the loop.

    z ← (1 − β) z + β f_l(z, x), each layer recomputed in the backward pass.

    Attributes:
        model: embedding and read-out.
        cell: the layers' cells, along the first axis of their arrays.
        beta: β.
    """

    model: LoopModel
    cell: PyTree
    beta: float = eqx.field(static=True)

    def __call__(self, inputs: Array) -> Array:
        """The answers after all layers: a stack has one depth."""
        x = self.model.inject(inputs)
        arrays, static = eqx.partition(self.cell, eqx.is_array)

        @jax.checkpoint
        def layer(z: PyTree, arrays: PyTree) -> tuple[PyTree, None]:
            f = eqx.combine(arrays, static)(z, x)
            relax = lambda a, b: (1 - self.beta) * a + self.beta * b
            return jtu.tree_map(relax, z, f), None

        z, _ = lax.scan(layer, self.model.initial_state(x), arrays)
        return self.model.logits(z)


def build(
    make: Callable[[PRNGKeyArray], LoopModel],
    config: Config,
    way: str,
    key: PRNGKeyArray,
) -> Looped | Stack:
    """The untrained model of a way; the same key gives the same embedding and head."""
    model = make(key)
    if way != "stack":
        return Looped(model, config, way)
    cells = eqx.filter_vmap(lambda key: make(key).cell)(jr.split(key, 2 * config.steps))
    # The model keeps no cell of its own, which would be counted.
    return Stack(eqx.tree_at(lambda m: m.cell, model, None), cells, config.beta)
