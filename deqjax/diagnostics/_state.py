"""States as matrices (problems, entries), and products with Jacobians of such."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from .. import _tree
from .._checks import check_count
from .._fold import fold
from ..linear import GMRES

Rows = Float[Array, "problems entries"]
Product = Callable[[Rows], Rows]


def canonical_state(
    fn: Any, z: PyTree, args: PyTree, batch_ndim: int, name: str = "z"
) -> PyTree:
    """The state as arrays.

    Raises:
        ValueError, TypeError: unless fn maps states like it to such, outside of `jit`.
    """
    if not callable(fn):
        raise TypeError(f"`fn` must be callable; got {type(fn).__name__}.")
    check_count("batch_ndim", batch_ndim, 0)
    for leaf in jtu.tree_leaves((fn, z, args)):
        if isinstance(leaf, Tracer):
            raise TypeError(
                "A report needs numbers, but an array is being traced. Call it outside "
                "of `jax.jit`, `jax.vmap` and `jax.grad`: it compiles what is heavy."
            )

    def canonical(path: Any, leaf: Any) -> Array:
        where = f"`{name}{jtu.keystr(path)}`"
        try:
            dtype = jnp.result_type(leaf)
        except TypeError as error:
            raise TypeError(
                f"{where} must be an array; got {type(leaf).__name__}."
            ) from error
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{where} must be real and floating-point; got {dtype}. Cast it, or "
                "split a complex state into real and imaginary parts."
            )
        return jnp.asarray(leaf, dtype=dtype)

    z = jtu.tree_map_with_path(canonical, z)
    if not jtu.tree_leaves(z) or _tree.size(z, batch_ndim) == 0:
        raise ValueError(f"`{name}` must have entries; got {z!r}.")
    _tree.batch_shape(z, batch_ndim)
    facts = lambda tree: jtu.tree_map(lambda a: (a.shape, str(a.dtype)), tree)
    want = facts(jax.eval_shape(lambda: z))
    got = facts(jax.eval_shape(lambda z: fn(z, args), z))
    if want != got:
        raise ValueError(
            f"`fn` must return states like `{name}`, {want}; it returned {got}."
        )
    return z


def batch_of(z: PyTree, batch_ndim: int) -> tuple[int, ...]:
    """The shape of a report's entries."""
    return _tree.batch_shape(z, batch_ndim)


def flatten(z: PyTree, batch_ndim: int) -> Rows:
    """One row per problem, in at least float32."""
    problems = math.prod(_tree.batch_shape(z, batch_ndim))
    dtype = max(
        (_tree.wide(a.dtype) for a in jtu.tree_leaves(z)), key=lambda d: d.itemsize
    )
    rows = [
        a.reshape(problems, math.prod(a.shape[batch_ndim:])).astype(dtype)
        for a in jtu.tree_leaves(z)
    ]
    return jnp.concatenate(rows, axis=1)


def unflatten(rows: Rows, like: PyTree, batch_ndim: int) -> PyTree:
    """The state of these rows, in the shapes and dtypes of `like`."""
    leaves, structure = jtu.tree_flatten(like)
    out, start = [], 0
    for a in leaves:
        stop = start + math.prod(a.shape[batch_ndim:])
        out.append(rows[:, start:stop].reshape(a.shape).astype(a.dtype))
        start = stop
    return jtu.tree_unflatten(structure, out)


def jacobian(
    fn: Callable, z: PyTree, args: PyTree, batch_ndim: int
) -> tuple[Product, Product]:
    """v ↦ J v and u ↦ Jᵀ u on rows, J = ∂f/∂z. fn is evaluated once."""
    rows, f = as_rows(fn, z, args, batch_ndim)
    push = jax.linearize(f, rows)[1]
    back = jax.linear_transpose(push, rows)
    return push, lambda u: back(u)[0]


def as_rows(
    fn: Callable, z: PyTree, args: PyTree, batch_ndim: int
) -> tuple[Rows, Product]:
    """The state and the map on rows."""
    rest, kept, _ = fold(fn, z, args)
    f = lambda rows: flatten(rest(unflatten(rows, z, batch_ndim), kept), batch_ndim)
    return flatten(z, batch_ndim), f


def product(
    kind: str, fn: Callable, z: PyTree, args: PyTree, batch_ndim: int
) -> Callable[[Rows], tuple[Rows, Array]]:
    """A linear map on rows, made of J = ∂f/∂z, with its number of Jacobian products.

    Args:
        kind: "jvp" J; "vjp" Jᵀ; "gram" JᵀJ; "shifted" (I − J)ᵀ(I − J); "inverse" its
            inverse, by GMRES.
        fn: the map.
        z: where it is linearised.
        args: passed to fn.
        batch_ndim: leading axes that index independent problems.

    Returns:
        v ↦ (A v, products), products being an integer array.
    """
    if kind == "vjp":
        # By reverse mode, for functions that have a rule for it alone.
        rows, f = as_rows(fn, z, args, batch_ndim)
        back = jax.vjp(f, rows)[1]
        return lambda v: (back(v)[0], jnp.array(1))
    push, pull = jacobian(fn, z, args, batch_ndim)
    if kind == "jvp":
        return lambda v: (push(v), jnp.array(1))
    if kind == "gram":
        return lambda v: (pull(push(v)), jnp.array(2))
    forward, backward = (lambda v: v - push(v)), (lambda v: v - pull(v))
    if kind == "shifted":
        return lambda v: (backward(forward(v)), jnp.array(2))

    struct = jax.eval_shape(lambda: flatten(z, batch_ndim))
    rtol = max(20 * float(jnp.finfo(struct.dtype).eps), 1e-10)
    solver = GMRES(rtol=rtol, batch_ndim=1, max_steps=400)

    def solve(v: Rows, transposed: Array) -> tuple[Rows, Array]:
        matrix = lambda v: lax.cond(transposed, backward, forward, v)
        operator = lx.FunctionLinearOperator(matrix, struct)
        sol = lx.linear_solve(operator, v, solver, throw=False)
        return sol.value, sol.stats["num_products"]

    def inverse(v: Rows) -> tuple[Rows, Array]:
        # A loop of two steps, so that GMRES is compiled once.
        out, counts = lax.scan(solve, v, jnp.array([True, False]))
        return out, jnp.sum(counts)

    return inverse


def to_batch(rows: Any, batch: tuple[int, ...], dtype: Any = None) -> Array:
    """An array of one entry, or row, per problem in the shape of the batch."""
    rows = np.asarray(rows)
    out = rows.reshape((*batch, *rows.shape[1:]))
    return jnp.asarray(out if dtype is None else out.astype(dtype))
