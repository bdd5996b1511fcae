"""optimistix's solvers as solvers of fixed-point problems, by one adaptor.

optimistix itself turns a fixed-point problem into a root find, that into a
least-squares problem, and that into a minimisation, and an adjoint then differentiates
the last of these: the gradient of ½‖f(z) − z‖², whose Jacobian is as badly conditioned
as I − J squared, and wrong where f(z) − z is not quite 0. Behind the adaptor an adjoint
sees f(z) − z, whatever finds its zero.
"""

from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._types import Args, Aux, Flags, Map, Options, Reals, Y
from ._base import AbstractSolver

KINDS = (
    optx.AbstractFixedPointSolver,
    optx.AbstractRootFinder,
    optx.AbstractLeastSquaresSolver,
    optx.AbstractMinimiser,
)

AnySolver: TypeAlias = (
    optx.AbstractFixedPointSolver
    | optx.AbstractRootFinder
    | optx.AbstractLeastSquaresSolver
    | optx.AbstractMinimiser
)
"""What `solver` may be: one of `KINDS`."""

# The point returned may lie a step beyond the one whose residual passed the test.
_SLACK = 2.0


def as_solver(solver: Any) -> Any:
    """A deqjax solver as it is, one of optimistix behind the adaptor."""
    return (
        solver
        if isinstance(solver, AbstractSolver | FromOptimistix)
        else FromOptimistix(solver)
    )


class _Evaluation(eqx.Module):
    """What an evaluation of f at some z leaves, carried out of a step as its aux.

    Attributes:
        happened: false in the zeros that optimistix makes up before there is any.
        residual: ‖f(z) − z‖₂.
        size: f(z) − z by the norm and the tolerances of the foreign solver.
    """

    happened: Flags
    residual: Reals
    size: Reals

    @staticmethod
    def none(dtype: Any) -> "_Evaluation":
        blank = jnp.full((), jnp.nan, dtype)
        return _Evaluation(jnp.array(False), blank, blank)


class _Problem(eqx.Module):
    """What the foreign solver is to solve: f, f(z) − z or ½‖f(z) − z‖².

    Its arithmetic is done in one dtype, at least the default one: optimistix
    initialises parts of its states in that, and its linear solvers have no half
    precision. Only f itself sees the dtypes of the iterate.
    """

    fn: Map
    solver: optx.AbstractIterativeSolver
    dtypes: PyTree = eqx.field(static=True)

    def narrow(self, z: PyTree) -> PyTree:
        return jtu.tree_map(lambda x, d: x.astype(d), z, self.dtypes)

    def evaluate(self, z: PyTree, args: Args) -> tuple[PyTree, _Evaluation, PyTree]:
        f, aux = self.fn(self.narrow(z), args)
        f = _widen(f)
        r, g = lax.stop_gradient((jtu.tree_map(jnp.subtract, f, z), f))
        rtol, atol = self.solver.rtol, self.solver.atol

        def scaled(r: Array, g: Array) -> Array:
            # 0 counts as 0 whatever the tolerance, NaN as NaN.
            return jnp.where(r == 0, 0, r / (atol + rtol * jnp.abs(g)))

        relative = jtu.tree_map(scaled, r, g)
        # All norms of a number agree; and those of optimistix's scalar solvers, jitted
        # functions in a class, are bound to the solver as methods.
        scalar = sum(x.size for x in jtu.tree_leaves(r)) == 1
        size = _tree.max_abs(relative) if scalar else self.solver.norm(relative)
        return f, _Evaluation(jnp.array(True), _tree.norm(r), size), aux

    def __call__(self, z: PyTree, args: Args) -> tuple[PyTree, PyTree]:
        f, evaluation, aux = self.evaluate(z, args)
        if isinstance(self.solver, optx.AbstractFixedPointSolver):
            return f, (evaluation, aux)
        r = jtu.tree_map(jnp.subtract, f, z)
        if isinstance(self.solver, optx.AbstractMinimiser):
            return 0.5 * _tree.dot(r, r), (evaluation, aux)
        return r, (evaluation, aux)


class _State(eqx.Module):
    """The foreign state; `z` is the iterate where it is wider than what f sees."""

    foreign: Any
    z: PyTree
    last: _Evaluation


class FromOptimistix(optx.AbstractFixedPointSolver[Y, Aux, Any]):
    r"""A solver of optimistix, run on z = f(z).

    A fixed-point solver is given f, a root finder and a least-squares solver
    f(z) − z, a minimiser ½‖f(z) − z‖². It stops when it says so *and* f(z) − z is near
    zero at the point that it evaluated last:

    $$ \left\lVert \frac{f(z) - z}{\mathrm{atol} + \mathrm{rtol}\, |f(z)|} \right\rVert
       \le 1 $$

    entry by entry, in its own norm and with its own tolerances, as optimistix measures
    differences of iterates. So a minimiser in a local minimum goes on, until
    `max_steps`. In the end f is evaluated at the point that is returned, which may lie
    one step further: `converged` if the same is at most 2 there.

    `residual`, `relative_residual`, `converged`, `value` and `aux` are all of that last
    evaluation. There is no `num_evals`: optimistix does not say what its solvers spend.

    **Cost:** that of the solver, and one evaluation. **Memory:** that of the solver.

    Args:
        solver: a fixed-point solver, root finder, least-squares solver or minimiser of
            optimistix, or of the kind.

    Raises:
        ValueError: if the solver has no tolerances.
    """

    solver: optx.AbstractIterativeSolver

    # Written out for pyright, which counts the tolerances among the arguments.
    def __init__(self, solver: optx.AbstractIterativeSolver):
        if solver.rtol is None or solver.atol is None:
            raise ValueError(
                f"`{type(solver).__name__}` needs `rtol` and `atol` for its residual "
                f"to be judged by; got rtol={solver.rtol!r}, atol={solver.atol!r}."
            )
        self.solver = solver

    # Fields of the base class, which here are those of the solver inside.
    @property
    def rtol(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.rtol

    @property
    def atol(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.atol

    @property
    def norm(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.solver.norm

    def _problem(self, fn: Map, y: PyTree) -> _Problem:
        return _Problem(fn, self.solver, jtu.tree_map(lambda x: x.dtype, y))

    def _tags(self, tags: frozenset[object]) -> frozenset[object]:
        # What the caller says of J − I holds for the Jacobian of f(z) − z alone.
        kinds = (optx.AbstractFixedPointSolver, optx.AbstractRootFinder)
        return tags if isinstance(self.solver, kinds) else frozenset()

    def init(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: frozenset[object],
    ) -> _State:
        z = _widen(y)
        dtype = jtu.tree_leaves(z)[0].dtype
        last = _Evaluation.none(dtype)
        scalar = isinstance(self.solver, optx.AbstractMinimiser)
        out = jax.eval_shape(lambda: last.size if scalar else z)
        structs = out, (jax.eval_shape(lambda: last), aux_struct)
        with _lenient():
            foreign = self.solver.init(
                self._problem(fn, y), z, args, options, *structs, self._tags(tags)
            )
        leaves = jtu.tree_leaves(y)
        wide = z if any(leaf.dtype != dtype for leaf in leaves) else None
        return _State(foreign, wide, last)

    def step(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        state: _State,
        tags: frozenset[object],
    ) -> tuple[Y, _State, Aux]:
        problem = self._problem(fn, y)
        z = y if state.z is None else state.z
        with _lenient():
            z, foreign, (last, aux) = self.solver.step(
                problem, z, args, options, state.foreign, self._tags(tags)
            )
        blank = _Evaluation.none(last.size.dtype)
        last = _tree.where(last.happened, last, blank)
        wide = None if state.z is None else z
        return problem.narrow(z), _State(foreign, wide, last), aux

    def terminate(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        state: _State,
        tags: frozenset[object],
    ) -> tuple[Array, optx.RESULTS]:
        problem, z = self._problem(fn, y), _widen(y)
        with _lenient():
            done, result = self.solver.terminate(
                problem, z, args, options, state.foreign, self._tags(tags)
            )
        return done & (state.last.size <= 1), result

    def postprocess(
        self,
        fn: Map,
        y: Y,
        aux: Aux,
        args: Args,
        options: Options,
        state: _State,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        problem = self._problem(fn, y)
        z = y if state.z is None else state.z
        carried = options, state.foreign, self._tags(tags), result
        with _lenient():
            z, _, stats = self.solver.postprocess(
                problem, z, (state.last, aux), args, *carried
            )
        y = problem.narrow(z)
        f, final, aux = problem.evaluate(_widen(y), args)
        norm = _tree.norm(lax.stop_gradient(f))
        tiny = jnp.finfo(norm.dtype).tiny
        ours = {
            "residual": final.residual,
            "relative_residual": final.residual / jnp.maximum(norm, tiny),
            "converged": (result == optx.RESULTS.successful) & (final.size <= _SLACK),
        }
        return y, aux, {**stats, **ours}

    def last_residual(self, state: _State) -> Reals:
        """‖f(z) − z‖₂ where the last step evaluated f, NaN if it did not say where."""
        return state.last.residual

    def checked(self, sol: optx.Solution) -> optx.Solution:
        """`sol` with a result that is successful only if its residual is near zero."""
        results = optx.RESULTS
        honest = results.where(
            jnp.isfinite(sol.stats["residual"]),
            results.nonlinear_divergence,
            results.nonfinite,
        )
        claims = sol.result == results.successful
        doubtful = claims & ~sol.stats["converged"]
        result = results.where(doubtful, honest, sol.result)
        return eqx.tree_at(lambda s: s.result, sol, result)


def _lenient() -> Any:
    # optimistix and optax lean on implicit promotion here and there.
    return jax.numpy_dtype_promotion("standard")


def _widen(tree: PyTree) -> PyTree:
    """All leaves in the widest of their dtypes and the default one."""
    dtypes = [_tree.wide(leaf.dtype) for leaf in jtu.tree_leaves(tree)]
    dtypes.append(jnp.dtype(jnp.result_type(float)))
    dtype = max(dtypes, key=lambda d: d.itemsize)
    return jtu.tree_map(lambda x: x.astype(dtype), tree)
