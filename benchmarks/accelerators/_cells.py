"""The cells that solvers and gradients are timed on."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._reversal_costs import Cell
from .._solver_maps import layers

# (batch, width) of the perceptrons, (batch, tokens, width) of the transformer blocks.
SIZES = {
    "small perceptron": (256, 256),
    "large perceptron": (4096, 1024),
    "transformer block": (32, 448, 768),
    "thin transformer block": (4, 448, 768),
}
SMALL = {
    "small perceptron": (32, 64),
    "large perceptron": (128, 128),
    "transformer block": (2, 32, 64),
    "thin transformer block": (2, 16, 64),
}


def cell(name: str, dtype: Any, small: bool) -> Cell:
    """A cell with weights and state of this dtype."""
    shape = (SMALL if small else SIZES)[name]
    # The other one of the pair is not used: let it be tiny.
    mlp = shape if len(shape) == 2 else (1, 8)
    block = shape if len(shape) == 3 else (1, 1, 8)
    problem = layers(0, mlp, block)["MLP" if len(shape) == 2 else "transformer"]
    args = jtu.tree_map(lambda t: t.astype(dtype), problem.args)
    return Cell(problem.fn, args, shape, jnp.dtype(dtype))


def title(name: str, dtype: str, small: bool) -> str:
    """The name of a cell with its size and dtype."""
    shape = (SMALL if small else SIZES)[name]
    return f"{name} {'×'.join(map(str, shape))}, {dtype}"


def structs(tree: Any) -> Any:
    """Shapes and dtypes in the place of arrays."""
    return jtu.tree_map(lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype), tree)
