"""GMRES that tests the residual after every product."""

import functools as ft
import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._types import Flags
from .._upstream import unvmap_any
from ._krylov import Cycles, Progress

_DEFAULT_RTOL = {"bfloat16": 1e-2, "float16": 1e-2, "float32": 1e-5, "float64": 1e-8}


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

    rtol: float | Array | None = None
    atol: float | Array = 0.0
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
        cycles = Cycles(self.batch_ndim)
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
        carry = cycles.begin(b, guess, trivial, bad, cycle, start is None)

        def go_on(carry: Progress) -> Array:
            pending = ~(carry.converged | carry.failed)
            return unvmap_any(jnp.any(pending)) & (carry.products < max_steps)

        def body(carry: Progress) -> Progress:
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
                ft.partial(cycles.open, b, tol),
                ft.partial(cycles.extend, tol),
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
                last, ft.partial(cycles.close, precondition), lambda carry: carry, carry
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

    def _rtol(self, vector: PyTree) -> Any:
        if self.rtol is not None:
            return self.rtol
        names = [leaf.dtype.name for leaf in jtu.tree_leaves(vector)]
        return max((_DEFAULT_RTOL[name] for name in names), default=1e-5)


def _widened(linear: lx.AbstractLinearOperator) -> Any:
    """v ↦ A v for v in the wide dtype, the product itself in the operator's own."""
    structure = linear.in_structure()

    def apply(v: PyTree) -> PyTree:
        v = jtu.tree_map(lambda x, s: x.astype(s.dtype), v, structure)
        return jtu.tree_map(lambda x: x.astype(_tree.wide(x.dtype)), linear.mv(v))

    return apply


def _result(
    converged: Flags, final: Progress, bad: Flags, max_steps: int
) -> lx.RESULTS:
    result = lx.RESULTS.where(
        jnp.all(converged), lx.RESULTS.successful, lx.RESULTS.breakdown
    )
    spent = jnp.any(~(final.converged | final.failed))
    result = lx.RESULTS.where(spent, lx.RESULTS.max_steps_reached, result)
    return lx.RESULTS.where(jnp.any(bad), lx.RESULTS.nonfinite_input, result)
