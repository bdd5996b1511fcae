"""Refusing derivatives of what has none: the statistics and the state of a solve.

Most of them are found under `stop_gradient`, and JAX would take them for constants, of
gradient 0, without a word. So they are made to depend on the answer, by a derivative
that is never used: pulling a cotangent back is an error that names the entry, and the
tangent, which forward mode computes whether or not somebody uses it, is infinite.
"""

import dataclasses
import functools as ft
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .. import _tree
from .._problem import Solved
from .._upstream import nondifferentiable_backward


def detach(solved: Solved, *, exact: bool = False) -> Solved:
    """What was solved, of which value and aux alone can be differentiated.

    With `exact` the companion can be, too: its derivative is that of the steps.
    """
    value, companion = solved.value, solved.companion
    parts = [
        jnp.sum(x.astype(_tree.wide(x.dtype)))
        for x in jtu.tree_leaves(eqx.filter(value, eqx.is_inexact_array))
    ]
    refuse = ft.partial(_refuse, origin=_tree.total(parts), count=solved.num_steps)
    # Integers too are constants to JAX then: optimistix puts the result into branches.
    rest = jtu.tree_map(_constant, solved._replace(value=None, aux=None))
    named = _Reported(rest.stats, rest.state)
    stats, state = jtu.tree_map_with_path(refuse, named)
    if companion is not None:
        if not exact:
            path = (jtu.GetAttrKey("state"), jtu.GetAttrKey("companion"))
            companion = jtu.tree_map(ft.partial(refuse, path), companion)
        state = dataclasses.replace(state, memory=companion)
    return rest._replace(value=value, aux=solved.aux, stats=stats, state=state)


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
