"""Refusing derivatives of what has none: the statistics and the state of a solve.

Most of them are found under `stop_gradient`, and JAX would take them for constants, of
gradient 0, without a word. So they are made to depend on the answer, by a derivative
that is never used: pulling a cotangent back is an error that names the entry, and the
tangent, which forward mode computes whether or not somebody uses it, is infinite.
"""

import functools as ft
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .. import _tree
from .._upstream import Extras, nondifferentiable_backward
from ._loop import companion


def detach(value: PyTree, extras: Extras, *, exact: PyTree = None) -> Extras:
    """The extras, of which aux alone can be differentiated.

    Args:
        value: the answer, which depends on all that the solve depends on.
        extras: of the same solve.
        exact: the companion of the answer, where its derivative is that of the steps.
    """
    parts = [
        jnp.sum(x.astype(_tree.wide(x.dtype)))
        for x in jtu.tree_leaves(eqx.filter(value, eqx.is_inexact_array))
    ]
    refuse = ft.partial(_refuse, origin=_tree.total(parts), count=extras.num_steps)
    # Integers too are constants to JAX then: optimistix puts the result into branches.
    rest = jtu.tree_map(_constant, extras._replace(aux=None))
    named = _Reported(rest.stats, rest.dynamic_state)
    stats, state = jtu.tree_map_with_path(refuse, named)
    rest = rest._replace(stats=stats, dynamic_state=state, aux=extras.aux)
    found = companion(extras)
    if found is None:
        return rest
    if exact is None:
        path = (jtu.GetAttrKey("state"), jtu.GetAttrKey("companion"))
        exact = jtu.tree_map(ft.partial(refuse, path), found)
    return eqx.tree_at(lambda e: e.dynamic_state.companion, rest, exact)


class _Reported(NamedTuple):
    """The names in a solution."""

    stats: Any
    state: Any


def _constant(x: Any) -> Any:
    return x if eqx.is_inexact_array(x) else nondifferentiable_backward(x)


def _refuse(path: tuple, x: Any, origin: Array, count: Array) -> Any:
    if not eqx.is_inexact_array(x):
        return x
    msg = (
        f"`sol{jtu.keystr(path)}` has no derivative: statistics and states of a solve "
        "say how it went. Use `jax.lax.stop_gradient` where you want a constant, or "
        "compute it from `sol.value` (a residual, say) where you want its derivative."
    )
    # An error at run time: branches and loops pull back cotangents of zeros, too.
    out = _underived(x, origin, count)
    return nondifferentiable_backward(out, msg=msg, symbolic=False)


@jax.custom_jvp
def _underived(x: Array, origin: Array, count: Array) -> Array:
    """x, as something that depends on the origin; `count` is an integer ≥ 0."""
    return x


@_underived.defjvp
def _underived_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, origin, count = primals
    # Compilers do not know that this is ∞, and thus keep what it depends on.
    tangent = jnp.where(count < 0, tangents[1], jnp.full_like(origin, jnp.inf))
    return x, _tree.fill(tangent.astype(x.dtype), x)
