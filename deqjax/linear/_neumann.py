"""The damped Neumann series as a linear solver."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._checks import check_beta, check_count, real, whole
from .._types import Flags, Reals
from .._upstream import unvmap_any
from ._base import AbstractIterative, Linear, Outcome, System


class _Progress(eqx.Module):
    """The iterate whose residual comes next, and the best one so far."""

    next: PyTree
    best: PyTree
    residual: Reals
    converged: Flags
    failed: Flags
    products: Array


class Neumann(AbstractIterative):
    r"""Damped Neumann series (Richardson iteration), tested after every product.

    $$ x_{t+1} = x_t + \beta\, (b - A x_t) , \qquad\text{for } A = I - J :\quad
       x_t = \beta \sum_{s<t} \big((1-\beta) I + \beta J\big)^s\, b $$

    | symbol | meaning |
    |---|---|
    | $A$ | a square linear operator, applied only through `mv` |
    | $b$ | right-hand side; x₀ = 0 unless given |
    | $\beta$ | damping; 1 is the plain series |

    Stops at the first product with ‖b − A x‖₂ ≤ atol + rtol ‖b‖₂ and returns that x;
    if there is none, the x of smallest residual. A start with a larger residual than
    that of 0 is given up for 0. Arithmetic is in at least float32 around products of
    any dtype, and b is scaled by a power of two per problem; b = 0 gives x = 0 after
    no product.

    **Cost:** one product per term after the first. **Memory:** 5 copies of b, whatever
    the number of terms. Takes more products than `GMRES` for the same tolerance.

    **Converges** if |1 − β a| < 1 for every eigenvalue a of A; for A = I − J, if every
    eigenvalue of (1 − β) I + β J lies within the unit circle. **Fails** visibly:
    `lineax.RESULTS.max_steps_reached`, `breakdown` (not finite), `nonfinite_input`.
    A = J − I has the wrong sign for it.

    Args:
        rtol: relative tolerance, one or one per system; None: by dtype of b (float16
            and bfloat16 1e-2, float32 1e-5, float64 1e-8).
        atol: absolute tolerance, one or one per system.
        beta: damping, 0 < beta < 2.
        max_steps: most products.
        num_terms: if given, take this many terms and test nothing: `stats` then says
            neither a residual nor `converged`, and the result is successful if x is
            finite.
        batch_ndim: number of leading axes of b that index independent systems;
            each has its own norm, test and statistics.

    Returns:
        lineax.Solution: by `lineax.linear_solve`, with the `stats` and `options` of
            `GMRES`. A preconditioner M makes it x ← x + β M (b − A x).

    Raises:
        ValueError, TypeError: if an argument or an option is not valid, or A is not
            square and real.

    Example:
        >>> import deqjax, jax.numpy as jnp, lineax as lx
        >>> A = lx.MatrixLinearOperator(jnp.array([[1.0, -0.5], [0.0, 1.0]]))  # J² = 0
        >>> sol = lx.linear_solve(A, jnp.array([1.0, 2.0]), deqjax.linear.Neumann())
        >>> sol.value.tolist(), int(sol.stats["num_products"])
        ([2.0, 2.0], 2)

    References:
        L. F. Richardson (1911), The approximate arithmetical solution by finite
        differences of physical problems involving differential equations,
        doi:10.1098/rsta.1911.0009.
    """

    rtol: float | Array | None = eqx.field(default=None, converter=real)
    atol: float | Array = eqx.field(default=0.0, converter=real)
    beta: float | Array = eqx.field(default=1.0, kw_only=True, converter=real)
    max_steps: int = eqx.field(default=200, kw_only=True, converter=whole)
    num_terms: int | None = eqx.field(default=None, kw_only=True, converter=whole)
    batch_ndim: int = eqx.field(default=0, kw_only=True, converter=whole)

    def __check_init__(self):
        check_beta(self.beta, below=2.0)
        check_count("max_steps", self.max_steps, 1)
        if self.num_terms is not None:
            check_count("num_terms", self.num_terms, 1)
        if isinstance(self.beta, Array) and self.beta.ndim > 0:
            raise ValueError(
                f"`beta` must be one number; got an array of shape {self.beta.shape}."
            )

    @property
    def most_products(self) -> int:
        return self.max_steps if self.num_terms is None else self.num_terms

    def iterate(self, system: System) -> Outcome:
        correct = lambda x, r: add(self.beta, x, system.precondition(r))
        if self.num_terms is None:
            return self._until(system, correct)
        start = None if system.at_zero else system.guess
        x, products = series(system.product, correct, system.b, start, self.num_terms)
        finite = _tree.all_finite(x, self.batch_ndim)
        return Outcome(
            solution=x,
            residual=None,
            converged=finite,
            failed=~finite | system.bad,
            stuck=jnp.zeros_like(finite),
            products=jnp.array(products, jnp.int32),
        )

    def _until(self, system: System, correct: Callable) -> Outcome:
        b, k = system.b, self.batch_ndim
        zero = _tree.zeros_like(b)
        first = correct(zero, b) if system.at_zero else system.guess
        # The residual of 0 is b; that of another start is yet to be seen.
        carry = _Progress(
            next=first,
            best=zero,
            residual=system.size,
            converged=system.trivial & ~system.bad,
            failed=system.bad,
            products=jnp.array(0, jnp.int32),
        )

        def go_on(carry: _Progress) -> Array:
            pending = ~(carry.converged | carry.failed)
            return unvmap_any(jnp.any(pending)) & (carry.products < self.max_steps)

        def body(carry: _Progress) -> _Progress:
            x = carry.next
            r = _tree.subtract(b, system.product(x))
            size = _tree.norm(r, k)
            if not system.at_zero:
                # A start that is worse than 0 is given up for it.
                worse = (carry.products == 0) & ~(size <= system.size)
                x, r = _tree.where(worse, (zero, b), (x, r))
                size = jnp.where(worse, system.size, size)
            pending = ~(carry.converged | carry.failed)
            finite = jnp.isfinite(size)
            better = pending & finite & (size < carry.residual)
            done = pending & finite & (size <= system.tol)
            return _Progress(
                next=_tree.where(pending & finite & ~done, correct(x, r), x),
                best=_tree.where(better | done, x, carry.best),
                residual=jnp.where(better | done, size, carry.residual),
                converged=carry.converged | done,
                failed=carry.failed | (pending & ~finite),
                products=carry.products + 1,
            )

        final = lax.while_loop(go_on, body, carry)
        return Outcome(
            solution=final.best,
            residual=final.residual,
            converged=final.converged,
            failed=final.failed,
            stuck=jnp.zeros_like(final.failed),
            products=final.products,
        )


def series(
    product: Linear,
    correct: Callable[[PyTree, PyTree], PyTree],
    b: PyTree,
    start: PyTree | None,
    num_terms: int,
) -> tuple[PyTree, int]:
    """`num_terms` corrections of the start (None: 0), and the products they took."""
    x, left = start, num_terms
    if x is None:
        x, left = correct(_tree.zeros_like(b), b), num_terms - 1
    step = lambda x: correct(x, _tree.subtract(b, product(x)))
    return lax.fori_loop(0, left, lambda _, x: step(x), x), left


def add(beta: float | Array, x: PyTree, r: PyTree) -> PyTree:
    """x + β r, in the dtype of x."""

    def leaf(a: Array, d: Array) -> Array:
        return a + jnp.asarray(beta, a.dtype) * d.astype(a.dtype)

    return jtu.tree_map(leaf, x, r)
