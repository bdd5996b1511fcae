"""GMRES that tests the residual after every product."""

import functools as ft
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._types import Counts, Flags, Reals
from .._upstream import unvmap_any

_DEFAULT_RTOL = {"bfloat16": 1e-2, "float16": 1e-2, "float32": 1e-5, "float64": 1e-8}
# A cycle that leaves more than this part of the residual has stagnated.
_STAGNATION = 0.999


class _Krylov(eqx.Module):
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


class _Carry(eqx.Module):
    krylov: _Krylov
    solution: PyTree
    residual: Reals
    before: Reals
    converged: Flags
    failed: Flags
    products: Array


class GMRES(lx.AbstractLinearSolver[lx.AbstractLinearOperator]):
    r"""Restarted GMRES, stopping at the first product that meets the tolerance.

    After j products, finds the x in x₀ + span{r₀, A r₀, …, A^{j−1} r₀} that minimises

    $$ \| b - A x \|_2 , \qquad\text{until}\qquad
       \| b - A x \|_2 \le \mathrm{atol} + \mathrm{rtol}\, \|b\|_2 . $$

    | symbol | meaning |
    |---|---|
    | $A$ | a square linear operator, applied only through `mv` |
    | $b$ | right-hand side |
    | $r_0 = b - A x_0$ | residual of the start, x₀ = 0 unless given |

    The norm ‖b − A x‖ is known after each product from the Givens rotations that keep
    the Hessenberg matrix triangular, at no further product. The basis is
    orthogonalised twice (classical Gram–Schmidt), in at least float32 around products
    of any dtype. The right-hand side is scaled to norm 1 per problem and the solution
    scaled back, so that neither a tiny nor a huge b is lost; b = 0 gives x = 0 after
    no product.

    **Cost:** one product per step, and one more per restart for the true residual.
    **Memory:** `restart` + 5 copies of b in at least float32.

    **Converges** for any nonsingular A once `restart` reaches the dimension; in
    practice in few products where A = I − J with J of small norm or few large
    eigenvalues. **Fails** visibly: `lineax.RESULTS.breakdown` (singular on the Krylov
    space), `stagnation`, `max_steps_reached`, `nonfinite_input`.

    Args:
        rtol: relative tolerance; None: by dtype of b (float16 and bfloat16 1e-2,
            float32 1e-5, float64 1e-8).
        atol: absolute tolerance.
        restart: products between restarts.
        max_steps: most products in all; None: 20 × `restart`.
        batch_ndim: number of leading axes of b that index independent systems;
            each has its own norm, test and statistics.

    Returns:
        By `lineax.linear_solve`. `stats` has `num_products` (), and, in the batch's
        shape, `residual` ‖b − A x‖₂, `relative_residual` and `converged`. In `options`,
        `y0` is the start and `preconditioner` a linear operator M ≈ A⁻¹, applied
        from the right (so that the residual tested is that of the given system).

    Raises:
        ValueError: if an argument is not valid, or A is not square.

    Example:
        >>> import deqjax, jax.numpy as jnp, lineax as lx
        >>> A = lx.MatrixLinearOperator(jnp.array([[2.0, 1.0], [0.0, 4.0]]))
        >>> sol = lx.linear_solve(A, jnp.array([3.0, 4.0]), deqjax.linear.GMRES())
        >>> [round(float(x), 4) for x in sol.value], int(sol.stats["num_products"])
        ([1.0, 1.0], 2)

    References:
        Y. Saad, M. H. Schultz (1986), GMRES: a generalized minimal residual algorithm
        for solving nonsymmetric linear systems, doi:10.1137/0907058.
    """

    rtol: float | None = None
    atol: float = 0.0
    restart: int = eqx.field(default=30, kw_only=True)
    max_steps: int | None = eqx.field(default=None, kw_only=True)
    batch_ndim: int = eqx.field(default=0, kw_only=True)

    def __check_init__(self):
        for name, tol in (("rtol", self.rtol), ("atol", self.atol)):
            if isinstance(tol, Array) or (name == "rtol" and tol is None):
                continue
            if not (isinstance(tol, int | float) and math.isfinite(tol) and tol >= 0):
                raise ValueError(
                    f"`{name}` must be a non-negative number; got {tol!r}."
                )
        counts = {"restart": (self.restart, 1), "batch_ndim": (self.batch_ndim, 0)}
        if self.max_steps is not None:
            counts["max_steps"] = (self.max_steps, 1)
        for name, (value, least) in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"`{name}` must be an integer ≥ {least}; got {value!r}."
                )

    # The interface of lineax

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> lx.AbstractLinearOperator:
        if operator.in_size() != operator.out_size():
            raise ValueError(
                "`GMRES` needs a square operator; got one from size "
                f"{operator.in_size()} to size {operator.out_size()}."
            )
        return lx.linearise(operator)

    def transpose(
        self, state: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> tuple[lx.AbstractLinearOperator, dict[str, Any]]:
        kept = {}
        if "preconditioner" in options:
            kept["preconditioner"] = options["preconditioner"].transpose()
        return state.transpose(), kept

    def conj(
        self, state: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> tuple[lx.AbstractLinearOperator, dict[str, Any]]:
        kept = {}
        if "preconditioner" in options:
            kept["preconditioner"] = lx.conj(options["preconditioner"])
        return lx.conj(state), kept

    def assume_full_rank(self) -> bool:
        return True

    def compute(
        self,
        state: lx.AbstractLinearOperator,
        vector: PyTree,
        options: dict[str, Any],
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        rtol = self._rtol(vector)
        cycle = min(self.restart, max(state.in_size(), 1))
        max_steps = 20 * self.restart if self.max_steps is None else self.max_steps
        dtypes = jtu.tree_map(lambda leaf: leaf.dtype, state.in_structure())
        preconditioner = options.get("preconditioner")
        precondition = (
            (lambda v: v) if preconditioner is None else _widened(preconditioner)
        )
        product = _widened(state)

        # Scale b to norm 1. First by its largest entry: squares of small ones vanish.
        b = jtu.tree_map(lambda leaf: leaf.astype(_tree.wide(leaf.dtype)), vector)
        largest = _tree.max_abs(b, self.batch_ndim)
        bad = ~jnp.isfinite(largest)
        safe = jnp.where((largest > 0) & ~bad, largest, 1)
        b = _tree.where(bad, _tree.zeros_like(b), _tree.scale(1 / safe, b))
        size = _tree.norm(b, self.batch_ndim)
        b = _tree.scale(1 / jnp.where(size > 0, size, 1), b)
        size = size * safe
        unit = jnp.where(size > 0, size, 1)
        tol = jnp.where(size > 0, rtol + self.atol / unit, 0)

        start = options.get("y0")
        guess = (
            _tree.zeros_like(b)
            if start is None
            else _tree.scale(
                1 / unit, jtu.tree_map(lambda x, y: x.astype(y.dtype), start, b)
            )
        )
        trivial = (size == 0) | bad
        carry = self._begin(b, guess, trivial, bad, cycle, start is None)

        def go_on(carry: _Carry) -> Array:
            pending = ~(carry.converged | carry.failed)
            return unvmap_any(jnp.any(pending)) & (carry.products < max_steps)

        def body(carry: _Carry) -> _Carry:
            krylov = carry.krylov
            opening = krylov.index < 0
            here = jtu.tree_map(
                lambda v: lax.dynamic_index_in_dim(
                    v, jnp.maximum(krylov.index, 0), keepdims=False
                ),
                krylov.basis,
            )
            # One product per step: of the iterate at the start of a cycle, else of
            # the newest basis vector.
            point = lax.cond(
                opening, lambda: carry.solution, lambda: precondition(here)
            )
            image = product(point)
            carry, new = lax.cond(
                opening,
                ft.partial(self._open, b, tol),
                ft.partial(self._extend, tol),
                carry,
                image,
            )
            krylov = carry.krylov
            basis = jtu.tree_map(
                lambda v, n: lax.dynamic_update_index_in_dim(v, n, krylov.index, 0),
                krylov.basis,
                new,
            )
            carry = eqx.tree_at(lambda c: c.krylov.basis, carry, basis)
            pending = jnp.any(~(carry.converged | carry.failed))
            full = krylov.index >= cycle
            last = full | (carry.products >= max_steps) | ~unvmap_any(pending)
            return lax.cond(
                last, ft.partial(self._close, precondition), lambda carry: carry, carry
            )

        final = lax.while_loop(go_on, body, carry)
        relative = jnp.where(trivial, 0, final.residual)
        solution = _tree.scale(jnp.where(trivial, 0, size), final.solution)
        solution = _tree.where(bad, _tree.scale(largest * jnp.nan, b), solution)
        solution = jtu.tree_map(lambda x, d: x.astype(d), solution, dtypes)
        converged = final.converged & ~bad
        stats = {
            "num_products": final.products,
            "max_steps": max_steps,
            "residual": jnp.where(bad, jnp.nan, relative * size),
            "relative_residual": jnp.where(bad, jnp.nan, relative),
            "converged": converged,
        }
        return solution, _result(converged, final, bad, max_steps), stats

    # One cycle

    def _rtol(self, vector: PyTree) -> Any:
        if self.rtol is not None:
            return self.rtol
        names = [leaf.dtype.name for leaf in jtu.tree_leaves(vector)]
        return max((_DEFAULT_RTOL[name] for name in names), default=1e-5)

    def _begin(
        self,
        b: PyTree,
        guess: PyTree,
        trivial: Flags,
        bad: Flags,
        cycle: int,
        at_zero: bool,
    ) -> _Carry:
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
        krylov = _Krylov(
            index=jnp.array(0 if at_zero else -1, jnp.int32),
            basis=basis,
            rotations=eye,
            triangle=jnp.zeros((*shape, cycle + 1, cycle), dtype),
            size=one,
            used=jnp.zeros_like(trivial, dtype=jnp.int32),
        )
        return _Carry(
            krylov=krylov,
            solution=guess,
            residual=one,
            before=jnp.full_like(one, jnp.inf),
            converged=trivial & ~bad,
            failed=bad,
            products=jnp.array(0, jnp.int32),
        )

    def _open(
        self, b: PyTree, tol: Reals, carry: _Carry, image: PyTree
    ) -> tuple[_Carry, PyTree]:
        """Begin a cycle from the residual b − A x."""
        residual = _tree.subtract(b, image)
        size = _tree.norm(residual, self.batch_ndim)
        pending = ~(carry.converged | carry.failed)
        finite = jnp.isfinite(size)
        # Only b, and what came before, say how far a cycle has got.
        stuck = size > _STAGNATION * carry.before
        done = pending & finite & (size <= tol)
        lost = pending & (~finite | (stuck & ~done))
        live = pending & ~done & ~lost
        first = _tree.scale(jnp.where(live, 1 / jnp.where(live, size, 1), 0), residual)
        first = _tree.where(live, first, _tree.zeros_like(first))
        krylov = carry.krylov
        eye = jnp.eye(krylov.rotations.shape[-1], dtype=krylov.rotations.dtype)
        krylov = _Krylov(
            index=jnp.zeros_like(krylov.index),
            basis=krylov.basis,
            rotations=jnp.broadcast_to(eye, krylov.rotations.shape),
            triangle=jnp.zeros_like(krylov.triangle),
            size=jnp.where(live, size, krylov.size),
            used=jnp.zeros_like(krylov.used),
        )
        carry = _Carry(
            krylov=krylov,
            solution=carry.solution,
            residual=jnp.where(pending & finite, size, carry.residual),
            before=jnp.where(live, size, carry.before),
            converged=carry.converged | done,
            failed=carry.failed | lost,
            products=carry.products + 1,
        )
        return carry, first

    def _extend(
        self, tol: Reals, carry: _Carry, image: PyTree
    ) -> tuple[_Carry, PyTree]:
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
        krylov = _Krylov(
            index=j + 1,
            basis=krylov.basis,
            rotations=jnp.where(keep, rotations, krylov.rotations),
            triangle=jnp.where(keep, triangle, krylov.triangle),
            size=krylov.size,
            used=jnp.where(counts, j + 1, krylov.used),
        )
        carry = _Carry(
            krylov=krylov,
            solution=carry.solution,
            residual=jnp.where(counts, residual, carry.residual),
            before=carry.before,
            converged=carry.converged | done,
            failed=carry.failed | lost,
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

    def _close(self, precondition: Any, carry: _Carry) -> _Carry:
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


def _widened(linear: lx.AbstractLinearOperator) -> Any:
    """v ↦ A v for v in the wide dtype, the product itself in the operator's own."""
    structure = linear.in_structure()

    def apply(v: PyTree) -> PyTree:
        v = jtu.tree_map(lambda x, s: x.astype(s.dtype), v, structure)
        return jtu.tree_map(lambda x: x.astype(_tree.wide(x.dtype)), linear.mv(v))

    return apply


def _result(converged: Flags, final: _Carry, bad: Flags, max_steps: int) -> lx.RESULTS:
    result = lx.RESULTS.where(
        jnp.all(converged), lx.RESULTS.successful, lx.RESULTS.breakdown
    )
    spent = jnp.any(~(final.converged | final.failed))
    result = lx.RESULTS.where(spent, lx.RESULTS.max_steps_reached, result)
    return lx.RESULTS.where(jnp.any(bad), lx.RESULTS.nonfinite_input, result)
