"""Which arrays of a model are parameters, and how many."""

import math
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import PyTree

from ..solvers._optimistix import KINDS


def trainable(tree: PyTree) -> PyTree:
    """Which leaves are parameters: floating-point arrays, but for solvers and adjoints.

    A tolerance that is an array, or the probe of an adjoint, is a leaf of floats, too:
    an optimiser that is given it would change it, and the record that a probe has for a
    gradient would count in the norm that gradients are clipped to.

    Args:
        tree: a module, or what `equinox.filter_eval_shape` makes of its constructor.

    Returns:
        A bool for each leaf, as `equinox.partition` and `equinox.filter` take it.

    Example:
        >>> import deqjax, equinox as eqx, jax, jax.numpy as jnp
        >>> adjoint = deqjax.ImplicitAdjoint(probe=deqjax.BackwardStats())
        >>> cell = eqx.Partial(lambda w, z, x: jnp.tanh(w * z + x), jnp.ones(3))
        >>> deq = deqjax.nn.DEQ(cell, adjoint=adjoint)
        >>> moving, fixed = eqx.partition(deq, deqjax.nn.trainable(deq))
        >>> [leaf.shape for leaf in jax.tree.leaves(moving)]
        [(3,)]
    """
    settings = (*KINDS, optx.AbstractAdjoint)
    is_setting = lambda node: isinstance(node, settings)

    def leaf(node: Any) -> PyTree:
        if is_setting(node):
            return jtu.tree_map(lambda _: False, node)
        dtype = getattr(node, "dtype", None)
        return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)

    return jtu.tree_map(leaf, tree, is_leaf=is_setting)


def count_parameters(tree: PyTree) -> int:
    """The number of parameters: entries of the arrays that are `trainable`.

    Takes shapes as well as arrays, so that a model of any size can be counted without
    being made.

    Args:
        tree: a module, or what `equinox.filter_eval_shape` makes of its constructor.

    Returns:
        The number of entries. An array that is held in two places counts twice.

    Example:
        >>> import deqjax, equinox as eqx, jax.random as jr
        >>> make = deqjax.models.RevDEQLM.published
        >>> model = eqx.filter_eval_shape(make, "wikitext103", key=jr.key(0))
        >>> deqjax.nn.count_parameters(model)
        95907840
    """
    flags = jtu.tree_leaves(trainable(tree))
    leaves = jtu.tree_leaves(tree)
    pairs = zip(leaves, flags, strict=True)
    return sum(math.prod(leaf.shape) for leaf, counts in pairs if counts)
