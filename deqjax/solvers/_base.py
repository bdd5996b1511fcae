"""What all deqjax solvers share: the stopping rule, and the interface of optimistix."""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, Generic

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._checks import (
    check_beta as check_beta,
    check_count as check_count,
    check_tolerance,
)
from .._problem import Problem
from .._types import Args, Aux, Flags, Map, Options, Reals, Tolerance, Y
from ._drive import Carry, Iteration, State, Trial as Trial
from ._record import Record, statistics as statistics

# The relative tolerance of solvers that are given none, by the dtype of the state. In
# half precision it is a few units in the last place: rounding keeps the residual from
# falling much further. The absolute tolerance is a hundredth of it.
_DEFAULT_RTOL = {"float64": 1e-8, "float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}


class Measured(eqx.Module):
    """What a map may return as its `aux`: the norms to be tested in place of its own.

    For maps whose fixed points solve a different equation: stop on the residual of
    that one.

    Attributes:
        residual: in place of ‖f(z) − z‖.
        norm: in place of ‖f(z)‖.
    """

    residual: Reals
    norm: Reals


def relax(a: PyTree, f: PyTree, betas: PyTree) -> PyTree:
    """(1 − β) a + β f, rounded once to the dtype of the state; β may be a tree."""

    def leaf(a: Array, f: Array, beta: Any) -> Array:
        dtype = _tree.wide(a.dtype)
        beta = jnp.asarray(beta, dtype)
        return ((1 - beta) * a.astype(dtype) + beta * f.astype(dtype)).astype(a.dtype)

    if jtu.all_leaves([betas]):
        betas = jtu.tree_map(lambda _: betas, a)
    return jtu.tree_map(leaf, a, f, betas)


class AbstractSolver(optx.AbstractFixedPointSolver[Y, Aux, State], Generic[Y, Aux]):
    """A fixed-point solver with the stopping rule and the statistics of deqjax.

    The one stopping rule, per problem and in the 2-norm:

        ‖f(z) − z‖ ≤ atol + rtol ‖f(z)‖

    A tolerance "auto" is that of the coarsest dtype in the state. With
    `rtol=None, atol=None` nothing is tested, and exactly `max_steps` steps are taken in
    a loop of static length.

    A method is its `update`, and `init_memory` if it remembers something; evaluations,
    the record, batches and the loop are the library's. A subclass has the four fields
    `rtol`, `atol`, `min_steps` and `batch_ndim`; all else has defaults.

    Raises:
        ValueError: when built, if one of the four fields is not valid.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> class Half(deqjax.solvers.AbstractSolver):
        ...     rtol: float = 1e-4
        ...     atol: float = 1e-6
        ...     min_steps: int = 0
        ...     batch_ndim: int = 0
        ...     def update(self, z, f, memory, trial):
        ...         return (z + f) / 2, memory
        >>> f = lambda z, _: jnp.cos(z)
        >>> sol = deqjax.fixed_point(f, jnp.ones(()), solver=Half())
        >>> round(float(sol.value), 3)
        0.739
    """

    # optimistix has floats alone; None is for a solve without a test.
    rtol: eqx.AbstractVar[Tolerance]  # pyright: ignore[reportIncompatibleVariableOverride]
    atol: eqx.AbstractVar[Tolerance]  # pyright: ignore[reportIncompatibleVariableOverride]
    min_steps: eqx.AbstractVar[int]
    batch_ndim: eqx.AbstractVar[int]

    # Of the stopping rule; optimistix asks every solver for it.
    norm: ClassVar[Callable[[PyTree], Array]] = staticmethod(optx.two_norm)

    known_options: ClassVar[frozenset[str]] = frozenset({"step_budget", "record"})

    # Whether an iterate comes of the last one alone: such an iteration can be stopped
    # and resumed, and can run a map that changes from step to step.
    plain: ClassVar[bool] = False

    # Evaluations of f in a step, of which the first is tested.
    evals_per_step: ClassVar[int] = 1

    # Whether `update` leaves the memory of problems that have ended as it is. Else the
    # driver selects, which would copy a history.
    freezes_memory: ClassVar[bool] = False

    def __check_init__(self):
        for name, tol in (("rtol", self.rtol), ("atol", self.atol)):
            if tol is None or isinstance(tol, Array) or tol == "auto":
                continue
            if isinstance(tol, bool) or not (
                isinstance(tol, int | float) and math.isfinite(tol) and tol >= 0
            ):
                raise ValueError(
                    f'`{name}` must be a non-negative number, "auto" for that of the '
                    f"dtype, or None for a solve without a test; got {tol!r}."
                )
        if (self.rtol is None) != (self.atol is None):
            raise ValueError(
                f"`rtol` and `atol` must both be tolerances, or both None for a loop "
                f"of static length; got rtol={self.rtol!r}, atol={self.atol!r}."
            )
        check_count("batch_ndim", self.batch_ndim, 0)
        check_count("min_steps", self.min_steps, 0)

    # What a method is

    @abc.abstractmethod
    def update(self, z: Y, f: Y, memory: PyTree, trial: Trial) -> tuple[Y, PyTree]:
        """The next iterate from f = fn(z), and the memory that goes with it.

        What it returns for problems that have ended is not used, but for a memory
        under `freezes_memory`.
        """

    def init_memory(self, z: Y, options: Options) -> PyTree:
        """The memory before the first evaluation."""
        return None

    def evaluate(self, fn: Map, z: Y, args: Args) -> tuple[Y, Aux, Any]:
        """f, aux, and whatever else an evaluation gives an update."""
        return *fn(z, args), None

    def kept(self, memory: PyTree) -> PyTree:
        """The part of the memory that belongs to the iterate, and is kept with it."""
        return None

    def recovers(self, record: Record, memory: PyTree) -> bool | Flags:
        """Whether the method can go on from an f that is not finite."""
        return False

    def prepared(self, z: Y, options: Options) -> "AbstractSolver":
        """The solver with what the options of this solve say of it.

        Raises:
            ValueError: if something of it does not fit z.
        """
        batch = _tree.batch_shape(z, self.batch_ndim)
        for name, tol in (("rtol", self.rtol), ("atol", self.atol)):
            if isinstance(tol, Array):
                check_tolerance(name, tol, batch)
        return self

    def extra_statistics(self, memory: PyTree) -> dict[str, Any]:
        """What to add to the statistics."""
        return {}

    @property
    def static(self) -> bool:
        """Whether the solve tests nothing and takes exactly `max_steps` steps."""
        return self.rtol is None

    @property
    def keeps_best(self) -> bool:
        """Whether every evaluation is recorded, and the best iterate the answer."""
        return not (self.plain and self.static)

    def without_test(self) -> "AbstractSolver":
        """The same solver, taking exactly `max_steps` steps."""
        tolerances = lambda s: (s.rtol, s.atol)
        return eqx.tree_at(tolerances, self, (None, None), is_leaf=lambda x: x is None)

    # The stopping rule

    def tolerances(self, z: PyTree) -> tuple[float | Array, float | Array] | None:
        """`rtol` and `atol` for the state z, of which the dtypes count; None: no test.

        The coarsest dtype decides: the norms are those of the whole state.
        """
        if self.rtol is None or self.atol is None:
            return None
        dtypes = [leaf.dtype for leaf in jtu.tree_leaves(z)]
        coarsest = max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps))
        known = _DEFAULT_RTOL.get(coarsest.name, 4 * float(jnp.finfo(coarsest).eps))
        rtol = known if isinstance(self.rtol, str) else self.rtol
        return rtol, known / 100 if isinstance(self.atol, str) else self.atol

    def is_converged(self, residual: Reals, norm: Reals, z: PyTree) -> Flags:
        """The stopping rule; false where a norm is not finite (∞ ≤ ∞ is true).

        z is the state, for tolerances that its dtype decides.

        Squares of numbers around 1e-19 in float32 are lost, and a residual of 0 may be
        one of that size. So a tolerance below what norms resolve is never met.
        """
        tolerances = self.tolerances(z)
        if tolerances is None:
            return jnp.zeros_like(norm, dtype=bool)
        rtol, atol = tolerances
        tol = atol + rtol * norm
        resolved = 2.0**10 * math.sqrt(float(jnp.finfo(norm.dtype).tiny))
        return (jnp.maximum(residual, resolved) <= tol) & jnp.isfinite(norm)

    def enter(
        self, record: Record, active: Flags, z: Y, memory: PyTree, f: Y, aux: Aux
    ) -> Record:
        """The record with an evaluation f = fn(z) of the active problems.

        It carries no derivative: norms have none at 0.
        """
        f, at = lax.stop_gradient((f, z))
        if isinstance(aux, Measured):
            residual, norm = lax.stop_gradient((aux.residual, aux.norm))
        else:
            residual = _tree.norm(_tree.subtract(f, at), self.batch_ndim)
            norm = _tree.norm(f, self.batch_ndim)
        enough = record.num_steps >= self.min_steps
        converged = self.is_converged(residual, norm, at) & enough
        recovers = self.recovers(record, memory)
        value = z, self.kept(memory)
        return record.enter(active, residual, norm, converged, recovers, value, aux)

    # The interface of optimistix

    def iteration(self, problem: Problem) -> Iteration:
        """The solve of a problem by this solver."""
        return Iteration(problem)

    def init(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: frozenset[object],
    ) -> State:
        return self._run(fn, y, args, options, aux_struct).begin().state

    def step(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        state: State,
        tags: frozenset[object],
    ) -> tuple[Y, State, Aux]:
        run = self._run(fn, y, args, options)
        carry = run.advance(Carry(y, state))
        for _ in range(1, self.evals_per_step):
            if self.static:
                carry = run.advance(carry)
            else:
                # The evaluation that ends a solve is the only one of its step.
                carry = lax.cond(run.going(carry), run.advance, run.skip, carry)
        aux = carry.state.record.aux if self.keeps_best else carry.aux
        return carry.z, carry.state, aux

    def terminate(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        state: State,
        tags: frozenset[object],
    ) -> tuple[Array, optx.RESULTS]:
        if self.static:
            return jnp.array(False), optx.RESULTS.successful
        return state.record.status()

    def postprocess(
        self,
        fn: Map,
        y: Y,
        aux: Aux,
        args: Args,
        options: Options,
        state: State,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        solved = self._run(fn, y, args, options).finish(Carry(y, state, aux))
        return solved.value, solved.aux, solved.stats

    def _run(
        self, fn: Map, y: Y, args: Args, options: Options, aux_struct: PyTree = None
    ) -> Iteration:
        solver, rest = self.prepared(y, options), (None, None, aux_struct, frozenset())
        return Iteration(Problem(fn, solver, y, args, options, *rest))
