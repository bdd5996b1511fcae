"""Monotone operator equilibrium networks."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from .. import _tree
from .._fixed_point import fixed_point
from ..solvers import Picard
from ..solvers._base import AbstractSolver, Measured, statistics
from ._checks import batched_solver, check_count, check_sizes
from ._deq import unless_lost
from ._images import average
from ._monotone import AbstractMonotone, MonotoneConv, MonotoneDense
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
    solver: Any
    adjoint: optx.AbstractAdjoint | None
    max_steps: int = eqx.field(static=True)

    def __init__(
        self,
        operator: AbstractMonotone,
        *,
        splitting: AbstractSplitting | None = None,
        solver: Any = None,
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
        tested = isinstance(self.solver, AbstractSolver) and not self.solver.static
        sol = fixed_point(
            _measured if tested else _split,
            start,
            (self.splitting, operator, x),
            solver=self.solver,
            adjoint=self.adjoint,
            max_steps=self.max_steps,
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


class MonotoneClassifier(eqx.Module):
    """A linear classifier of a monotone equilibrium's coarsest tier.

    | constructor | parameters | equilibrium | inputs |
    |---|---|---|---|
    | `mnist_dense` | 84,313 | 87 | 784 |
    | `cifar10_conv` | 172,218 | 81 × 34 × 34 | 3 × 32 × 32 |
    | `cifar10_tiers` | 170,194 | 16 × 34 × 34, 32 × 18 × 18, 60 × 10 × 10 | 3 × 32 × 32 |
    | `cifar10_conv_large` | 853,612 | 200 × 34 × 34 | 3 × 32 × 32 |
    | `cifar10_tiers_large` | 1,014,546 | 64 × 34 × 34, 128 × 18 × 18, 128 × 10 × 10 | 3 × 32 × 32 |

    **Differences from the source:** see `MonotoneConv`; the step size α of the
    splitting is not tuned during training; the authors stop at a relative change of
    1e-2 in z of the whole batch.

    Args:
        layer: the equilibrium.
        shape: of one input, without the batch.
        num_classes: length of the output.
        pool: side of the squares over which a convolutional equilibrium is averaged;
            rows and columns that do not fill a square are left out.
        key: decides the initial parameters.

    Raises:
        TypeError, ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, equinox as eqx, jax
        >>> make = deqjax.nn.MonotoneClassifier.cifar10_conv
        >>> model = eqx.filter_eval_shape(make, key=jax.random.key(0))
        >>> deqjax.nn.count_parameters(model)
        172218

    References:
        E. Winston, J. Z. Kolter (2020), Monotone operator equilibrium networks,
        doi:10.48550/arXiv.2006.08591.
    """  # noqa: E501 (a row of the table cannot be broken)

    layer: MonotoneDEQ
    head: eqx.nn.Linear
    pool: int = eqx.field(static=True)

    def __init__(
        self,
        layer: MonotoneDEQ,
        shape: tuple[int, ...],
        num_classes: int,
        *,
        pool: int = 1,
        key: PRNGKeyArray,
    ):
        check_sizes(num_classes=num_classes, pool=pool)
        self.layer = layer
        self.pool = pool
        # Every operator has a U with a weight, a linear layer or a convolution.
        weight = layer.operator.U.weight  # pyright: ignore[reportAttributeAccessIssue]
        example = jax.ShapeDtypeStruct((1, *shape), weight.dtype)
        features = eqx.filter_eval_shape(
            lambda x: self._features(layer.operator.initial_state(x)), example
        )
        if features.shape[1] == 0:
            raise ValueError(
                "`pool` must be at most the side of the equilibrium's coarsest tier: "
                f"nothing is left to classify; got {pool} for inputs of shape {shape}."
            )
        self.head = eqx.nn.Linear(features.shape[1], num_classes, key=key)

    def __call__(self, x: Array, *, z0: Any = None) -> Float[Array, "batch classes"]:
        """The logits; arguments as for `MonotoneDEQ`."""
        return self.logits(self.solve(x, z0=z0).value)

    def solve(
        self,
        x: Any,
        *,
        z0: Any = None,
        throw: bool = False,
        options: dict[str, Any] | None = None,
    ) -> optx.Solution:
        """The equilibrium, as `MonotoneDEQ.solve`."""
        return self.layer.solve(x, z0=z0, throw=throw, options=options)

    def logits(self, z: Any) -> Float[Array, "batch classes"]:
        """The logits that belong to an equilibrium."""
        return jax.vmap(self.head)(self._features(z))

    def _features(self, z: Any) -> Float[Array, "batch features"]:
        z = z[-1] if isinstance(z, tuple) else z
        z = average(z, self.pool) if z.ndim == 4 else z
        return z.reshape(len(z), -1)

    # Published configurations

    @classmethod
    def mnist_dense(cls, *, key: PRNGKeyArray, **settings: Any) -> "MonotoneClassifier":
        """84,313 parameters; `settings` go to `MonotoneDEQ`."""
        key1, key2 = jr.split(key)
        operator = MonotoneDense(784, 87, key=key1)
        return cls(MonotoneDEQ(operator, **settings), (784,), 10, key=key2)

    @classmethod
    def cifar10_conv(
        cls, *, key: PRNGKeyArray, **settings: Any
    ) -> "MonotoneClassifier":
        """172,218 parameters; `settings` go to `MonotoneDEQ`."""
        return cls._convolutional((81,), 4, key, settings)

    @classmethod
    def cifar10_tiers(
        cls, *, key: PRNGKeyArray, **settings: Any
    ) -> "MonotoneClassifier":
        """170,194 parameters; `settings` go to `MonotoneDEQ`."""
        return cls._convolutional((16, 32, 60), 1, key, settings)

    @classmethod
    def cifar10_conv_large(
        cls, *, key: PRNGKeyArray, **settings: Any
    ) -> "MonotoneClassifier":
        """853,612 parameters; `settings` go to `MonotoneDEQ`."""
        return cls._convolutional((200,), 4, key, settings)

    @classmethod
    def cifar10_tiers_large(
        cls, *, key: PRNGKeyArray, **settings: Any
    ) -> "MonotoneClassifier":
        """1,014,546 parameters; `settings` go to `MonotoneDEQ`."""
        return cls._convolutional((64, 128, 128), 1, key, settings)

    @classmethod
    def _convolutional(
        cls,
        channels: tuple[int, ...],
        pool: int,
        key: PRNGKeyArray,
        settings: dict[str, Any],
    ) -> "MonotoneClassifier":
        key1, key2 = jr.split(key)
        operator = MonotoneConv(3, channels, key=key1)
        layer = MonotoneDEQ(operator, **settings)
        return cls(layer, (3, 32, 32), 10, pool=pool, key=key2)


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
    solver, results = layer.solver, optx.RESULTS
    value = layer.splitting.read(layer.operator, sol.value)
    z, f = lax.stop_gradient((value, layer.equation(value, x)))
    ndim = getattr(solver, "batch_ndim", 0)
    residual, norm = _tree.norm(_tree.subtract(f, z), ndim), _tree.norm(f, ndim)
    converged, result = sol.stats["converged"], sol.result
    if isinstance(solver, AbstractSolver) and not solver.static:
        converged = solver.passes(residual, norm)
        # What rounding keeps from moving need not be at the equilibrium.
        claims, met = result == results.successful, jnp.all(converged)
        result = results.where(claims, results.nonlinear_divergence, result)
        result = results.where(met, results.successful, result)
    measured = statistics(residual, norm, converged, None, None)
    stats = {**sol.stats, **{k: v for k, v in measured.items() if v is not None}}
    sol = optx.Solution(value, result, None, stats, sol.state)
    return unless_lost(sol, solver)
