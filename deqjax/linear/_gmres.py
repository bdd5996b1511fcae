"""GMRES that tests the residual after every product."""

import functools as ft
from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._checks import check_count, real, whole
from .._upstream import unvmap_any
from ._base import AbstractIterative, Outcome, System
from ._basis import Rings, orthogonalise, read, write
from ._krylov import Cycles, Progress

# The solution and the basis are apart: what a `lax.cond` returns, XLA copies.
_Carry: TypeAlias = tuple[Progress, PyTree, Rings]


class GMRES(AbstractIterative):
    r"""Restarted GMRES, stopping at the first product that meets the tolerance.

    After j products, finds the x in x₀ + span{r₀, A r₀, …, A^{j−1} r₀} that minimises

    $$ \| b - A x \|_2 , \qquad\text{until}\qquad
       \| b - A x \|_2 \le \mathrm{atol} + \mathrm{rtol}\, \|b\|_2 . $$

    | symbol | meaning |
    |---|---|
    | $A$ | a square linear operator, applied only through `mv` |
    | $b$ | right-hand side |
    | $r_0 = b - A x_0$ | residual of the start, x₀ = 0 unless given |

    After each product the Givens rotations that keep the Hessenberg matrix triangular
    give ‖b − A x‖, at no further product. They are right only if A is linear, acts on
    each system alone and rounds little. So once they meet the tolerance, one more
    product measures the residual, and only that one counts. If it is above the
    tolerance, the iteration goes on from there, as long as every cycle halves it.
    The last of `max_steps` products is kept for the measurement.

    x is measured as b − A(c x)/c, with a c in (½, 1] that differs from system to system
    and from one measurement to the next. Rounding errors of the operator's own, in half
    precision for example, and systems that leak into one another do not scale with c.
    Hence they show, even if a correction has removed them from b − A x.

    A start with a larger residual than that of 0 is given up for 0, and what is
    returned is never worse than 0 as far as it was measured.

    The basis is orthogonalised twice (classical Gram–Schmidt), in at least float32
    around products of any dtype. The right-hand side is scaled by a power of two per
    problem, so that neither a tiny nor a huge b is lost (subnormal numbers count as 0);
    b = 0 gives x = 0 after no product.

    **Cost:** one product per step, and one more for each measurement: at the end, and
    at every restart. **Memory:** `restart` + 5 copies of b in at least
    float32, and about 4 (`restart` + 1)² numbers per system.

    **Converges** for any nonsingular A once `restart` reaches the dimension; in
    practice in few products where A = I − J with J of small norm or few large
    eigenvalues. **Fails** visibly: `lineax.RESULTS.breakdown` (singular on the Krylov
    space, or a product or an x that is not finite), `stagnation` (a whole cycle gained
    less than 0.1%, or less than half where only rounding errors are left),
    `max_steps_reached`, `nonfinite_input`.

    Args:
        rtol: relative tolerance, one or one per system; None: by dtype of b (float16
            and bfloat16 1e-2, float32 1e-5, float64 1e-8).
        atol: absolute tolerance, one or one per system.
        restart: products between restarts.
        max_steps: most products in all; None: 20 × `restart`.
        batch_ndim: number of leading axes of b that index independent systems;
            each has its own norm, test and statistics.

    Returns:
        lineax.Solution: by `lineax.linear_solve`. `stats` has `num_products` (), and,
            in the batch's shape, `residual` ‖b − A x‖₂ of the x returned, as it was
            measured, `relative_residual` and `converged`. In `options`, `y0` is the
            start and `preconditioner` a linear operator M ≈ A⁻¹, applied from the
            right (so that the residual tested is that of the given system).
            `measure=False` spares the measurement unless rounding errors of the
            arithmetic are in doubt, for callers that test what x leads to; `unit` is
            what each b has been divided by.

    Raises:
        ValueError, TypeError: if an argument or an option is not valid, or A is not
            square and real.

    Example:
        >>> import deqjax, jax.numpy as jnp, lineax as lx
        >>> A = lx.MatrixLinearOperator(jnp.array([[2.0, 1.0], [0.0, 4.0]]))
        >>> sol = lx.linear_solve(A, jnp.array([3.0, 4.0]), deqjax.linear.GMRES())
        >>> [round(float(x), 4) for x in sol.value], int(sol.stats["num_products"])
        ([1.0, 1.0], 3)

    References:
        Y. Saad, M. H. Schultz (1986), GMRES: a generalized minimal residual algorithm
        for solving nonsymmetric linear systems, doi:10.1137/0907058.
    """

    rtol: float | Array | None = eqx.field(default=None, converter=real)
    atol: float | Array = eqx.field(default=0.0, converter=real)
    restart: int = eqx.field(default=30, kw_only=True, converter=whole)
    max_steps: int | None = eqx.field(default=None, kw_only=True, converter=whole)
    batch_ndim: int = eqx.field(default=0, kw_only=True, converter=whole)

    def __check_init__(self):
        check_count("restart", self.restart, 1)
        if self.max_steps is not None:
            check_count("max_steps", self.max_steps, 1)

    @property
    def most_products(self) -> int:
        return 20 * self.restart if self.max_steps is None else self.max_steps

    def iterate(self, system: System) -> Outcome:
        k = self.batch_ndim
        cycles = Cycles(k)
        cycle = min(self.restart, max(_tree.size(system.b, k), 1))
        max_steps = self.most_products
        # The last product measures what the others have led to.
        most = max_steps - 1 if system.measure and max_steps > 1 else max_steps

        def go_on(val: _Carry) -> Array:
            carry, *_ = val
            pending = ~(carry.converged | carry.failed)
            # Once none but the last product is left, x is measured or nothing is.
            room = (carry.products < most) | unvmap_any(jnp.any(carry.moved))
            return unvmap_any(jnp.any(pending)) & room & (carry.products < max_steps)

        def body(val: _Carry) -> _Carry:
            carry, solution, basis = val
            opening, row = carry.krylov.index < 0, jnp.maximum(carry.krylov.index, 0)
            # One product per step: of the iterate at the start of a cycle, which gives
            # its residual, else of the newest basis vector.
            part = system.part(carry.residual, carry.products, carry.exact)
            point = lax.cond(
                opening,
                lambda: _tree.scale(part, solution),
                lambda: system.precondition(read(basis, row, solution, k)),
            )
            image = jtu.tree_map(
                lambda x, y: jnp.where(opening, x - y / _tree.expand(part, y), y),
                system.b,
                system.product(point),
            )
            column, rest = orthogonalise(basis, carry.krylov.index, image, k)
            carry, factor = lax.cond(
                opening,
                ft.partial(cycles.open, system),
                ft.partial(cycles.extend, system),
                carry,
                column,
                _tree.norm(rest, k),
            )
            if not system.at_zero:
                # The residual of 0, for what was to start elsewhere.
                rest = _tree.where(opening & carry.krylov.fresh, system.b, rest)
            new = _tree.where(
                factor > 0, _tree.scale(factor, rest), _tree.zeros_like(rest)
            )
            index = carry.krylov.index
            pending = jnp.any(~(carry.converged | carry.failed))
            last = (index >= cycle) | (carry.products >= most) | ~unvmap_any(pending)
            carry, solution = lax.cond(
                last,
                ft.partial(cycles.close, system),
                lambda carry, solution, _: (carry, solution),
                carry,
                solution,
                basis,
            )
            # At the end of a cycle this overwrites what is of no use any more.
            return carry, solution, write(basis, carry.krylov.index, new, k)

        progress, basis = cycles.begin(system, cycle)
        final, solution, _ = lax.while_loop(
            go_on, body, (progress, system.guess, basis)
        )
        return Outcome(
            solution=solution,
            residual=final.residual,
            converged=final.converged,
            failed=final.failed,
            stuck=final.stuck,
            products=final.products,
        )
