"""Keeping a problem whose solve failed out of the gradient of the others.

Where an iterate is not finite, neither is a Jacobian taken there, and its product with
a cotangent of 0 is not 0 but NaN: in the gradient of weights that all problems share it
would spoil the contributions of all. So f is linearised at the start instead, where it
is finite, and the cotangents of that problem are set to 0.
"""

from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._types import Flags


def safe_point(value: PyTree, start: PyTree, batch_ndim: int) -> tuple[PyTree, Flags]:
    """The answer, or the start where it is not finite; and where it is."""
    start = lax.stop_gradient(start)
    start = jtu.tree_map(lambda x: jnp.where(jnp.isfinite(x), x, 0), start)
    live = _tree.all_finite(value, batch_ndim)
    return _tree.where(live, value, start), live


def silence(live: Flags | None, x: PyTree) -> PyTree:
    """Zeros for the problems that are not live; None: all are."""
    return x if live is None else _tree.where(live, x, _tree.zeros_like(x))


def silence_aux(live: Flags | None, aux: PyTree) -> PyTree:
    """The same for the leaves of aux; those without the batch's axes belong to all."""
    if live is None:
        return aux
    flags = live

    def leaf(a: Array) -> Array:
        mine = flags.shape == a.shape[: flags.ndim]
        return silence(flags if mine else jnp.all(flags), a)

    return jtu.tree_map(leaf, aux)


def report(live: Flags | None, entries: dict[str, Any]) -> dict[str, Any]:
    """The entries of a probe: nothing has converged, nor is known, that is not live."""
    if live is None:
        return entries
    out = dict(entries)
    if out.get("converged") is not None:
        out["converged"] = out["converged"] & live
    for name in ("residual", "relative_residual", "forward_residual"):
        if out.get(name) is not None:
            out[name] = jnp.where(live, out[name], jnp.nan)
    return out
