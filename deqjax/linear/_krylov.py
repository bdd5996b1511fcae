"""The restart cycles of GMRES, for independent systems in step with one another."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._types import Counts, Flags, Reals
from ._base import System
from ._basis import Rings, combine, write, zeros

# A cycle that leaves more than this part of the residual has stagnated; one that was
# in doubt, since what is left after it is made of rounding errors.
_STAGNATION, _DOUBTFUL_STAGNATION = 0.999, 0.5
# An x whose image has rounding errors of more than this part of b, or of what is left
# of it, is not believed.
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
        fresh: whether it starts from 0, and not from the solution so far.
    """

    index: Array
    rotations: Array
    triangle: Array
    size: Reals
    used: Counts
    fresh: Flags


class Progress(eqx.Module):
    """What is known after a number of products.

    Attributes:
        residual: ‖b − A x‖ of the x that would be returned.
        before: ‖r₀‖ of the last cycle.
        gain: the largest ‖A v‖ seen for a v of norm 1.
        doubtful: rounding errors of the last cycle may exceed what it left, or it has
            claimed to converge.
        exact: those are of the arithmetic here, not of the operator's own.
        moved: x is not the one whose residual was measured last.
        broken: the last cycle broke down; nothing follows its measurement.
        products: made so far.
    """

    krylov: Krylov
    residual: Reals
    before: Reals
    gain: Reals
    doubtful: Flags
    exact: Flags
    moved: Flags
    broken: Flags
    converged: Flags
    failed: Flags
    stuck: Flags
    products: Array


class Cycles(eqx.Module):
    """The steps of a cycle: open it, extend its basis, close it."""

    batch_ndim: int

    @_tree.lenient
    def begin(self, system: System, cycle: int) -> tuple[Progress, Rings]:
        trivial, b, at_zero = system.trivial, system.b, system.at_zero
        first = _tree.scale(1 / system.size, b)
        basis = zeros(first, cycle, self.batch_ndim)
        if at_zero:
            # The residual of 0 is b: no product is needed to open the first cycle.
            basis = write(basis, jnp.array(0, jnp.int32), first, self.batch_ndim)
        eye = _identity(system.size, cycle + 1)
        krylov = Krylov(
            index=jnp.array(0 if at_zero else -1, jnp.int32),
            rotations=eye,
            triangle=jnp.zeros_like(eye[..., :-1]),
            size=system.size,
            used=jnp.zeros_like(trivial, dtype=jnp.int32),
            fresh=jnp.zeros_like(trivial),
        )
        progress = Progress(
            krylov=krylov,
            residual=system.size,
            before=jnp.full_like(system.size, jnp.inf),
            gain=jnp.zeros_like(system.size),
            doubtful=jnp.zeros_like(trivial),
            exact=jnp.zeros_like(trivial),
            moved=jnp.zeros_like(trivial),
            broken=jnp.zeros_like(trivial),
            converged=trivial & ~system.bad,
            failed=system.bad,
            stuck=jnp.zeros_like(trivial),
            products=jnp.array(0, jnp.int32),
        )
        return progress, basis

    @_tree.lenient
    def open(
        self, system: System, carry: Progress, column: Array, size: Reals
    ) -> tuple[Progress, Reals]:
        """Begin a cycle from a residual of that size; the factor that makes it 1.

        An x with ‖b − A x‖ > ‖b‖, or not finite, is worse than 0, and given up for it:
        the very start to go on from there, a later x as a failure. What had converged
        is measured again: unless systems leak into one another, its residual has
        changed by rounding errors alone.
        """
        kept = carry.converged & (size <= 2 * system.tol)
        # There is nothing to iterate on where b is 0.
        leaky = carry.converged & ~kept & system.trivial
        pending = ~(kept | carry.failed | leaky)
        worse = pending & ~(size <= system.size)
        finite = jnp.isfinite(size)
        size = jnp.where(worse, system.size, size)
        # Only b, and what came before, say how far a cycle has got.
        done = pending & (size <= system.tol)
        least = jnp.where(carry.doubtful, _DOUBTFUL_STAGNATION, _STAGNATION)
        stuck = pending & finite & ~done & (size > least * carry.before)
        lost = stuck | (worse & ~done & (carry.products > 0))
        lost = lost | (pending & carry.broken & ~done) | leaky
        live = pending & ~done & ~lost
        krylov = carry.krylov
        krylov = Krylov(
            index=jnp.zeros_like(krylov.index),
            rotations=_identity(carry.residual, krylov.rotations.shape[-1]),
            triangle=jnp.zeros_like(krylov.triangle),
            size=jnp.where(live, size, krylov.size),
            used=jnp.zeros_like(krylov.used),
            fresh=worse,
        )
        carry = Progress(
            krylov=krylov,
            residual=jnp.where(pending | leaky, size, carry.residual),
            before=jnp.where(live, size, carry.before),
            gain=carry.gain,
            doubtful=carry.doubtful & ~pending,
            exact=carry.exact,
            moved=jnp.zeros_like(carry.moved),
            broken=jnp.zeros_like(carry.broken),
            converged=kept | done,
            failed=carry.failed | lost,
            stuck=carry.stuck | stuck,
            products=carry.products + 1,
        )
        return carry, jnp.where(live, 1 / jnp.where(live, size, 1), 0)

    @_tree.lenient
    def extend(
        self, system: System, carry: Progress, column: Array, height: Reals
    ) -> tuple[Progress, Reals]:
        """Rotate the column of A v_j into R; the factor that what remains takes."""
        krylov, j = carry.krylov, carry.krylov.index
        pending = ~(carry.converged | carry.failed)
        scale = jnp.sqrt(jnp.sum(column * column, -1) + height * height)
        eps = jnp.finfo(height.dtype).eps
        height = jnp.where(height > 10 * eps * scale, height, 0)
        finite = jnp.isfinite(scale)
        gain = jnp.where(pending & finite, jnp.maximum(carry.gain, scale), carry.gain)

        # Rows 0 … j of Q h, then the rotation that clears row j + 1.
        width = column.shape[-1]
        rotated = jnp.einsum(
            "...ij,...j->...i",
            krylov.rotations[..., :width],
            column,
            precision=lax.Precision.HIGHEST,
        )
        upper = _entry(rotated, j, -1)
        length = jnp.hypot(upper, height)
        # What cancellation leaves of a column that the others span is no pivot.
        length = jnp.where(length > 10 * eps * scale, length, 0)
        safe = jnp.where(length > 0, length, 1)
        c = jnp.where(length > 0, upper / safe, 1)[..., None]
        s = jnp.where(length > 0, height / safe, 0)[..., None]
        row, below = (_entry(krylov.rotations, i, -2) for i in (j, j + 1))
        upper_row, lower_row = c * row + s * below, c * below - s * row
        rows = jnp.arange(rotated.shape[-1], dtype=j.dtype)
        new = jnp.where(rows < j, rotated, jnp.where(rows == j, length[..., None], 0))
        # Selections, since a scatter takes XLA long to compile.
        at = rows[:, None]
        rotations = jnp.where(
            at == j,
            upper_row[..., None, :],
            jnp.where(at == j + 1, lower_row[..., None, :], krylov.rotations),
        )
        triangle = jnp.where(rows[:-1] == j, new[..., None], krylov.triangle)

        residual = krylov.size * jnp.abs(lower_row[..., 0])
        # Singular: nothing new to combine. Nearly so: the residual is small on paper,
        # for an x that is too large.
        weight = krylov.size * jnp.abs(upper_row[..., 0])
        swamped = system.eps * gain * weight > _LOST * system.size * length
        useless = (length == 0) | swamped
        done = pending & finite & ~useless & (residual <= system.tol)
        # A v_j lies in the span of the basis: no further vector, and if the residual
        # is not small, then A is singular on this space.
        broken = pending & finite & (useless | (height == 0)) & ~done
        lost = broken | (pending & ~finite)
        live = pending & ~done & ~lost
        counts = pending & finite & ~useless
        keep = _tree.expand(pending & finite, rotations)
        krylov = Krylov(
            index=j + 1,
            rotations=jnp.where(keep, rotations, krylov.rotations),
            triangle=jnp.where(keep, triangle, krylov.triangle),
            size=krylov.size,
            used=jnp.where(counts, j + 1, krylov.used),
            fresh=krylov.fresh,
        )
        carry = Progress(
            krylov=krylov,
            residual=jnp.where(counts, residual, carry.residual),
            before=carry.before,
            gain=gain,
            doubtful=carry.doubtful,
            exact=carry.exact,
            moved=carry.moved,
            broken=carry.broken,
            converged=carry.converged | done,
            failed=carry.failed | lost,
            stuck=carry.stuck,
            products=carry.products + 1,
        )
        return carry, jnp.where(live, 1 / jnp.where(height > 0, height, 1), 0)

    @_tree.lenient
    def close(
        self,
        system: System,
        carry: Progress,
        solution: PyTree,
        basis: Rings,
    ) -> tuple[Progress, PyTree]:
        """End a cycle: x ← x + M V y with R y = Q ‖r₀‖ e₁.

        What the recurrence says does not count as convergence: another cycle begins,
        with the true residual. (If only a residual in doubt is to be measured: where
        the rounding errors of A x may exceed the tolerance, or be most of what is left.
        They are of the order of ε ‖A‖ ‖x‖ for the whole of x, however small the part
        of it that this cycle has added.)
        """
        krylov, tol, k = carry.krylov, system.tol, self.batch_ndim
        rounding = system.eps * carry.gain
        y, residual, trusted = _combination(krylov, rounding, tol)
        step = system.precondition(combine(basis, y, solution, k))
        moved = krylov.used > 0

        def add(x: Array, d: Array) -> Array:
            x = jnp.where(_tree.expand(krylov.fresh, x), 0, x)
            return x + jnp.where(_tree.expand(moved, d), d, 0).astype(x.dtype)

        solution = jtu.tree_map(add, solution, step)
        # ‖A M‖ is what the basis tells of ‖A‖; M changes lengths.
        length, stretched = jnp.sqrt(jnp.sum(y * y, -1)), _tree.norm(step, k)
        whole = (
            length / jnp.where(stretched > 0, stretched, 1) * _tree.norm(solution, k)
        )
        error = rounding * jnp.maximum(whole, length)
        trusted = trusted & (error <= jnp.maximum(tol, _LOST * residual))
        doubtful = moved & ~trusted
        exact = doubtful & (system.eps <= jnp.finfo(tol.dtype).eps)
        claimed = moved & carry.converged if system.measure else doubtful
        broken = moved & carry.failed & ~doubtful & system.measure
        # What the recurrence says, unless it is less than can be known.
        residual = jnp.maximum(residual, error)
        carry = eqx.tree_at(
            lambda c: (
                c.residual,
                c.doubtful,
                c.exact,
                c.moved,
                c.broken,
                c.converged,
                c.failed,
                c.krylov.index,
                c.krylov.used,
            ),
            carry,
            (
                jnp.where(moved, residual, carry.residual),
                carry.doubtful | doubtful | claimed,
                jnp.where(moved, exact, carry.exact),
                carry.moved | moved,
                broken,
                carry.converged & ~(doubtful | claimed),
                carry.failed & ~(doubtful | broken),
                jnp.full_like(krylov.index, -1),
                jnp.zeros_like(krylov.used),
            ),
        )
        return carry, solution


def _identity(like: Reals, size: int) -> Array:
    """An identity matrix for every system, sharded like the systems."""
    zero = _tree.zeros_for(like, (size, size), like.ndim)
    return zero + jnp.eye(size, dtype=like.dtype)


def _combination(
    krylov: Krylov, rounding: Reals, tol: Reals
) -> tuple[Array, Reals, Flags]:
    """The y of R y = Q ‖r₀‖ e₁, what it leaves by recurrence, whether that is believed.

    In a space on which A is nearly singular the y of fewer columns, smaller, leaves
    less once its rounding errors are counted: then it is taken.
    """
    m = krylov.triangle.shape[-1]
    used = jnp.arange(m, dtype=krylov.used.dtype) < krylov.used[..., None]
    keep = used[..., None, :] & used[..., :, None]
    eye = jnp.eye(m, dtype=krylov.triangle.dtype)
    matrix = jnp.where(keep, krylov.triangle[..., :m, :], eye)
    rotated = krylov.size[..., None] * krylov.rotations[..., :, 0]
    rhs = jnp.where(used, rotated[..., :m], 0)
    # Column j is the y of the first j + 1 columns.
    first = jnp.triu(jnp.broadcast_to(rhs[..., None], matrix.shape))
    sums = jax.scipy.linalg.solve_triangular(matrix, first)
    none = jnp.zeros_like(krylov.size)[..., None]
    errors = rounding[..., None] * jnp.sqrt(jnp.sum(sums * sums, -2))
    errors = jnp.concatenate([none, errors], -1)
    squares = jnp.broadcast_to(
        (rotated * rotated)[..., None, :], (*used.shape[:-1], m + 1, m + 1)
    )
    left = jnp.sqrt(jnp.sum(jnp.triu(squares), -1))

    total = jnp.where(jnp.isfinite(errors), left + errors, jnp.inf)
    bound = jnp.maximum(tol, _LOST * _chosen(left, krylov.used))
    trusted = _chosen(errors, krylov.used) <= bound
    count = jnp.where(
        trusted, krylov.used, jnp.argmin(total, -1).astype(krylov.used.dtype)
    )
    # No column is chosen where the count is 0.
    y = _chosen(sums, jnp.broadcast_to((count - 1)[..., None], rhs.shape))
    return y, _chosen(left, count), trusted


def _entry(x: Array, j: Array, axis: int) -> Array:
    """Entry j along an axis; j, the same for all systems, is in range."""
    return lax.dynamic_index_in_dim(x, j, axis, keepdims=False)


def _chosen(x: Array, j: Array) -> Array:
    """Entry j of the last axis, for each system its own; 0 if there is none."""
    at = jnp.arange(x.shape[-1], dtype=j.dtype) == j[..., None]
    return jnp.sum(jnp.where(at, x, 0), -1)
