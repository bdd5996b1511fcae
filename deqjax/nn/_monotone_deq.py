"""Monotone operator equilibrium networks."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array

from .. import _tree
from .._fixed_point import fixed_point
from ..solvers import Picard
from ..solvers._base import Measured, statistics
from ..solvers._optimistix import AnySolver
from ._checks import batched_solver, check_count
from ._deq import unless_lost
from ._monotone import AbstractMonotone
from ._splittings import AbstractSplitting, PeacemanRachford


class MonotoneDEQ(eqx.Module):
    r"""A monotone operator equilibrium layer (monDEQ).

    $$ z^* = \mathrm{relu}(W z^* + U x + b), \qquad I - W \succeq m I, \quad m > 0 $$

    **Guarantee:** for every value of the parameters there is exactly one equilibrium,
    and both splittings converge to it (under `deqjax.Picard`, from any start). A solve
    by a deqjax solver stops, and counts as converged, where the equation above holds to
    the tolerances, whatever the step size: ‖relu(Wz + Ux + b) − z‖ is at most a known
    multiple of what the splitting's map moves its iterate. (A solver of optimistix
    tests the splitting's map.)

    The gradient is the adjoint's of the splitting's map: the two maps have the same
    fixed points, hence the same implicit gradient.

    Args:
        operator: a `MonotoneDense` or `MonotoneConv`.
        splitting: `PeacemanRachford` or `ForwardBackward`; default: the first.
        solver: see `deqjax.fixed_point`; one of deqjax needs `batch_ndim=1`. Default:
            `deqjax.Picard(batch_ndim=1)`, for which the guarantee holds.
        adjoint: see `deqjax.fixed_point`.
        max_steps: see `deqjax.fixed_point`.

    Raises:
        TypeError, ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, jax, jax.numpy as jnp
        >>> operator = deqjax.nn.MonotoneDense(3, 5, key=jax.random.key(0))
        >>> layer = deqjax.nn.MonotoneDEQ(operator)
        >>> layer(jnp.ones((2, 3))).shape
        (2, 5)

    References:
        E. Winston, J. Z. Kolter (2020), Monotone operator equilibrium networks,
        doi:10.48550/arXiv.2006.08591.
    """

    operator: AbstractMonotone
    splitting: AbstractSplitting
    solver: AnySolver
    adjoint: optx.AbstractAdjoint | None
    max_steps: int = eqx.field(static=True)

    def __init__(
        self,
        operator: AbstractMonotone,
        *,
        splitting: AbstractSplitting | None = None,
        solver: AnySolver | None = None,
        adjoint: optx.AbstractAdjoint | None = None,
        max_steps: int = 300,
    ):
        splitting = PeacemanRachford() if splitting is None else splitting
        for name, value, kind in (
            ("operator", operator, AbstractMonotone),
            ("splitting", splitting, AbstractSplitting),
        ):
            if not isinstance(value, kind):
                raise TypeError(
                    f"`{name}` must be an instance of a subclass of {kind.__name__}; "
                    f"got {value!r}."
                )
        check_count("max_steps", max_steps, 1)
        self.operator = operator
        self.splitting = splitting
        self.solver = batched_solver(solver, Picard(batch_ndim=1))
        self.adjoint = adjoint
        self.max_steps = max_steps

    def __call__(self, x: Array, *, z0: Any = None) -> Any:
        """The equilibrium for a batch of inputs.

        Args:
            x: for `MonotoneDense` of shape (batch, features), for `MonotoneConv` of
                shape (batch, channels, height, width).
            z0: where to start; None: zeros.
        """
        return self.solve(x, z0=z0).value

    def solve(
        self,
        x: Any,
        *,
        z0: Any = None,
        max_steps: int | None = None,
        throw: bool = False,
        options: dict[str, Any] | None = None,
    ) -> optx.Solution:
        """As `__call__`, with all that `deqjax.fixed_point` returns.

        `value` is the equilibrium z, NaN where no evaluation was finite; `residual`,
        `relative_residual` and `converged` are those of `equation` there; a
        `residual_history` has the bounds that were tested.

        Args:
            x: see `__call__`.
            z0: see there.
            max_steps: in place of the layer's own.
            throw: see `deqjax.fixed_point`.
            options: see there.
        """
        operator = self.operator
        zeros = operator.initial_state(x)
        if z0 is None:
            start = zeros
        else:
            shapes = lambda z: jax.tree.map(jnp.shape, z)
            if shapes(z0) != shapes(zeros):
                raise ValueError(
                    f"`z0` must have the shape of the equilibrium, {shapes(zeros)}; "
                    f"got {shapes(z0)}."
                )
            start = self.splitting.start(operator, operator.inject(x), z0)
        tested = not getattr(self.solver, "static", True)
        sol = fixed_point(
            _measured if tested else _split,
            start,
            (self.splitting, operator, x),
            solver=self.solver,
            adjoint=self.adjoint,
            max_steps=self.max_steps if max_steps is None else max_steps,
            has_aux=tested,
            options=options,
        )
        sol = _judged(self, sol, x)
        if throw:
            sol = sol.result.error_if(sol, sol.result != optx.RESULTS.successful)
        return sol

    def equation(self, z: Any, x: Any) -> Any:
        """relu(W z + U x + b), of which the equilibrium is the fixed point.

        Args:
            z: a state.
            x: a batch of inputs.
        """
        bias = self.operator.inject(x)
        sums = jax.tree.map(jnp.add, self.operator.multiply(z), bias)
        return self.operator.activate(sums)


def _split(u: Any, args: tuple[AbstractSplitting, AbstractMonotone, Any]) -> Any:
    splitting, operator, x = args
    return splitting.step(operator, operator.inject(x), u)


def _measured(u: Any, args: tuple) -> tuple[Any, Measured]:
    """The map, and a bound of the residual of the equation, to be tested."""
    splitting, operator, _ = args
    f = _split(u, args)
    moved = lax.stop_gradient(_tree.norm(_tree.subtract(f, u), 1))
    z = lax.stop_gradient(splitting.read(operator, u))
    return f, Measured(splitting.slack(operator, u) * moved, _tree.norm(z, 1))


@eqx.filter_jit
def _judged(layer: MonotoneDEQ, sol: optx.Solution, x: Any) -> optx.Solution:
    """The solution for z, its verdict that of the equation."""
    results, solver = optx.RESULTS, layer.solver
    tested: Any = None if getattr(solver, "static", True) else solver
    value = layer.splitting.read(layer.operator, sol.value)
    z, f = lax.stop_gradient((value, layer.equation(value, x)))
    ndim = getattr(solver, "batch_ndim", 0)
    residual, norm = _tree.norm(_tree.subtract(f, z), ndim), _tree.norm(f, ndim)
    converged, result = sol.stats["converged"], sol.result
    if tested is not None:
        converged = tested.is_converged(residual, norm, z)
        # What rounding keeps from moving need not be at the equilibrium.
        claims, met = result == results.successful, jnp.all(converged)
        result = results.where(claims, results.nonlinear_divergence, result)
        result = results.where(met, results.successful, result)
    measured = statistics(residual, norm, converged, None, None)
    stats = {**sol.stats, **{k: v for k, v in measured.items() if v is not None}}
    sol = optx.Solution(value, result, None, stats, sol.state)
    return unless_lost(sol, solver)
