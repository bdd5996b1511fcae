"""The basis of a Krylov space, in blocks of rows.

The first few products need only the first rows. A slice of one large array would be
copied by XLA on the CPU; blocks that are arrays of their own are not.
"""

import functools as ft
import itertools
from typing import TypeAlias

import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree

Blocks: TypeAlias = list[PyTree]

_EDGES = (8, 16)


def zeros(row: PyTree, rows: int) -> Blocks:
    """Room for `rows` vectors like `row`, along the first axis of every leaf."""
    edges = [0, *(e for e in _EDGES if e < rows), rows]
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    return [_tree.stack_of_zeros(row, size) for size in sizes]


def _sizes(basis: Blocks) -> list[int]:
    return [jtu.tree_leaves(block)[0].shape[0] for block in basis]


def read(basis: Blocks, j: Array) -> PyTree:
    """Vector j."""
    start, out = 0, None
    for block, size in zip(basis, _sizes(basis), strict=True):
        row = _row(block, j - start)
        out = row if out is None else _select(j >= start, row, out)
        start += size
    return out


def write(basis: Blocks, j: Array, vector: PyTree) -> Blocks:
    """The basis with vector j replaced."""
    start, out = 0, []
    for block, size in zip(basis, _sizes(basis), strict=True):
        at = jnp.clip(j - start, 0, size - 1)
        inside = (j >= start) & (j < start + size)
        new = _select(inside, vector, _row(block, at))
        update = lambda v, n, at=at: lax.dynamic_update_index_in_dim(v, n, at, 0)
        out.append(jtu.tree_map(update, block, new))
        start += size
    return out


def _row(block: PyTree, j: Array) -> PyTree:
    # An index beyond the block is moved to its edge.
    return jtu.tree_map(lambda v: lax.dynamic_index_in_dim(v, j, keepdims=False), block)


def _select(here: Array, x: PyTree, y: PyTree) -> PyTree:
    return jtu.tree_map(lambda a, b: jnp.where(here, a, b), x, y)


def orthogonalise(
    basis: Blocks, j: Array, w: PyTree, batch_ndim: int
) -> tuple[Array, PyTree]:
    """h = Vᵀ w and w − V h, twice, with only as many blocks as hold vectors 0 … j."""
    sizes = _sizes(basis)

    def project(count: int, w: PyTree) -> tuple[Array, PyTree]:
        h, rest = _project(basis[:count], j, w, batch_ndim)
        return jnp.pad(h, [(0, 0)] * (h.ndim - 1) + [(0, sum(sizes[count:]))]), rest

    branches = [ft.partial(project, i + 1) for i in range(len(sizes))]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    needed = sum((j >= end).astype(jnp.int32) for end in ends)
    # Two switches, not one: between them the memory of w is free again.
    once = branches[0] if not ends else ft.partial(lax.switch, needed, branches)
    h, w = once(w)
    again, w = once(w)
    return h + again, w


def _project(
    basis: Blocks, j: Array, w: PyTree, batch_ndim: int
) -> tuple[Array, PyTree]:
    k = batch_ndim

    def coefficients(v: Array, x: Array) -> Array:
        # (rows, *batch, *rest) · (*batch, *rest) -> (*batch, rows)
        axes = list(range(x.ndim))
        return jnp.einsum(
            v, [x.ndim, *axes], x, axes, [*axes[:k], x.ndim], precision="highest"
        )

    of_block = lambda block: _tree.total(
        jtu.tree_leaves(jtu.tree_map(coefficients, block, w))
    )
    h = jnp.concatenate([of_block(block) for block in basis], -1)
    # Later rows still hold what an earlier cycle has left there.
    h = jnp.where(jnp.arange(h.shape[-1], dtype=j.dtype) <= j, h, 0)
    for part, block in _parts(h, basis):
        step = _times(block, part, w, k)
        w = jtu.tree_map(jnp.subtract, w, step)
    return h, w


def combine(basis: Blocks, c: Array, x: PyTree, batch_ndim: int) -> PyTree:
    """V c, of the structure of x."""
    out = _tree.zeros_like(x)
    for part, block in _parts(c, basis):
        out = jtu.tree_map(jnp.add, out, _times(block, part, x, batch_ndim))
    return out


def _parts(c: Array, basis: Blocks) -> list[tuple[Array, PyTree]]:
    sizes = _sizes(basis)
    starts = itertools.accumulate(sizes[:-1], initial=0)
    return [
        (c[..., a : a + size], block)
        for a, size, block in zip(starts, sizes, basis, strict=True)
    ]


def _times(block: PyTree, c: Array, like: PyTree, batch_ndim: int) -> PyTree:
    def leaf(v: Array, x: Array) -> Array:
        axes = list(range(x.ndim))
        return jnp.einsum(
            v,
            [x.ndim, *axes],
            c.astype(v.dtype),
            [*axes[:batch_ndim], x.ndim],
            axes,
            precision="highest",
        )

    return jtu.tree_map(leaf, block, like)
