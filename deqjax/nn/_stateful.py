"""Layers with a state of their own have no place inside a cell."""

from typing import Any

import equinox as eqx
import jax.tree_util as jtu


def refuse_stateful(cell: Any) -> None:
    """Raise if a layer of the cell would update a state at every evaluation.

    A cell must be the same map at every iteration. Batch norm in training is not, and
    its statistics would be those of iterates that are no data; in inference mode it is
    an affine map, and allowed.

    Raises:
        ValueError: naming the layer.
    """
    for path, layer in jtu.tree_leaves_with_path(cell, is_leaf=_holds_state):
        if _holds_state(layer) and not getattr(layer, "inference", False):
            raise ValueError(
                "`cell` must not hold layers with a state; "
                f"`cell{jtu.keystr(path)}` is a {type(layer).__name__}, which changes "
                "its state at every call, so that the cell would be another map at "
                "every iteration. Put it before "
                "or after the equilibrium layer, use `equinox.nn.GroupNorm`, "
                "`equinox.nn.LayerNorm` or `deqjax.nn.Contractive` instead, or switch "
                "it off with `equinox.nn.inference_mode`."
            )


def _is_stateful(node: Any) -> bool:
    return isinstance(node, eqx.nn.StatefulLayer) and node.is_stateful()


def _holds_state(node: Any) -> bool:
    """Whether a node has a state itself, and not by the layers that it is made of."""
    if not _is_stateful(node):
        return isinstance(node, eqx.nn.StateIndex)
    is_part = lambda x: x is not node and _is_stateful(x)
    return not any(map(is_part, jtu.tree_leaves(node, is_leaf=is_part)))
