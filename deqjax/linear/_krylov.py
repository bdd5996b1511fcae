"""The restart cycles of GMRES, for independent systems in step with one another."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .. import _tree
from .._types import Counts, Flags, Reals
from ._base import System
from ._basis import Rings, combine, write, zeros

# A cycle that leaves more than this part of the residual has stagnated.
_STAGNATION = 0.999
# An x whose image has rounding errors of more than this part of b solves nothing.
_LOST = 0.1


class Krylov(eqx.Module):
    """One restart cycle: A V_j = V_{j+1} H_j, with Q_j H_j = R_j upper triangular.

    V, `restart` orthonormal vectors, is kept apart: what a `lax.cond` returns, XLA
    copies. The last vector of V_{m+1} needs no room, since no product is made of it.

    Attributes:
        index: products in this cycle so far; −1 before the residual of the start.
        rotations: Q, the product of all Givens rotations, (*batch, m+1, m+1).
        triangle: R, (*batch, m+1, m).
        size: ‖r₀‖ of the cycle.
        used: columns that count for each problem.
    """

    index: Array
    rotations: Array
    triangle: Array
    size: Reals
    used: Counts


class Progress(eqx.Module):
    krylov: Krylov
    residual: Reals
    before: Reals
    converged: Flags
    failed: Flags
    stuck: Flags
    products: Array


class Cycles(eqx.Module):
    """The steps of a cycle: open it, extend its basis, close it."""

    batch_ndim: int

    def begin(self, system: System, cycle: int) -> tuple[Progress, Rings]:
        trivial, b, at_zero = system.trivial, system.b, system.at_zero
        shape = trivial.shape
        one = jnp.ones_like(_tree.norm(b, self.batch_ndim))
        dtype = one.dtype
        first = _tree.where(trivial, _tree.zeros_like(b), b)
        basis = zeros(first, cycle, self.batch_ndim)
        if at_zero:
            # The residual of 0 is b: no product is needed to open the first cycle.
            basis = write(basis, jnp.array(0, jnp.int32), first, self.batch_ndim)
        eye = jnp.broadcast_to(
            jnp.eye(cycle + 1, dtype=dtype), (*shape, cycle + 1, cycle + 1)
        )
        krylov = Krylov(
            index=jnp.array(0 if at_zero else -1, jnp.int32),
            rotations=eye,
            triangle=jnp.zeros((*shape, cycle + 1, cycle), dtype),
            size=one,
            used=jnp.zeros_like(trivial, dtype=jnp.int32),
        )
        progress = Progress(
            krylov=krylov,
            residual=one,
            before=jnp.full_like(one, jnp.inf),
            converged=trivial & ~system.bad,
            failed=system.bad,
            stuck=jnp.zeros_like(trivial),
            products=jnp.array(0, jnp.int32),
        )
        return progress, basis

    def open(
        self, tol: Reals, carry: Progress, column: Array, size: Reals
    ) -> tuple[Progress, Reals]:
        """Begin a cycle from a residual of that size; the factor that makes it 1."""
        pending = ~(carry.converged | carry.failed)
        finite = jnp.isfinite(size)
        # Only b, and what came before, say how far a cycle has got.
        done = pending & finite & (size <= tol)
        stuck = pending & finite & ~done & (size > _STAGNATION * carry.before)
        lost = stuck | (pending & ~finite)
        live = pending & ~done & ~lost
        krylov = carry.krylov
        eye = jnp.eye(krylov.rotations.shape[-1], dtype=krylov.rotations.dtype)
        krylov = Krylov(
            index=jnp.zeros_like(krylov.index),
            rotations=jnp.broadcast_to(eye, krylov.rotations.shape),
            triangle=jnp.zeros_like(krylov.triangle),
            size=jnp.where(live, size, krylov.size),
            used=jnp.zeros_like(krylov.used),
        )
        carry = Progress(
            krylov=krylov,
            residual=jnp.where(pending & finite, size, carry.residual),
            before=jnp.where(live, size, carry.before),
            converged=carry.converged | done,
            failed=carry.failed | lost,
            stuck=carry.stuck | stuck,
            products=carry.products + 1,
        )
        return carry, jnp.where(live, 1 / jnp.where(live, size, 1), 0)

    def extend(
        self, tol: Reals, carry: Progress, column: Array, height: Reals
    ) -> tuple[Progress, Reals]:
        """Rotate the column of A v_j into R; the factor that what remains takes."""
        krylov, j = carry.krylov, carry.krylov.index
        pending = ~(carry.converged | carry.failed)
        scale = jnp.sqrt(jnp.sum(column * column, -1) + height * height)
        eps = jnp.finfo(height.dtype).eps
        height = jnp.where(height > 10 * eps * scale, height, 0)
        finite = jnp.isfinite(scale)

        # Rows 0 … j of Q h, then the rotation that clears row j + 1.
        width = column.shape[-1]
        rotated = jnp.einsum("...ij,...j->...i", krylov.rotations[..., :width], column)
        upper = jnp.take(rotated, j, axis=-1)
        length = jnp.hypot(upper, height)
        # What cancellation leaves of a column that the others span is no pivot.
        length = jnp.where(length > 10 * eps * scale, length, 0)
        safe = jnp.where(length > 0, length, 1)
        c = jnp.where(length > 0, upper / safe, 1)[..., None]
        s = jnp.where(length > 0, height / safe, 0)[..., None]
        row, below = (jnp.take(krylov.rotations, i, axis=-2) for i in (j, j + 1))
        upper_row = c * row + s * below
        rotations = krylov.rotations.at[..., j, :].set(upper_row)
        rotations = rotations.at[..., j + 1, :].set(c * below - s * row)
        rows = jnp.arange(rotated.shape[-1], dtype=j.dtype)
        new = jnp.where(rows < j, rotated, jnp.where(rows == j, length[..., None], 0))
        triangle = krylov.triangle.at[..., :, j].set(new)

        residual = krylov.size * jnp.abs(jnp.take(rotations, j + 1, axis=-2)[..., 0])
        # Nearly singular: the residual is small on paper, for an x that is too large.
        weight = krylov.size * jnp.abs(upper_row[..., 0])
        useless = eps * scale * weight > _LOST * length
        done = pending & finite & ~useless & (residual <= tol)
        # A v_j lies in the span of the basis: no further vector, and if the residual
        # is not small, then A is singular on this space.
        broken = pending & finite & (useless | (height == 0)) & ~done
        lost = broken | (pending & ~finite)
        live = pending & ~done & ~lost
        counts = pending & finite & ~useless & (length > 0)
        keep = _tree.expand(pending & finite, rotations)
        krylov = Krylov(
            index=j + 1,
            rotations=jnp.where(keep, rotations, krylov.rotations),
            triangle=jnp.where(keep, triangle, krylov.triangle),
            size=krylov.size,
            used=jnp.where(counts, j + 1, krylov.used),
        )
        carry = Progress(
            krylov=krylov,
            residual=jnp.where(counts, residual, carry.residual),
            before=carry.before,
            converged=carry.converged | done,
            failed=carry.failed | lost,
            stuck=carry.stuck,
            products=carry.products + 1,
        )
        return carry, jnp.where(live, 1 / jnp.where(height > 0, height, 1), 0)

    def close(
        self,
        precondition: Any,
        tol: Reals,
        carry: Progress,
        solution: PyTree,
        basis: Rings,
    ) -> tuple[Progress, PyTree]:
        """End a cycle: x ← x + M V y with R y = Q ‖r₀‖ e₁.

        Where the rounding errors of A V y may exceed the tolerance, the residual by
        recurrence does not count: another cycle begins with the true one.
        """
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
        columns = jnp.sum(jnp.where(keep, matrix, 0) ** 2, -2)
        error = jnp.sqrt(jnp.max(columns, -1) * jnp.sum(y * y, -1))
        error = jnp.finfo(y.dtype).eps * error
        doubtful = error > tol

        step = precondition(combine(basis, y, solution, self.batch_ndim))
        moved = krylov.used > 0
        new = jtu.tree_map(lambda x, d: x + d.astype(x.dtype), solution, step)
        solution = _tree.where(moved, new, solution)
        residual = jnp.where(
            moved & doubtful, jnp.maximum(carry.residual, error), carry.residual
        )
        carry = eqx.tree_at(
            lambda c: (c.residual, c.converged, c.krylov.index, c.krylov.used),
            carry,
            (
                residual,
                carry.converged & ~(moved & doubtful),
                jnp.full_like(krylov.index, -1),
                jnp.zeros_like(krylov.used),
            ),
        )
        return carry, solution
