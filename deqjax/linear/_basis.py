"""The basis of a Krylov space, in two rings.

The first few products need only the first vectors. A part of one ring would be copied
by XLA on the CPU; rings of their own are not.
"""

import functools as ft
import operator
from collections.abc import Iterator
from typing import TypeAlias

import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._types import Reals

Rings: TypeAlias = list[PyTree]

# Products that the first ring serves: most solves need no more.
_FIRST = 10


def zeros(vector: PyTree, length: int, batch_ndim: int) -> Rings:
    """Room for `length` vectors like the one given."""
    sizes = [_FIRST, length - _FIRST] if length > _FIRST else [length]
    return [_tree.ring(vector, size, batch_ndim) for size in sizes]


def _started(basis: Rings, batch_ndim: int) -> Iterator[tuple[int, int, PyTree]]:
    """The rings: the vectors before each, those in it, and itself."""
    start = 0
    for ring in basis:
        size = jtu.tree_leaves(ring)[0].shape[batch_ndim]
        yield start, size, ring
        start += size


def read(basis: Rings, j: Array, like: PyTree, batch_ndim: int) -> PyTree:
    """Vector j."""

    def leaf(a: Array, at: Array, x: Array) -> Array:
        row = lax.dynamic_index_in_dim(a, at, batch_ndim, keepdims=False)
        return row.reshape(x.shape)

    out = None
    for start, size, ring in _started(basis, batch_ndim):
        at = jnp.clip(j - start, 0, size - 1)
        row = jtu.tree_map(lambda a, x, at=at: leaf(a, at, x), ring, like)
        out = row if out is None else _tree.where(j >= start, row, out)
    return out


def write(basis: Rings, j: Array, vector: PyTree, batch_ndim: int) -> Rings:
    """The basis with vector j, where those behind it are of no use any more."""
    out = []
    for start, size, ring in _started(basis, batch_ndim):
        at = jnp.clip(j - start, 0, size - 1)
        # What the first ring holds is of use, the others hold nothing yet.
        only = j < size if start == 0 and len(basis) > 1 else None
        out.append(_tree.enter(ring, vector, at, batch_ndim, only=only))
    return out


@_tree.lenient
def orthogonalise(
    basis: Rings, j: Array, w: PyTree, batch_ndim: int
) -> tuple[Reals, PyTree]:
    """h = Vᵀ w and w − V h for the vectors 0 … j, twice."""
    once, w = _project(basis, j, w, batch_ndim)
    again, w = _project(basis, j, w, batch_ndim)
    return once + again, w


def _project(
    basis: Rings, j: Array, w: PyTree, batch_ndim: int
) -> tuple[Reals, PyTree]:
    k, parts = batch_ndim, []
    for start, size, ring in _started(basis, k):

        def subtract(
            w: PyTree, start: int = start, size: int = size, ring: PyTree = ring
        ) -> tuple[Reals, PyTree]:
            # Later rows still hold what an earlier cycle has left there.
            used = start + jnp.arange(size, dtype=j.dtype) <= j
            h = jnp.where(used, _tree.dots(ring, w, k), 0)
            return h, _tree.subtract(w, _tree.combine(h, ring, w, k))

        if start == 0:
            part, w = subtract(w)
        else:
            none = _tree.zeros_for(parts[0], (size,), k)
            part, w = lax.cond(j >= start, subtract, lambda w, none=none: (none, w), w)
        parts.append(part)
    return jnp.concatenate(parts, -1), w


@_tree.lenient
def combine(basis: Rings, c: Reals, like: PyTree, batch_ndim: int) -> PyTree:
    """V c, in the structure given."""
    parts = [
        _tree.combine(c[..., start : start + size], ring, like, batch_ndim)
        for start, size, ring in _started(basis, batch_ndim)
    ]
    return jtu.tree_map(lambda *xs: ft.reduce(operator.add, xs), *parts)
