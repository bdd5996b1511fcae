"""Linear algebra on pytrees of independent problems.

With `batch_ndim=k` the leading k axes of every leaf index independent problems;
norms, products and selections are taken per problem and have the shape of those
axes. Reductions run leaf by leaf (no ravel, so that sharded leaves stay where they
are) and in at least float32, whatever the dtype of the leaves.
"""

import functools as ft
import math
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree

from ._types import Flags, Reals
from ._upstream import pvary, varying_axes


def wide(dtype: Any) -> Any:
    """The dtype in which numbers of `dtype` are accumulated: at least float32."""
    # Not promote_types: strict promotion, which users may switch on, refuses it.
    return max(jnp.dtype(dtype), jnp.dtype(jnp.float32), key=lambda d: d.itemsize)


def lenient(fn: Callable) -> Callable:
    """`fn`, in which numbers per problem may meet rows without their axes.

    `jax_numpy_rank_promotion="raise"` is for the code of whoever has set it.
    """

    @ft.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            return fn(*args, **kwargs)

    return call


def total(parts: list[Array], op: Any = operator.add) -> Array:
    """Combine what was reduced leaf by leaf, in the widest of the dtypes."""
    dtype = max((p.dtype for p in parts), key=lambda d: d.itemsize)
    return ft.reduce(op, (p.astype(dtype) for p in parts))


def batch_shape(tree: PyTree, batch_ndim: int) -> tuple[int, ...]:
    """The shape of the leading `batch_ndim` axes that all leaves share.

    Raises:
        ValueError: if a leaf has too few axes, or other leading axes than the first.
    """
    leaves = jtu.tree_leaves_with_path(tree)
    if not leaves:
        return ()
    shape = leaves[0][1].shape[:batch_ndim]
    for path, leaf in leaves:
        if len(leaf.shape) < batch_ndim or leaf.shape[:batch_ndim] != shape:
            raise ValueError(
                f"With `batch_ndim={batch_ndim}` the leading axes of every leaf index "
                f"independent problems, so that they must agree; the first leaf "
                f"has {shape}, the leaf `{jtu.keystr(path)}` has shape {leaf.shape}. "
                "Give every leaf the same leading axes, or lower `batch_ndim`."
            )
    return shape


def _reduce(x: Array, batch_ndim: int) -> Reals:
    return jnp.sum(x, axis=tuple(range(batch_ndim, x.ndim)))


def dot(x: PyTree, y: PyTree, batch_ndim: int = 0) -> Reals:
    """⟨x, y⟩ per problem, accumulated in at least float32."""

    def leaf(a: Array, b: Array) -> Reals:
        dtype = wide(a.dtype)
        return _reduce(a.astype(dtype) * b.astype(dtype), batch_ndim)

    return total(jtu.tree_leaves(jtu.tree_map(leaf, x, y)))


def norm(x: PyTree, batch_ndim: int = 0) -> Reals:
    """‖x‖₂ per problem. Not to be differentiated: its derivative at 0 is NaN."""
    return jnp.sqrt(dot(x, x, batch_ndim))


def size(x: PyTree, batch_ndim: int = 0) -> int:
    """The number of entries per problem."""
    return sum(math.prod(a.shape[batch_ndim:]) for a in jtu.tree_leaves(x))


def max_abs(x: PyTree, batch_ndim: int = 0) -> Reals:
    """max |x| per problem, 0 for empty leaves; NaN if an entry is NaN."""

    def leaf(a: Array) -> Reals:
        axes = tuple(range(batch_ndim, a.ndim))
        return jnp.max(jnp.abs(a), axis=axes, initial=0.0).astype(wide(a.dtype))

    return total([leaf(a) for a in jtu.tree_leaves(x)], jnp.maximum)


def all_finite(x: PyTree, batch_ndim: int = 0) -> Flags:
    """Whether every entry of a problem is finite."""

    def leaf(a: Array) -> Flags:
        return jnp.all(jnp.isfinite(a), axis=tuple(range(batch_ndim, a.ndim)))

    return total([leaf(a) for a in jtu.tree_leaves(x)], jnp.logical_and)


def expand(per_problem: Array, leaf: Array) -> Array:
    """Append axes to a per-problem array so that it broadcasts against `leaf`."""
    extra = leaf.ndim - per_problem.ndim
    return (
        per_problem
        if extra <= 0
        else per_problem.reshape(per_problem.shape + (1,) * extra)
    )


def where(mask: Flags, x: PyTree, y: PyTree) -> PyTree:
    """Per problem: `x` where `mask` holds, else `y`."""
    return jtu.tree_map(lambda a, b: jnp.where(expand(mask, a), a, b), x, y)


def scale(alpha: Reals, x: PyTree) -> PyTree:
    """α x per problem, in the dtype of x."""

    def leaf(a: Array) -> Array:
        dtype = wide(a.dtype)
        return (expand(alpha, a).astype(dtype) * a.astype(dtype)).astype(a.dtype)

    return jtu.tree_map(leaf, x)


def magnitude(x: PyTree, batch_ndim: int = 0) -> Reals:
    """A power of two per problem by which the largest |entry| is between 1 and 4.

    1 where the largest entry is 0 or not finite. Scaling by it and back loses no digit.
    Its reciprocal is a normal number: XLA flushes others to 0, and divides by them.
    """
    size = max_abs(x, batch_ndim)
    info = jnp.finfo(size.dtype)
    sound = (size >= info.tiny) & jnp.isfinite(size)
    exponent = jnp.frexp(jnp.where(sound, size, 2))[1] - 2
    return jnp.ldexp(jnp.ones_like(size), jnp.maximum(exponent, info.minexp))


def subtract(x: PyTree, y: PyTree) -> PyTree:
    """x − y, each leaf in at least float32."""

    def leaf(a: Array, b: Array) -> Array:
        dtype = wide(a.dtype)
        return a.astype(dtype) - b.astype(dtype)

    return jtu.tree_map(leaf, x, y)


def negative(x: PyTree) -> PyTree:
    """−x."""
    return jtu.tree_map(jnp.negative, x)


def zeros_like(x: PyTree) -> PyTree:
    """Zeros of the shapes and dtypes of `x` (arrays or `ShapeDtypeStruct`s)."""

    def leaf(a: Any) -> Array:
        if isinstance(a, jax.ShapeDtypeStruct):
            # On a mesh with explicit axes the sharding is part of the type.
            return lax.full(a.shape, 0, a.dtype, sharding=a.sharding)
        return jnp.zeros_like(a)

    return jtu.tree_map(leaf, x)


def zeros_for(x: Array, shape: tuple[int, ...], batch_ndim: int = 1) -> Array:
    """Zeros of `shape` for every problem of x, in its dtype, sharded like its batch."""
    # Made of x, not of its shape: on a mesh with explicit axes that gives the sharding.
    zero = _reduce(jnp.zeros_like(x), batch_ndim)
    for _ in shape:
        zero = jnp.expand_dims(zero, -1)
    return jnp.broadcast_to(zero, (*zero.shape[:batch_ndim], *shape))


def draw(sample: Callable, key: PRNGKeyArray, like: PyTree) -> PyTree:
    """Random numbers `sample(key, shape, dtype)` in the structure of `like`."""
    leaves, structure = jtu.tree_flatten(like)
    keys = jr.split(key, len(leaves))
    draws = [sample(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]
    return jtu.tree_unflatten(structure, draws)


def stack_of_zeros(row: PyTree, length: int, axis: int = 0) -> PyTree:
    """Zeros for `length` copies of `row` along a new axis, sharded as it is."""

    def leaf(a: Array) -> Array:
        shape = (*a.shape[:axis], length, *a.shape[axis:])
        return jnp.broadcast_to(jnp.expand_dims(jnp.zeros_like(a), axis), shape)

    return jtu.tree_map(leaf, row)


def varying(tree: PyTree, like: PyTree) -> PyTree:
    """The tree, varying over the axes of a `jax.shard_map` over which `like` does.

    Loops and branches want the same of all that goes in and comes out.
    """
    axes = frozenset().union(*map(varying_axes, jtu.tree_leaves(like)))

    def leaf(x: Any) -> Any:
        missing = tuple(axes - varying_axes(x)) if eqx.is_array(x) else ()
        return pvary(x, missing) if missing else x

    return jtu.tree_map(leaf, tree) if axes else tree  # the same object


# Rings: `length` vectors like x, behind the axes of the batch. A vector is one axis
# where it can be, since XLA then reads it in place for a matrix-vector product.


def _spread(a: Array, batch_ndim: int) -> bool:
    """Whether axes behind those of the batch are known to be sharded."""
    spec = getattr(jax.typeof(a).sharding, "spec", ())
    return any(axis is not None for axis in spec[batch_ndim:])


def fill(value: Array, like: Array) -> Array:
    """A number in every entry of an array that is sharded like another one."""
    if _spread(like, 0):
        return value + jnp.zeros_like(like)
    return jnp.broadcast_to(value, like.shape)


def _flat(a: Array, batch_ndim: int) -> Array:
    if a.ndim <= batch_ndim + 1 or a.size == 0 or _spread(a, batch_ndim):
        return a
    return a.reshape((*a.shape[:batch_ndim], -1))


def ring(x: PyTree, length: int, batch_ndim: int = 0) -> PyTree:
    """A ring of zeros for `length` vectors like x."""
    flat = jtu.tree_map(lambda a: _flat(a, batch_ndim), x)
    return stack_of_zeros(flat, length, batch_ndim)


def enter(
    rows: PyTree, x: PyTree, slot: Array, batch_ndim: int = 0, only: Any = None
) -> PyTree:
    """The ring with x in a slot, and 0 for what of it is not finite.

    The rings of problems that are not among `only` stay as they are.
    """

    def leaf(a: Array, b: Array) -> Array:
        b = _flat(b, batch_ndim).astype(a.dtype)
        b = jnp.where(jnp.isfinite(b), b, 0)
        if only is not None:
            old = lax.dynamic_index_in_dim(a, slot, batch_ndim, keepdims=False)
            b = jnp.where(expand(only, b), b, old)
        return lax.dynamic_update_index_in_dim(a, b, slot, batch_ndim)

    return jtu.tree_map(leaf, rows, x)


def dots(rows: PyTree, x: PyTree, batch_ndim: int = 0) -> Reals:
    """⟨rowᵢ, x⟩ per problem, (*batch, length), accumulated in at least float32."""
    batch = tuple(range(batch_ndim))

    def leaf(a: Array, b: Array) -> Reals:
        b = _flat(b, batch_ndim).astype(a.dtype)
        if _spread(b, batch_ndim):
            # On explicit axes a product may not sum over what is sharded.
            a, b = (x.astype(wide(x.dtype)) for x in (a, b))
            return _reduce(a * jnp.expand_dims(b, batch_ndim), batch_ndim + 1)
        inner = tuple(range(batch_ndim + 1, a.ndim)), tuple(range(batch_ndim, b.ndim))
        return lax.dot_general(
            a,
            b,
            (inner, (batch, batch)),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=wide(a.dtype),
        )

    return total(jtu.tree_leaves(jtu.tree_map(leaf, rows, x)))


def combine(weights: Reals, rows: PyTree, like: PyTree, batch_ndim: int = 0) -> PyTree:
    """Σᵢ weightsᵢ rowᵢ per problem, in the shapes of `like` and at least float32."""

    def leaf(a: Array, b: Array) -> Array:
        dtype = wide(a.dtype)
        # Term by term, so that it becomes one pass together with what it is added to.
        terms = [
            expand(weights[..., i].astype(dtype), row) * row.astype(dtype)
            for i in range(weights.shape[-1])
            for row in [lax.index_in_dim(a, i, batch_ndim, keepdims=False)]
        ]
        return ft.reduce(operator.add, terms).reshape(b.shape)

    return jtu.tree_map(leaf, rows, like)
