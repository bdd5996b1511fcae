"""Newton's method, each linear system solved by a Krylov method as far as it pays."""

from collections.abc import Callable
from dataclasses import field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from .. import _tree
from .._checks import real, whole
from .._types import Args, Aux, Flags, Map, Options, Reals, Tolerance, Y
from .._upstream import nondifferentiable
from ..linear import GMRES
from ._base import AbstractSolver, Trial
from ._record import Record

# Eisenstat & Walker (1996), choice 2 and its safeguard.
_FIRST = 0.1
_GAMMA = 0.9
_GUARD = 0.1
_LOOSEST = 0.9
# Sufficient decrease, and the part of a step that the next trial may have (ibid.).
_DECREASE = 1e-4
_SHORTEST, _LONGEST = 0.1, 0.5
# A search that has come down to this has failed.
_LEAST_LENGTH = 1e-4


class _Search(eqx.Module):
    """The search along a direction, of which the current iterate is a trial.

    Attributes:
        base: where it starts.
        residual: f(base) − base, and `size` its norm.
        direction: d, and `linear` the part of `residual` that (I − J) d leaves.
        length: t, the trial being base + t d.
        forcing: the tolerance that d was sought with.
        plain: the trial is a damped Picard step, to be taken whatever it leads to.
    """

    base: PyTree
    residual: PyTree
    size: Reals
    direction: PyTree
    linear: Reals
    length: Reals
    forcing: Reals
    plain: Flags


class _Memory(eqx.Module):
    search: _Search
    num_products: Array


class NewtonKrylov(AbstractSolver[Y, Aux]):
    r"""Inexact Newton's method, matrix-free, with a line search.

    $$ (I - J_k)\, d_k \approx f(z_k) - z_k, \qquad z_{k+1} = z_k + t_k d_k, \qquad
       J_k = \partial_z f(z_k) $$

    | symbol | meaning |
    |---|---|
    | $z_k$ | iterate |
    | $d_k$ | direction, with ‖f(z) − z − (I − J) d‖ ≤ η ‖f(z) − z‖ |
    | $\eta_k$ | forcing term, at first 0.1 |
    | $t_k$ | length, 1 unless ‖f(z) − z‖ would not decrease enough |

    η_k = 0.9 (‖f(z_k) − z_k‖ / ‖f(z_{k−1}) − z_{k−1}‖)², kept from falling too fast, so
    that the system is solved only as well as the linearisation is worth, and never
    beyond the stopping rule. Where the residual does not fall by the part
    10⁻⁴ t (1 − η), or is not finite, t shrinks to the minimiser of a parabola within
    [t/10, t/2]. At t < 10⁻⁴ half a Picard step is taken instead, whatever it leads to,
    and Newton's method goes on from there; where the linear solver makes no progress,
    d = f(z) − z. All of it per problem.

    A step is one trial. f is linearised at every trial, which gives its value too, so
    that nothing is evaluated again once a trial is accepted. `num_evals` counts these
    linearisations, one per step; `num_products` the Jacobian products, where the linear
    solver reports them. f is traced once.

    **Cost:** one linearisation per step (an evaluation that keeps what products need)
    and about as many products as η asks for. **Memory:** one linearisation, 7 copies of
    z, and what the linear solver keeps (35 copies with the default).

    **Converges** quadratically near a fixed point where I − J is nonsingular, f being
    smooth there, whether or not f contracts. **Fails** visibly otherwise:
    `nonlinear_max_steps_reached` in a local minimum of ‖f(z) − z‖, which a map far from
    a contraction may have many of, `nonfinite` where even half a Picard step is not
    finite. f needs forward mode: one with a
    `jax.custom_vjp` has none.

    Differentiate it by `ImplicitAdjoint` or another implicit rule; its steps cannot be
    unrolled.

    Stops when ‖f(z) − z‖ ≤ atol + rtol ‖f(z)‖ and returns the iterate of smallest
    residual. With `rtol=None, atol=None` exactly `max_steps` trials are made.

    Args:
        rtol: tolerance relative to ‖f(z)‖, or None. "auto" goes by the coarsest dtype
            of the state: 1e-8 in float64, 1e-4 in float32, 5e-3 in float16, 2e-2 in
            bfloat16.
        atol: absolute tolerance, or None; "auto": a hundredth of the above.
        linear_solver: any lineax solver; None: `deqjax.linear.GMRES`. A `GMRES` whose
            `rtol` is None is given η; any other is used as it is, and if it does not
            know of batches, one problem that is not finite spoils the others.
        min_steps: steps before which the test cannot pass.
        batch_ndim: number of leading axes that index independent problems.

    Raises:
        ValueError, TypeError: if an argument is not valid.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> f = lambda z, _: z - jnp.arctan(z - 3)  # not a contraction
        >>> sol = deqjax.fixed_point(f, jnp.array(50.0), solver=deqjax.NewtonKrylov())
        >>> round(float(sol.value), 3)
        3.0

    References:
        R. S. Dembo, S. C. Eisenstat, T. Steihaug (1982), Inexact Newton methods,
        doi:10.1137/0719025.

        S. C. Eisenstat, H. F. Walker (1996), Choosing the forcing terms in an inexact
        Newton method, doi:10.1137/0917003.

        D. A. Knoll, D. E. Keyes (2004), Jacobian-free Newton–Krylov methods: a survey
        of approaches and applications, doi:10.1016/j.jcp.2003.08.010.
    """

    rtol: Tolerance = eqx.field(default="auto", converter=real)
    atol: Tolerance = eqx.field(default="auto", converter=real)
    linear_solver: lx.AbstractLinearSolver | None = field(default=None, kw_only=True)
    min_steps: int = eqx.field(default=0, kw_only=True, converter=whole)
    batch_ndim: int = eqx.field(default=0, kw_only=True, converter=whole)

    freezes_memory = True

    def __check_init__(self):
        linear = self.linear_solver
        if linear is not None and not isinstance(linear, lx.AbstractLinearSolver):
            raise TypeError(
                "`linear_solver` must be a lineax solver (lineax.AbstractLinearSolver) "
                f"or None; got {type(linear).__name__}."
            )
        if isinstance(linear, GMRES) and linear.batch_ndim != self.batch_ndim:
            raise ValueError(
                "`linear_solver` must have the `batch_ndim` of the solver; got "
                f"{linear.batch_ndim} and {self.batch_ndim}."
            )

    def init_memory(self, z: Y, options: Options) -> _Memory:
        zero = _tree.zeros_like(_tree.subtract(z, z))
        size = _tree.norm(z, self.batch_ndim)
        one = jnp.ones_like(size)
        search = _Search(
            base=z,
            residual=zero,
            size=one,
            direction=zero,
            linear=one,
            length=one,
            forcing=one,
            plain=jnp.zeros_like(size, dtype=bool),
        )
        return _Memory(search, jnp.array(0, jnp.int32))

    def evaluate(self, fn: Map, z: Y, args: Args) -> tuple[Y, Aux, Callable]:
        fn, args = nondifferentiable((fn, args), msg=_UNROLLED)
        f, push, aux = jax.linearize(lambda z: fn(z, args), z, has_aux=True)
        return f, aux, push

    def recovers(self, record: Record, memory: _Memory) -> Flags:
        # Only a search has another point to try where f is not finite.
        return (record.num_steps > 0) & ~memory.search.plain

    def update(self, z: Y, f: Y, memory: _Memory, trial: Trial) -> tuple[Y, _Memory]:
        search, record = memory.search, trial.record
        active, going = trial.before, trial.after
        assert active is not None and going is not None
        first = record.num_steps == 1
        size = record.last_residual
        least = _DECREASE * search.length * (1 - search.linear)
        enough = first | search.plain | (size <= (1 - least) * search.size)
        accepted = enough & jnp.isfinite(size)
        start, retry = active & going & accepted, active & going & ~accepted

        residual = _tree.subtract(f, z)
        forcing = self._forcing(search, size, f, first)
        needed = _tree.where(start, residual, _tree.zeros_like(residual))
        direction, linear, products = self._newton(trial.products, z, needed, forcing)
        new = _Search(
            base=z,
            residual=residual,
            size=size,
            direction=direction,
            linear=linear,
            length=jnp.ones_like(size),
            forcing=forcing,
            plain=jnp.zeros_like(start),
        )
        search = _tree.where(start, new, _shortened(search, size, retry))
        # One solve serves all problems, and none of them counts it twice.
        products = jnp.where(jnp.any(start), products, 0)
        return _trial(search), _Memory(search, memory.num_products + products)

    def extra_statistics(self, memory: _Memory) -> dict[str, Any]:
        counted = self.linear_solver is None or isinstance(self.linear_solver, GMRES)
        return {"num_products": memory.num_products} if counted else {}

    def _forcing(self, search: _Search, size: Reals, f: PyTree, first: Flags) -> Reals:
        """η: how well the system at an accepted trial is worth solving."""
        eta = _GAMMA * (size / search.size) ** 2
        # What the step in fact promised, shortened or not.
        last = 1 - search.length * (1 - search.forcing)
        guard = _GAMMA * last**2
        eta = jnp.where(guard > _GUARD, jnp.maximum(eta, guard), eta)
        eta = jnp.where(first, _FIRST, eta)
        tolerances = self.tolerances(f)
        if tolerances is not None:
            rtol, atol = tolerances
            enough = 0.5 * (atol + rtol * _tree.norm(f, self.batch_ndim)) / size
            eta = jnp.maximum(eta, enough)
        eps = max(float(jnp.finfo(x.dtype).eps) for x in jtu.tree_leaves(f))
        # NaN where there is no system to solve.
        return jnp.clip(jnp.nan_to_num(eta, nan=_LOOSEST), 4 * eps, _LOOSEST)

    def _newton(
        self, push: Callable, y: PyTree, residual: PyTree, forcing: Reals
    ) -> tuple[PyTree, Reals, Array]:
        """(I − J) d ≈ residual: d, ‖residual − (I − J) d‖ / ‖residual‖, products."""
        k = self.batch_ndim

        def product(v: PyTree) -> PyTree:
            moved = push(jtu.tree_map(lambda a, b: a.astype(b.dtype), v, y))
            return _tree.subtract(v, moved)

        solver = self.linear_solver
        if solver is None:
            solver = GMRES(batch_ndim=k)
        if isinstance(solver, GMRES) and solver.rtol is None:
            solver = eqx.tree_at(
                lambda s: s.rtol, solver, forcing, is_leaf=lambda x: x is None
            )
        # Scaled to 1 per problem: linear solvers take a small right-hand side for 0.
        unit = _tree.max_abs(residual, k)
        unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1)
        rhs = _tree.scale(1 / unit, residual)
        if isinstance(solver, GMRES):
            # What the direction is worth shows in f itself.
            value, _, stats = solver.solve(product, rhs, {"measure": False})
        else:
            operator = lx.FunctionLinearOperator(product, jax.eval_shape(lambda: rhs))
            sol = lx.linear_solve(operator, rhs, solver, throw=False)
            value, stats = sol.value, sol.stats
        direction = _tree.scale(unit, value)
        linear = jnp.asarray(stats.get("relative_residual", jnp.zeros_like(unit)))
        useless = ~_tree.all_finite(direction, k) | ~(linear < 1)
        direction = _tree.where(useless, residual, direction)
        products = stats.get("num_products", 0)
        return direction, jnp.where(useless, 1, linear), jnp.asarray(products)


_UNROLLED = (
    "`NewtonKrylov` cannot be differentiated through its steps: how well each system "
    "is solved, and how far each step goes, is decided by tests. Use "
    "`deqjax.ImplicitAdjoint`, or another implicit rule."
)


def _trial(search: _Search) -> PyTree:
    """base + t d, or base + ½ (f(base) − base), in the dtype of the iterate."""

    def leaf(z: Array, d: Array, r: Array) -> Array:
        t = _tree.expand(search.length, d).astype(d.dtype)
        plain = _tree.expand(search.plain, d)
        return (z.astype(d.dtype) + jnp.where(plain, 0.5 * r, t * d)).astype(z.dtype)

    return jtu.tree_map(leaf, search.base, search.direction, search.residual)


def _shortened(search: _Search, size: Reals, retry: Flags) -> _Search:
    """The search after a trial that left a residual of norm `size`: too much."""
    # The parabola through ‖f − z‖² at 0 and t with its slope at 0, which is
    # −2 (1 − linear²) ‖f − z‖² for a direction of least linear residual.
    fall = (1 - search.linear**2) * search.length
    growth = (size / search.size) ** 2 - 1
    part = fall / (growth + 2 * fall)
    part = jnp.clip(jnp.nan_to_num(part, nan=_SHORTEST), _SHORTEST, _LONGEST)
    length = jnp.where(retry, part * search.length, search.length)
    return eqx.tree_at(
        lambda s: (s.length, s.plain),
        search,
        (length, jnp.where(retry, length < _LEAST_LENGTH, search.plain)),
    )
