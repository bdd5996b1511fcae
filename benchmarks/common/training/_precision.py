"""Mixed precision: linear layers compute in bfloat16, everything else in float32."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree


def cast_linear(model: PyTree, dtype: Any) -> PyTree:
    """The model with the weights of its linear layers in `dtype`.

    The layers of `deqjax.nn` compute in the dtype of their weights and return that of
    their input: iterates, norms, softmaxes and the loss stay in the dtype in which they
    were. Called inside the loss, gradients arrive in the dtype of the parameters.

    Args:
        model: with parameters of any floating-point dtype.
        dtype: the dtype to compute in; `"float32"` changes nothing.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return model
    is_linear = lambda node: isinstance(node, eqx.nn.Linear)
    move = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
    convert = lambda node: jtu.tree_map(move, node) if is_linear(node) else node
    return jtu.tree_map(convert, model, is_leaf=is_linear)
