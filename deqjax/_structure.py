"""Pytree classes of users, kept out of the loops.

Such a class may check what it is built of, or have no `==`; JAX and equinox put flags
and None in the place of leaves, and compare nodes. So a tree with nodes of such a class
goes through a solve as the list of its leaves, and is built again of the answer.
"""

from collections import OrderedDict, defaultdict
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

_BUILTIN = (tuple, list, dict, OrderedDict, defaultdict, type(None))


def is_plain(structure: Any) -> bool:
    """Whether all nodes are of Python's, or equinox modules."""
    data = structure.node_data()
    if data is None:
        return True
    kind = data[0]
    known = kind in _BUILTIN or hasattr(kind, "_fields") or issubclass(kind, eqx.Module)
    return known and all(is_plain(child) for child in structure.children())


def plain(tree: PyTree) -> PyTree:
    """The tree, or the list of its leaves if it has nodes of another class."""
    return tree if is_plain(jtu.tree_structure(tree)) else jtu.tree_leaves(tree)


def plain_within(tree: PyTree, structure: Any) -> PyTree:
    """The tree, in which whatever has this structure is a list of leaves instead."""
    if is_plain(structure):
        return tree
    same = lambda x: jtu.tree_structure(x) == structure
    leaves = lambda x: jtu.tree_leaves(x) if same(x) else x
    return jtu.tree_map(leaves, tree, is_leaf=same)


def rebuilt(tree: PyTree, structure: Any) -> PyTree:
    """The tree of this structure that `plain` made a list of."""
    if jtu.tree_structure(tree) == structure:
        return tree
    return jtu.tree_unflatten(structure, jtu.tree_leaves(tree))
