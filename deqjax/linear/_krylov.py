"""The restart cycles of GMRES, for independent systems in step with one another."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._types import Counts, Flags, Reals
from ._base import System

# A cycle that leaves more than this part of the residual has stagnated.
_STAGNATION = 0.999


class Krylov(eqx.Module):
    """One restart cycle: A V_j = V_{j+1} H_j, with Q_j H_j = R_j upper triangular.

    Attributes:
        index: products in this cycle so far; −1 before the residual of the start.
        basis: V, restart + 1 orthonormal vectors along the first axis of every leaf.
        rotations: Q, the product of all Givens rotations, (*batch, m+1, m+1).
        triangle: R, (*batch, m+1, m).
        size: ‖r₀‖ of the cycle.
        used: columns that count for each problem.
    """

    index: Array
    basis: PyTree
    rotations: Array
    triangle: Array
    size: Reals
    used: Counts


class Progress(eqx.Module):
    krylov: Krylov
    solution: PyTree
    residual: Reals
    before: Reals
    converged: Flags
    failed: Flags
    stuck: Flags
    products: Array


class Cycles(eqx.Module):
    """The steps of a cycle: open it, extend its basis, close it."""

    batch_ndim: int

    def begin(self, system: System, cycle: int) -> Progress:
        trivial, b, at_zero = system.trivial, system.b, system.at_zero
        shape = trivial.shape
        one = jnp.ones_like(_tree.norm(b, self.batch_ndim))
        dtype = one.dtype
        first = _tree.where(trivial, _tree.zeros_like(b), b)
        basis = _tree.stack_of_zeros(first, cycle + 1)
        if at_zero:
            # The residual of 0 is b: no product is needed to open the first cycle.
            basis = jtu.tree_map(lambda v, n: v.at[0].set(n), basis, first)
        eye = jnp.broadcast_to(
            jnp.eye(cycle + 1, dtype=dtype), (*shape, cycle + 1, cycle + 1)
        )
        krylov = Krylov(
            index=jnp.array(0 if at_zero else -1, jnp.int32),
            basis=basis,
            rotations=eye,
            triangle=jnp.zeros((*shape, cycle + 1, cycle), dtype),
            size=one,
            used=jnp.zeros_like(trivial, dtype=jnp.int32),
        )
        return Progress(
            krylov=krylov,
            solution=system.guess,
            residual=one,
            before=jnp.full_like(one, jnp.inf),
            converged=trivial & ~system.bad,
            failed=system.bad,
            stuck=jnp.zeros_like(trivial),
            products=jnp.array(0, jnp.int32),
        )

    def open(
        self, b: PyTree, tol: Reals, carry: Progress, image: PyTree
    ) -> tuple[Progress, PyTree]:
        """Begin a cycle from the residual b − A x."""
        residual = _tree.subtract(b, image)
        size = _tree.norm(residual, self.batch_ndim)
        pending = ~(carry.converged | carry.failed)
        finite = jnp.isfinite(size)
        # Only b, and what came before, say how far a cycle has got.
        done = pending & finite & (size <= tol)
        stuck = pending & finite & ~done & (size > _STAGNATION * carry.before)
        lost = stuck | (pending & ~finite)
        live = pending & ~done & ~lost
        first = _tree.scale(jnp.where(live, 1 / jnp.where(live, size, 1), 0), residual)
        first = _tree.where(live, first, _tree.zeros_like(first))
        krylov = carry.krylov
        eye = jnp.eye(krylov.rotations.shape[-1], dtype=krylov.rotations.dtype)
        krylov = Krylov(
            index=jnp.zeros_like(krylov.index),
            basis=krylov.basis,
            rotations=jnp.broadcast_to(eye, krylov.rotations.shape),
            triangle=jnp.zeros_like(krylov.triangle),
            size=jnp.where(live, size, krylov.size),
            used=jnp.zeros_like(krylov.used),
        )
        carry = Progress(
            krylov=krylov,
            solution=carry.solution,
            residual=jnp.where(pending & finite, size, carry.residual),
            before=jnp.where(live, size, carry.before),
            converged=carry.converged | done,
            failed=carry.failed | lost,
            stuck=carry.stuck | stuck,
            products=carry.products + 1,
        )
        return carry, first

    def extend(
        self, tol: Reals, carry: Progress, image: PyTree
    ) -> tuple[Progress, PyTree]:
        """Orthogonalise A v_j against the basis and rotate its column into R."""
        krylov, j = carry.krylov, carry.krylov.index
        pending = ~(carry.converged | carry.failed)
        column, rest = self._orthogonalise(krylov.basis, j, image)
        height = _tree.norm(rest, self.batch_ndim)
        scale = jnp.sqrt(jnp.sum(column * column, -1) + height * height)
        eps = jnp.finfo(height.dtype).eps
        height = jnp.where(height > 10 * eps * scale, height, 0)
        finite = jnp.isfinite(scale)

        # Rows 0 … j of Q h, then the rotation that clears row j + 1.
        rotated = jnp.einsum("...ij,...j->...i", krylov.rotations, column)
        upper = jnp.take(rotated, j, axis=-1)
        length = jnp.hypot(upper, height)
        # What cancellation leaves of a column that the others span is no pivot.
        length = jnp.where(length > 10 * eps * scale, length, 0)
        safe = jnp.where(length > 0, length, 1)
        c = jnp.where(length > 0, upper / safe, 1)[..., None]
        s = jnp.where(length > 0, height / safe, 0)[..., None]
        row, below = (jnp.take(krylov.rotations, i, axis=-2) for i in (j, j + 1))
        rotations = krylov.rotations.at[..., j, :].set(c * row + s * below)
        rotations = rotations.at[..., j + 1, :].set(c * below - s * row)
        rows = jnp.arange(rotated.shape[-1], dtype=j.dtype)
        new = jnp.where(rows < j, rotated, jnp.where(rows == j, length[..., None], 0))
        triangle = krylov.triangle.at[..., :, j].set(new)

        residual = krylov.size * jnp.abs(jnp.take(rotations, j + 1, axis=-2)[..., 0])
        done = pending & finite & (length > 0) & (residual <= tol)
        # A v_j lies in the span of the basis: no further vector, and if the residual
        # is not small, then A is singular on this space.
        broken = pending & finite & (height == 0) & ~done
        lost = broken | (pending & ~finite)
        live = pending & ~done & ~lost
        counts = pending & finite & (length > 0)
        vector = _tree.scale(
            jnp.where(live, 1 / jnp.where(height > 0, height, 1), 0), rest
        )
        vector = _tree.where(live, vector, _tree.zeros_like(vector))
        keep = _tree.expand(pending & finite, rotations)
        krylov = Krylov(
            index=j + 1,
            basis=krylov.basis,
            rotations=jnp.where(keep, rotations, krylov.rotations),
            triangle=jnp.where(keep, triangle, krylov.triangle),
            size=krylov.size,
            used=jnp.where(counts, j + 1, krylov.used),
        )
        carry = Progress(
            krylov=krylov,
            solution=carry.solution,
            residual=jnp.where(counts, residual, carry.residual),
            before=carry.before,
            converged=carry.converged | done,
            failed=carry.failed | lost,
            stuck=carry.stuck,
            products=carry.products + 1,
        )
        return carry, vector

    def _orthogonalise(
        self, basis: PyTree, j: Array, image: PyTree
    ) -> tuple[Array, PyTree]:
        """h = V* w and w − V h, twice; only about as many rows as there are vectors."""
        rows = jtu.tree_leaves(basis)[0].shape[0]
        widths = [w for w in (8, 16) if w < rows] + [rows]

        def project(width: int) -> tuple[Array, PyTree]:
            part = jtu.tree_map(lambda v: v[:width], basis)
            h, w = self._project(part, j, image)
            again, w = self._project(part, j, w)
            h = h + again
            return jnp.pad(h, [(0, 0)] * (h.ndim - 1) + [(0, rows - width)]), w

        if len(widths) == 1:
            return project(rows)
        bucket = sum((j >= w).astype(jnp.int32) for w in widths[:-1])
        return lax.switch(bucket, [ft.partial(project, w) for w in widths])

    def _project(self, basis: PyTree, j: Array, w: PyTree) -> tuple[Array, PyTree]:
        k = self.batch_ndim

        def coefficients(v: Array, x: Array) -> Array:
            # (rows, *batch, *rest) · (*batch, *rest) -> (*batch, rows)
            axes = list(range(x.ndim))
            return jnp.einsum(
                v, [x.ndim, *axes], x, axes, [*axes[:k], x.ndim], precision="highest"
            )

        def remove(v: Array, x: Array) -> Array:
            axes = list(range(x.ndim))
            c = h.astype(x.dtype)
            return x - jnp.einsum(
                v, [x.ndim, *axes], c, [*axes[:k], x.ndim], axes, precision="highest"
            )

        h = _tree.total(jtu.tree_leaves(jtu.tree_map(coefficients, basis, w)))
        # Later rows still hold what an earlier cycle has left there.
        h = jnp.where(jnp.arange(h.shape[-1], dtype=j.dtype) <= j, h, 0)
        return h, jtu.tree_map(remove, basis, w)

    def close(self, precondition: Any, carry: Progress) -> Progress:
        """End a cycle: x ← x + M V y with R y = Q ‖r₀‖ e₁."""
        krylov = carry.krylov
        size = krylov.triangle.shape[-1]
        column = jnp.arange(size, dtype=krylov.used.dtype)
        used = column < krylov.used[..., None]
        diagonal = jnp.eye(size, dtype=krylov.triangle.dtype)
        keep = used[..., None, :] & used[..., :, None]
        matrix = jnp.where(keep, krylov.triangle[..., :size, :], diagonal)
        rhs = jnp.where(used, krylov.rotations[..., :size, 0], 0)
        rhs = rhs * krylov.size[..., None]
        y = jax.scipy.linalg.solve_triangular(matrix, rhs[..., None])[..., 0]

        def combine(v: Array, x: Array) -> Array:
            axes = list(range(x.ndim))
            batch = axes[: self.batch_ndim]
            part = v[:size]
            return jnp.einsum(
                part,
                [x.ndim, *axes],
                y.astype(v.dtype),
                [*batch, x.ndim],
                axes,
                precision="highest",
            )

        step = precondition(jtu.tree_map(combine, krylov.basis, carry.solution))
        moved = krylov.used > 0
        solution = jtu.tree_map(
            lambda x, d: x + d.astype(x.dtype), carry.solution, step
        )
        solution = _tree.where(moved, solution, carry.solution)
        return eqx.tree_at(
            lambda c: (c.solution, c.krylov.index, c.krylov.used),
            carry,
            (solution, jnp.full_like(krylov.index, -1), jnp.zeros_like(krylov.used)),
        )
