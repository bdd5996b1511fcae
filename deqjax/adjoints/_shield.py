"""Keeping a problem whose solve failed out of the gradient of the others.

Where an iterate is not finite, neither is a Jacobian taken there, and its product with
a cotangent of 0 is not 0 but NaN: in the gradient of weights that all problems share it
would spoil the contributions of all. So f is linearised at the start instead, where it
is finite, and the cotangents of that problem are set to 0.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._types import Flags
from .._upstream import unvmap_any


def safe_point(
    value: PyTree, start: PyTree, live: Flags, sound: Flags | None = None
) -> PyTree:
    """The answer, or a point that serves in its place for problems that need another.

    Of those that are not live, the start; of those that are but not `sound`, a point
    beside the answer, since a Jacobian that is not finite where f is (that of a norm at
    0) mostly is so at a point alone.
    """
    if sound is not None:
        beside = jtu.tree_map(lambda x: x + (1 + jnp.abs(x)) / 64, value)
        value = _tree.where(sound, value, beside)
    start = lax.stop_gradient(start)
    start = jtu.tree_map(lambda x: jnp.where(jnp.isfinite(x), x, 0), start)
    return _tree.where(live, value, start)


def silence(live: Flags | None, x: PyTree) -> PyTree:
    """Zeros for the problems that are not live; None: all are."""
    return x if live is None else _tree.where(live, x, _tree.zeros_like(x))


def silence_aux(live: Flags | None, ct: PyTree, aux: PyTree) -> PyTree:
    """The same for cotangents of aux: where aux itself is finite, it is to count.

    What has the axes of the batch in front belongs to its problems, the rest to all.
    """
    if live is None:
        return ct
    flags = live

    def leaf(c: Array, a: Array) -> Array:
        mine = flags.shape == a.shape[: flags.ndim]
        known = _tree.all_finite(a, flags.ndim if mine else 0)
        return silence((flags if mine else jnp.all(flags)) | known, c)

    return jtu.tree_map(leaf, ct, aux)


def rescued(
    moved: PyTree,
    cts: PyTree,
    live: Flags,
    linearise: Callable[[Flags, Flags], Callable],
) -> PyTree:
    """The cotangent of θ, `moved` if finite, without that of hopeless problems.

    Where f or its Jacobian is not finite although z* is, every cotangent is pulled back
    to NaN, that of 0 too. Only then is f linearised again: once to see for which
    problems, and once elsewhere for those.

    Args:
        moved: what the pull-back has made of `cts`.
        cts: cotangents of the residual and of aux.
        live: problems whose z* and f(z*) are finite.
        linearise: the pull-back at `safe_point`, of which problems are live and sound.
    """
    lost = unvmap_any(~_tree.all_finite(moved))

    def again(val: tuple[Array, PyTree, Flags]) -> tuple[Array, PyTree, Flags]:
        trip, _, sound = val
        pull = linearise(live, sound)
        nothing = pull(_tree.zeros_like(cts))[0]
        ct, ct_aux = cts
        moved = pull((silence(sound, ct), ct_aux))[1]
        sound = sound & live & _tree.all_finite(nothing, live.ndim)
        return trip + 1, moved, sound

    # A loop of no or two trips; what a `lax.cond` returns, XLA copies.
    go_on = lambda val: lost & (val[0] < 2)
    first = jnp.array(0, jnp.int32), moved, jnp.ones_like(live)
    return lax.while_loop(go_on, again, first)[1]


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
