"""Leading eigenvalues by the Krylov–Schur method, for a batch in lockstep.

The long vectors and the products with them stay on the device, in one compiled cycle.
The projected matrices, of a few dozen rows, are decomposed on the host in float64: XLA
has no nonsymmetric eigensolver on every platform, and no reordering of a Schur form.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import scipy.linalg
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree

from . import _state


class Leading(NamedTuple):
    """Eigenvalues of largest modulus, one row per problem; see `spectrum`."""

    values: np.ndarray
    residual: np.ndarray
    condition: np.ndarray
    converged: np.ndarray
    products: int


def leading(
    kind: str,
    fn: Callable,
    z: PyTree,
    args: PyTree,
    *,
    num: int,
    basis: int,
    rtol: float,
    max_restarts: int,
    key: PRNGKeyArray,
    batch_ndim: int,
) -> Leading:
    """The `num` eigenvalues of largest modulus of the operator named by `kind`."""
    pairs, basis_, products = _iterate(
        kind, fn, z, args, num, basis, rtol, max_restarts, key, batch_ndim
    )
    values: Any = np.stack([p.values for p in pairs])
    vectors: Any = np.stack([p.vectors for p in pairs])
    part = lambda x: jnp.asarray(x, basis_.dtype)
    residual, count = _measure(
        kind,
        fn,
        z,
        args,
        basis_,
        (part(vectors.real), part(vectors.imag)),
        (part(values.real), part(values.imag)),
        batch_ndim,
    )
    residual = np.asarray(residual, np.float64)
    scale = np.stack([p.scale for p in pairs])
    return Leading(
        values=values,
        residual=residual,
        condition=np.stack([p.condition for p in pairs]),
        # Comparisons with NaN are false.
        converged=residual <= rtol * scale,
        products=products + int(count),
    )


def extreme(
    kind: str,
    fn: Callable,
    z: PyTree,
    args: PyTree,
    *,
    basis: int,
    rtol: float,
    max_restarts: int,
    key: PRNGKeyArray,
    batch_ndim: int,
) -> tuple[Array, int]:
    """The leading eigenvector of a symmetric operator per problem, and the products.

    What it is worth is left to be measured by the caller.
    """
    pairs, basis_, products = _iterate(
        kind, fn, z, args, 1, basis, rtol, max_restarts, key, batch_ndim
    )
    weights = np.stack([p.vectors[0].real for p in pairs])
    return _combine(jnp.asarray(weights, basis_.dtype), basis_[:, :-1]), products


def _iterate(
    kind: str,
    fn: Callable,
    z: PyTree,
    args: PyTree,
    num: int,
    basis: int,
    rtol: float,
    max_restarts: int,
    key: PRNGKeyArray,
    batch_ndim: int,
) -> tuple[list[Any], Array, int]:
    """The Ritz pairs of every problem, the basis they refer to, and the products."""
    rows = _state.flatten(z, batch_ndim)
    problems, n = rows.shape
    num = min(num, n)
    m = min(n, max(basis, num + 3))
    start = jr.normal(key, rows.shape, rows.dtype)
    start = start / jnp.linalg.norm(start, axis=1, keepdims=True)
    basis_ = jnp.zeros((problems, m + 1, n), rows.dtype).at[:, 0].set(start)
    matrix = np.zeros((problems, m + 1, m))
    index = np.zeros(problems, np.int32)
    products, cycle = 0, 0
    while True:
        basis_, device_matrix, count = _extend(
            kind,
            fn,
            z,
            args,
            basis_,
            jnp.asarray(matrix, rows.dtype),
            jnp.asarray(index),
            jr.fold_in(key, cycle),
            batch_ndim,
        )
        products = products + int(count)
        matrix = np.array(device_matrix, np.float64)
        pairs = [_ritz(h, num) for h in matrix]
        # The recurrence has to do better than what the products are measured against.
        pending = [not np.all(p.residual <= 0.5 * rtol * p.scale) for p in pairs]
        pending = [a and p.finite for a, p in zip(pending, pairs, strict=True)]
        cycle += 1
        if m == n or cycle > max_restarts or not any(pending):
            break
        rotation = np.broadcast_to(np.eye(m + 1), (problems, m + 1, m + 1)).copy()
        index = np.full(problems, m, np.int32)
        for i in range(problems):
            if pending[i]:
                index[i], matrix[i], rotation[i] = _restart(matrix[i], num)
        basis_ = _rotate(jnp.asarray(rotation, rows.dtype), basis_)
    return pairs, basis_, products


class _Pairs(NamedTuple):
    values: np.ndarray
    vectors: np.ndarray
    residual: np.ndarray
    condition: np.ndarray
    scale: np.ndarray
    finite: bool


def _ritz(matrix: np.ndarray, num: int) -> _Pairs:
    """The leading Ritz pairs of A V = V S + v bᵀ; their residuals are |bᵀ y|."""
    square, last = matrix[:-1], matrix[-1]
    if not np.all(np.isfinite(matrix)):
        nan = np.full(num, np.nan)
        vectors = np.full((num, len(square)), np.nan, np.complex128)
        return _Pairs(nan.astype(np.complex128), vectors, nan, nan, nan, False)
    # Its stubs do not know how many outputs these options give.
    decomposition: Any = scipy.linalg.eig(square, left=True, right=True)
    values, left, right = decomposition
    # Of a complex pair the one in the upper half plane comes first.
    sizes = np.abs(values)
    sizes = np.round(sizes / max(np.max(sizes), np.finfo(np.float64).tiny), 12)
    order = np.lexsort((-values.imag, -sizes))[:num]
    values, left, right = values[order], left[:, order], right[:, order]
    cosine = np.abs(np.sum(left.conj() * right, axis=0))
    size = np.linalg.norm(square, 2)
    # An eigenvalue that vanishes beside ‖S‖ is known to rounding errors of ‖S‖ alone.
    floor = np.finfo(np.float32).eps ** (2 / 3) * size
    return _Pairs(
        values=values,
        vectors=right.T,
        residual=np.abs(last @ right),
        condition=1 / np.maximum(cosine, np.finfo(np.float64).tiny),
        scale=np.maximum(np.abs(values), floor),
        finite=True,
    )


def _restart(matrix: np.ndarray, num: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Keep a leading invariant subspace of S, in a real Schur form."""
    square, last = matrix[:-1], matrix[-1]
    m = len(square)
    decomposition: Any = scipy.linalg.schur(square, output="real")
    upper, vectors = decomposition
    sizes = _squares(upper)
    keep = min(num + max((m - num) // 2, 1), m - 2)
    select = np.zeros(m, np.int32)
    select[np.argsort(-sizes, kind="stable")[:keep]] = 1
    upper, vectors, *_, kept, _, _, info = _reorder(select, upper, vectors)
    if info != 0:
        raise RuntimeError("LAPACK could not reorder a Schur form; pass another `key`.")
    new = np.zeros_like(matrix)
    new[:kept, :kept] = upper[:kept, :kept]
    new[kept, :kept] = last @ vectors[:, :kept]
    rotation = np.zeros((m + 1, m + 1))
    rotation[:kept, :m] = vectors[:, :kept].T
    rotation[kept, m] = 1
    return kept, new, rotation


def _reorder(select: np.ndarray, upper: np.ndarray, vectors: np.ndarray) -> Any:
    (trsen,) = scipy.linalg.get_lapack_funcs(("trsen",), (upper,))
    return trsen(select, upper, vectors, job="N", wantq=1)


def _squares(upper: np.ndarray) -> np.ndarray:
    """|λ|² on the diagonal of a real Schur form."""
    diagonal = np.diagonal(upper) ** 2
    out = diagonal.copy()
    for i in np.flatnonzero(np.diagonal(upper, -1)):
        # A complex pair: |λ|² is the determinant of its block.
        block = upper[i : i + 2, i : i + 2]
        out[i : i + 2] = np.linalg.det(block)
    return out


_HIGHEST = lax.Precision.HIGHEST


@eqx.filter_jit
def _rotate(rotation: Array, basis: Array) -> Array:
    return jnp.einsum("bij,bjn->bin", rotation, basis, precision=_HIGHEST)


@eqx.filter_jit
def _combine(weights: Array, basis: Array) -> Array:
    return jnp.einsum("bm,bmn->bn", weights, basis, precision=_HIGHEST)


@eqx.filter_jit
def _extend(
    kind: str,
    fn: Callable,
    z: PyTree,
    args: PyTree,
    basis: Array,
    matrix: Array,
    index: Array,
    key: PRNGKeyArray,
    batch_ndim: int,
) -> tuple[Array, Array, Array]:
    """Arnoldi steps until every problem has all its vectors."""
    apply = _state.product(kind, fn, z, args, batch_ndim)
    m, n = matrix.shape[-1], basis.shape[-1]
    eps = jnp.finfo(basis.dtype).eps

    def add(
        basis: Array, matrix: Array, j: Array, w: Array, noise: Array
    ) -> tuple[Array, Array, Array]:
        used = jnp.arange(m + 1, dtype=j.dtype) <= j

        def project(w: Array) -> tuple[Array, Array]:
            h = jnp.where(used, jnp.matmul(basis, w, precision=_HIGHEST), 0)
            return h, w - jnp.matmul(h, basis, precision=_HIGHEST)

        first, rest = project(w)
        second, rest = project(rest)
        height, size = jnp.linalg.norm(rest), jnp.linalg.norm(w)
        # The space is invariant: go on with any vector outside of it.
        broken = height <= 10 * eps * size
        other = project(project(noise)[1])[1]
        new = jnp.where(broken, other, rest)
        length = jnp.linalg.norm(new)
        new = new / jnp.where(length > 0, length, 1)
        column = (first + second).at[j + 1].set(jnp.where(broken, 0, height))
        go_on = j < m
        return (
            jnp.where(go_on, basis.at[j + 1].set(new), basis),
            jnp.where(go_on, matrix.at[:, j].set(column), matrix),
            jnp.where(go_on, j + 1, j),
        )

    def body(carry: Any) -> Any:
        basis, matrix, index, count, step = carry
        newest = jnp.take_along_axis(basis, index[:, None, None], axis=1)[:, 0]
        w, products = apply(newest)
        noise = jr.normal(jr.fold_in(key, step), (n,), basis.dtype)
        basis, matrix, index = jax.vmap(add, in_axes=(0, 0, 0, 0, None))(
            basis, matrix, index, w, noise
        )
        return basis, matrix, index, count + products.astype(count.dtype), step + 1

    zero = jnp.array(0, jnp.int32)
    carry = (basis, matrix, index, zero, zero)
    out = lax.while_loop(lambda c: jnp.any(c[2] < m), body, carry)
    return out[0], out[1], out[3]


@eqx.filter_jit
def _measure(
    kind: str,
    fn: Callable,
    z: PyTree,
    args: PyTree,
    basis: Array,
    vectors: tuple[Array, Array],
    values: tuple[Array, Array],
    batch_ndim: int,
) -> tuple[Array, Array]:
    """‖A x − θ x‖ / ‖x‖ by two real products for every pair."""
    apply = _state.product(kind, fn, z, args, batch_ndim)

    def one(carry: Array, pair: Any) -> tuple[Array, Array]:
        (y, iy), (a, b) = pair
        x, ix = _combine(y, basis[:, :-1]), _combine(iy, basis[:, :-1])
        a, b = a[:, None], b[:, None]
        (real, first), (imag, second) = apply(x), apply(ix)
        real, imag = real - (a * x - b * ix), imag - (a * ix + b * x)
        norm = lambda u, v: jnp.sqrt(jnp.sum(u * u + v * v, axis=1))
        count = carry + (first + second).astype(carry.dtype)
        return count, norm(real, imag) / norm(x, ix)

    swap = lambda tree: jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tree)
    count, residual = lax.scan(
        one, jnp.array(0, jnp.int32), (swap(vectors), swap(values))
    )
    return jnp.swapaxes(residual, 0, 1), count
