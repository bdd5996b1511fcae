"""Deep equilibria as steady states of ordinary differential equations."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._fixed_point import fixed_point
from .._fold import fold
from .._tree import wide
from ..adjoints import ReversibleAdjoint, UnrolledAdjoint
from ..solvers import Picard
from ._checks import check_count, check_positive
from ._deq import DEQ, apply_cell


def _diffrax(name: str) -> Any:
    """The library, or how to get it."""
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(
            f"`{name}` integrates with diffrax, which is not installed. Install it "
            "with `pip install 'deqjax[ode]'`."
        ) from error
    return diffrax


class NeuralODE(eqx.Module):
    r"""The neural ODE whose steady states are the equilibria of a cell.

    $$ \frac{\mathrm{d} z}{\mathrm{d} t} = f(z, x) - z, \qquad z(0) = z_0, \qquad
       \text{returns } z(T) $$

    The twin of `deqjax.nn.DEQ` for comparisons: the same cell, the same call, the same
    parameters; an explicit Euler step of size β is a step of `deqjax.Picard(beta=β)`.
    As T grows, z(T) tends to the fixed point if every eigenvalue of ∂f/∂z there has a
    real part below 1 and z₀ is near enough. The gradient is that of z(T), by diffrax.

    **Needs** diffrax: `pip install 'deqjax[ode]'`.

    A batch given at once is one equation, with one step size; `jax.vmap` gives each of
    its members steps of its own.

    Args:
        cell: as for `deqjax.nn.DEQ`.
        end_time: T.
        solver: one of diffrax; default: `diffrax.Tsit5()`.
        dt0: the size of the first step, and of every step of a solver without an error
            estimate, `diffrax.Euler()` say, which needs it; None: chosen by diffrax.
        rtol: relative tolerance of the step size.
        atol: absolute tolerance of the step size.
        adjoint: one of diffrax; default: `diffrax.RecursiveCheckpointAdjoint()`.
        max_steps: most steps.

    Raises:
        ImportError: without diffrax.
        TypeError, ValueError: if an argument is not valid.

    References:
        R. T. Q. Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud (2018), Neural ordinary
        differential equations, doi:10.48550/arXiv.1806.07366.

        P. Kidger (2022), On neural differential equations,
        doi:10.48550/arXiv.2202.02435.
    """

    cell: Any
    end_time: float = eqx.field(default=1.0, kw_only=True, static=True)
    solver: Any = eqx.field(default=None, kw_only=True)
    dt0: float | None = eqx.field(default=None, kw_only=True, static=True)
    rtol: float = eqx.field(default=1e-4, kw_only=True, static=True)
    atol: float = eqx.field(default=1e-6, kw_only=True, static=True)
    adjoint: Any = eqx.field(default=None, kw_only=True)
    max_steps: int = eqx.field(default=4096, kw_only=True, static=True)

    def __check_init__(self):
        _diffrax("NeuralODE")
        DEQ(self.cell)  # Checks the cell.
        check_count("max_steps", self.max_steps, 1)
        for name, value in (
            ("end_time", self.end_time),
            ("rtol", self.rtol),
            ("atol", self.atol),
        ):
            check_positive(name, value)
        _check_steps(self.solver, self.dt0)

    def __call__(
        self, x: PyTree, *, z0: PyTree = None, key: Array | None = None
    ) -> PyTree:
        """z(T); arguments as for `deqjax.nn.DEQ`."""
        return jtu.tree_map(lambda z: z[-1], self.solve(x, z0=z0, key=key).ys)

    def solve(self, x: PyTree, *, z0: PyTree = None, key: Array | None = None) -> Any:
        """As `__call__`, with all that `diffrax.diffeqsolve` returns.

        `sol.ys` has a leading axis of length 1, `sol.result` says whether T was
        reached, `sol.stats` how many steps that took.
        """
        return _integrate(
            (self.cell, x, key),
            DEQ(self.cell).initial_state(x) if z0 is None else z0,
            self.end_time,
            solver=self.solver,
            dt0=self.dt0,
            tolerance=(self.rtol, self.atol),
            steady=None,
            adjoint=self.adjoint,
            max_steps=self.max_steps,
        )

    def deq(self, **settings: Any) -> DEQ:
        """The equilibrium layer with the same cell; `settings` are its arguments."""
        return DEQ(self.cell, **settings)


class SteadyStateODE(eqx.Module):
    r"""A deep equilibrium layer solved as the steady state of its ODE.

    $$ \frac{\mathrm{d} z}{\mathrm{d} t} = f(z, x) - z = 0 $$

    Integrates until ‖f(z) − z‖ ≤ atol + rtol ‖z‖, in the 2-norm, and takes the gradient
    that an implicit adjoint gives at the end: none of it goes through the integration.

    **Converges** near a fixed point where every eigenvalue of ∂f/∂z has a real part
    below 1: those of a contraction do, but so do those of maps for which `Picard`
    diverges. **Fails** visibly: `stats["converged"]` and `result` are those of the
    fixed-point problem at the last z.

    **Cost:** six evaluations per step of the default integrator. Far more than a
    fixed-point solver takes: meant for comparisons, and for maps that need it.

    **Needs** diffrax: `pip install 'deqjax[ode]'`.

    Args:
        cell: as for `deqjax.nn.DEQ`.
        rtol: tolerance relative to ‖z‖.
        atol: absolute tolerance.
        solver: one of diffrax; default: `diffrax.Tsit5()`.
        dt0: the size of the first step, and of every step of a solver without an error
            estimate, `diffrax.Euler()` say, which needs it; None: chosen by diffrax.
        adjoint: an implicit one of deqjax; default: `deqjax.ImplicitAdjoint()`.
        max_time: where to give up.
        max_steps: most steps.

    Raises:
        ImportError: without diffrax.
        TypeError, ValueError: if an argument is not valid.

    References:
        S. Bai, J. Z. Kolter, V. Koltun (2019), Deep equilibrium models,
        doi:10.48550/arXiv.1909.01377.

        P. Kidger (2022), On neural differential equations,
        doi:10.48550/arXiv.2202.02435.
    """

    cell: Any
    rtol: float = eqx.field(default=1e-4, kw_only=True, static=True)
    atol: float = eqx.field(default=1e-6, kw_only=True, static=True)
    solver: Any = eqx.field(default=None, kw_only=True)
    dt0: float | None = eqx.field(default=None, kw_only=True, static=True)
    adjoint: optx.AbstractAdjoint | None = eqx.field(default=None, kw_only=True)
    max_time: float = eqx.field(default=1e3, kw_only=True, static=True)
    max_steps: int = eqx.field(default=4096, kw_only=True, static=True)

    def __check_init__(self):
        _diffrax("SteadyStateODE")
        DEQ(self.cell)  # Checks the cell.
        check_count("max_steps", self.max_steps, 1)
        for name, value in (
            ("max_time", self.max_time),
            ("rtol", self.rtol),
            ("atol", self.atol),
        ):
            check_positive(name, value)
        _check_steps(self.solver, self.dt0)
        if isinstance(self.adjoint, UnrolledAdjoint | ReversibleAdjoint):
            raise TypeError(
                "`adjoint` must be an implicit one, which needs the steady state "
                f"alone; got {type(self.adjoint).__name__}, which needs the steps of a "
                "fixed-point solver. For the gradient of an integration use "
                "`NeuralODE`."
            )

    def __call__(
        self, x: PyTree, *, z0: PyTree = None, key: Array | None = None
    ) -> PyTree:
        """The steady state; arguments as for `deqjax.nn.DEQ`."""
        return self.solve(x, z0=z0, key=key).value

    def solve(
        self, x: PyTree, *, z0: PyTree = None, key: Array | None = None
    ) -> optx.Solution:
        """As `__call__`, with all that `deqjax.fixed_point` returns at its last step.

        `stats` has besides `time`, at which the integration ended, and
        `num_ode_steps`.
        """
        args = (self.cell, x, key)
        start = DEQ(self.cell).initial_state(x) if z0 is None else z0
        # Finer steps than the tolerance asked for, or their errors keep z from it; and
        # a test that leaves room for a last evaluation that rounds otherwise.
        fixed_args, fixed_start = _constant((args, start))
        ode = _integrate(
            fixed_args,
            fixed_start,
            self.max_time,
            solver=self.solver,
            dt0=self.dt0,
            tolerance=(0.1 * self.rtol, 0.1 * self.atol),
            steady=(0.9 * self.rtol, 0.9 * self.atol),
            adjoint=None,
            max_steps=self.max_steps,
        )
        end = _constant(jtu.tree_map(lambda z: z[-1], ode.ys))
        sol = fixed_point(
            apply_cell,
            end,
            args,
            solver=Picard(self.rtol, self.atol),
            adjoint=self.adjoint,
            max_steps=1,
        )
        stats = {k: v for k, v in sol.stats.items() if k in _MEASURED}
        stats["time"] = ode.ts[-1]
        stats["num_ode_steps"] = ode.stats["num_steps"]
        return eqx.tree_at(lambda s: s.stats, sol, stats)


# What one evaluation at the steady state measures.
_MEASURED = ("residual", "relative_residual", "converged")


@eqx.filter_jit
def _integrate(
    args: Any,
    z0: PyTree,
    end_time: float,
    *,
    solver: Any,
    dt0: float | None,
    tolerance: tuple[float, float],
    steady: tuple[float, float] | None,
    adjoint: Any,
    max_steps: int,
) -> Any:
    """Integrate from time 0 to `end_time`, or until steady to these tolerances."""
    diffrax = _diffrax("deqjax.nn")
    # As in `deqjax.fixed_point`: what does not depend on z is computed once.
    rest, kept, _ = fold(apply_cell, z0, args)
    # Times, steps and states in one dtype, at least float32; the cell in its own.
    dtype = max((wide(a.dtype) for a in jtu.tree_leaves(z0)), key=lambda d: d.itemsize)
    narrow = lambda z: jtu.tree_map(lambda a, b: a.astype(b.dtype), z, z0)

    def field(t: Any, z: PyTree, kept: PyTree) -> PyTree:
        return jtu.tree_map(lambda f, z: f.astype(dtype) - z, rest(narrow(z), kept), z)

    start = jtu.tree_map(lambda a: a.astype(dtype), z0)
    times = (jnp.asarray(t, dtype) for t in (0.0, end_time))
    solver = diffrax.Tsit5() if solver is None else solver
    controller = diffrax.PIDController(*tolerance)
    if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        controller = diffrax.ConstantStepSize()
    event = None
    if steady is not None:
        event = diffrax.Event(diffrax.steady_state_event(*steady, optx.two_norm))
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        *times,
        None if dt0 is None else jnp.asarray(dt0, dtype),
        start,
        kept,
        stepsize_controller=controller,
        adjoint=diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        event=event,
        max_steps=max_steps,
        throw=False,
    )
    # Where the field is not finite no step is taken, and z₀ would be the answer.
    found = _tree.all_finite(field(None, start, kept))
    ys = jtu.tree_map(lambda a: jnp.where(found, a, jnp.nan), narrow(sol.ys))
    return eqx.tree_at(lambda s: s.ys, sol, ys)


def _check_steps(solver: Any, dt0: Any) -> None:
    """Raise unless `solver` is one of diffrax that knows how large its steps are."""
    diffrax = _diffrax("deqjax.nn")
    if dt0 is not None:
        check_positive("dt0", dt0)
    if solver is None:
        return
    if not isinstance(solver, diffrax.AbstractSolver):
        raise TypeError(
            "`solver` must be one of diffrax (an instance, not the class); got "
            f"{solver!r}."
        )
    if dt0 is None and not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        raise ValueError(
            f"`dt0`, the size of its steps, is needed for {type(solver).__name__}, "
            "which has no error estimate to choose them by."
        )


def _constant(tree: PyTree) -> PyTree:
    """The tree, without derivatives."""
    return jtu.tree_map(
        lambda a: lax.stop_gradient(a) if eqx.is_inexact_array(a) else a, tree
    )
