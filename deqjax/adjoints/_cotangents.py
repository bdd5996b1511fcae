"""What backward rules of equinox's `filter_custom_vjp` have in common."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import PyTree


def materialise(cotangent: PyTree, like: PyTree) -> PyTree:
    """Zeros in place of the `None`s of a cotangent."""

    def leaf(x: Any, ct: Any) -> Any:
        return jnp.zeros_like(x) if x is not None and ct is None else ct

    return jtu.tree_map(leaf, like, cotangent, is_leaf=lambda x: x is None)


def none_like(x: PyTree) -> PyTree:
    """The cotangent of what has none."""
    return jtu.tree_map(lambda _: None, x)


def floating(x: PyTree) -> PyTree:
    """The leaves that have derivatives."""
    return eqx.filter(x, eqx.is_inexact_array)


def constant(x: PyTree) -> PyTree:
    """x, whose arrays have no derivative."""
    return jtu.tree_map(lambda t: lax.stop_gradient(t) if eqx.is_array(t) else t, x)
