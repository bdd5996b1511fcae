"""The entry point."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PyTree

from ._checks import canonical_weights, check_flag
from ._fold import Traced, split, trace
from ._numbers import inputs_and_rest
from ._programs import Programs
from ._steps import Numbered
from ._structure import plain, plain_within, rebuilt
from ._tree import batch_shape, varying
from .adjoints import ImplicitAdjoint, ReversibleAdjoint, UnrolledAdjoint
from .solvers import Anderson, Reversible
from .solvers._base import check_count
from .solvers._optimistix import KINDS, FromOptimistix, as_solver


def fixed_point(
    fn: Callable[..., Any],
    z0: PyTree,
    args: PyTree = None,
    *,
    solver: Any = None,
    adjoint: optx.AbstractAdjoint | None = None,
    max_steps: Any = 64,
    has_aux: bool = False,
    has_step: bool = False,
    throw: Any = False,
    options: Any = None,
    tags: Any = frozenset(),
) -> optx.Solution:
    r"""Find z with z = fn(z, args), and make it differentiable.

    Gradients reach `args`, the arrays inside `fn` (a module, say), the values that
    `fn` closes over, and `z0` where the answer depends on it (under `UnrolledAdjoint`
    and `ReversibleAdjoint`; zero under the others). With `has_aux` they flow through
    `aux` too.

    Args:
        fn: the map, `fn(z, args) -> z`, or `fn(z, args) -> (z, aux)` with `has_aux`.
        z0: the initial iterate: a pytree of real floating-point arrays. `fn` must
            return the same structure, shapes and dtypes.
        args: any pytree, passed through to `fn`.
        solver: a deqjax solver, or any fixed-point solver, root finder, least-squares
            solver or minimiser of optimistix. Those run on f(z) − z or ½‖f(z) − z‖²
            until they say so *and* f(z) − z is within their own tolerances; the
            gradient is that of the fixed point. Default: `deqjax.Anderson()`.
        adjoint: how gradients are computed. Default: `deqjax.ReversibleAdjoint()` for a
            `deqjax.Reversible` solver, else `deqjax.ImplicitAdjoint()`.
        max_steps: most steps of the solver; the number of steps of a solve with
            `rtol=None, atol=None`.
        has_aux: whether `fn` returns a pair.
        has_step: whether `fn` takes the number of the step, `fn(z, args, step)`: an
            int32 that counts the steps before. Both evaluations of a step of
            `deqjax.Reversible` are told the same one. Noise is drawn from
            `jax.random.fold_in(key, step)`, so that backward passes see it again. For
            `deqjax.Picard` and `deqjax.Reversible`, under `deqjax.ReversibleAdjoint`
            or `deqjax.UnrolledAdjoint`: such a map has steps, but no fixed point.
        throw: whether a solve that does not succeed raises. By default it returns, and
            says so in `sol.result`; the compiled program then never calls the host.
        options: `{"step_budget": n}`: take at most n steps, n being an integer that may
            be traced, so that changing it does not recompile, or an integer array with
            a budget for every problem of the batch; `{"record": True}`: add
            `residual_history`; `{"beta": value}`: the weight on f of a
            `deqjax.Reversible` for this solve; `{"companion": y}`: its second state at
            the start, to go on from another solve; `{"first_step": n}`: the number of
            the first step, with `has_step`. The other entries that a solver of
            optimistix takes (`lower` and `upper`, say) are passed on to it.
        tags: lineax tags for the structure of J − I, for the implicit adjoint.

    Returns:
        An `optimistix.Solution`: `value`; `aux`; `result`
        (`== optimistix.RESULTS.successful` if every problem converged, or, without a
        test, stayed finite); `state`; and `stats`:

        - `num_steps`, `max_steps`;
        - `num_evals`: the exact number of evaluations of `fn` in the solve (deqjax
          solvers alone: optimistix does not count those of its own);
        - `residual`: ‖fn(value) − value‖₂ per problem, and `relative_residual`, that
          over ‖fn(value)‖₂; of the iterate evaluated last for a solve without a test;
        - `converged` per problem: whether the test was passed; False where none is
          made;
        - `residual_history`, if recorded: shape (max_steps, *batch), NaN after the end;
          for a solver of optimistix, of the points whose evaluation it hands out.

    Raises:
        ValueError, TypeError: if an argument is not valid, or if `fn` does not return
            what it was given; the message names the argument and the rule.
        RuntimeError: with `throw=True`, if the solve does not succeed.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> f = lambda z, a: jnp.tanh(0.5 * z + a)
        >>> a = jnp.array([0.1, 0.2])
        >>> sol = deqjax.fixed_point(f, jnp.zeros(2), a)
        >>> bool(jnp.allclose(sol.value, f(sol.value, a), atol=1e-3))
        True
    """
    solver = Anderson() if solver is None else solver
    if adjoint is None:
        reversible = isinstance(solver, Reversible)
        adjoint = ReversibleAdjoint() if reversible else ImplicitAdjoint()
    max_steps = _check(fn, solver, adjoint, max_steps)
    _check_tags(tags)
    throw = check_flag("`throw`", throw)
    options = _as_dictionary(options)
    first = _first_step(solver, adjoint, options.pop("first_step", None), has_step)
    if has_step and has_aux and solver.batch_ndim > 0 and not solver.static:
        raise ValueError(
            "With `has_step=True` and `has_aux=True` a tested solve needs "
            "`batch_ndim=0`: the answers of a batch are of different steps, and `aux` "
            "is evaluated for all of them at once. Use `jax.vmap`, or a solve without "
            "a test (`rtol=None, atol=None`)."
        )
    solver = as_solver(solver)
    options = _canonical_options(solver, options)
    z0 = jtu.tree_map_with_path(_canonical_leaf, z0)
    _check_budget(solver, z0, options.get("step_budget"), has_aux)
    if not jtu.tree_leaves(z0):
        raise ValueError("`z0` has no leaves: there is nothing to solve for.")
    step = () if first is None else (first,)
    traced, of_aux = _traced(fn, z0, step, args, has_aux)
    # Within `jax.shard_map` the iterate differs wherever anything in f does.
    moved = varying(z0, (traced.inputs, traced.closed.consts))
    if moved is not z0:
        z0 = moved
        traced, of_aux = _traced(fn, z0, step, args, has_aux)
    iterate = plain(z0), *step
    # Arrays and numbers are inputs of the program; what the rest says is another one.
    whole = jtu.tree_structure(z0)
    given = plain_within((solver, adjoint, options), whole)
    numbers, fixed = inputs_and_rest(given)
    # That of the numbers too: None is no number, and stands for one that is an input.
    trees = iterate, traced.struct, numbers
    structures = tuple(jtu.tree_structure(t) for t in trees)
    statics = (fixed, tags, max_steps, structures)
    program, consts = PROGRAMS.find(traced.closed, statics)
    try:
        sol = program(consts, traced.inputs, numbers)
    except TypeError as error:
        # JAX differentiates the program as a whole, where an adjoint sees nothing.
        if isinstance(adjoint, ReversibleAdjoint) and _NO_FORWARD_MODE in str(error):
            raise TypeError(_REVERSE_ONLY) from error
        raise
    if throw:
        sol = sol.result.error_if(sol, sol.result != optx.RESULTS.successful)
    aux, state = sol.aux, sol.state
    if has_aux:
        aux = rebuilt(eqx.combine(aux, traced.static[1]), of_aux)
    if isinstance(solver, Reversible):
        y = rebuilt(state.memory, whole)
        state = dataclasses.replace(state, memory=y)
    return optx.Solution(rebuilt(sol.value, whole), sol.result, aux, sol.stats, state)


# From the message of JAX for functions with a derivative rule for reverse mode alone.
_NO_FORWARD_MODE = "(jvp) to a custom_vjp function"

_REVERSE_ONLY = (
    "`ReversibleAdjoint` is for reverse mode (`jax.grad`, `jax.vjp`). For forward mode "
    "(`jax.jvp`, `jax.jacfwd`, `jax.linearize`) use "
    "`adjoint=deqjax.ImplicitAdjoint()`, the derivative of the fixed point."
)


def _traced(
    fn: Callable, z0: PyTree, step: tuple[Array, ...], args: PyTree, has_aux: bool
) -> tuple[Traced, Any]:
    """Call `fn` once, here; all else works on what it traced to.

    Also returns the structure of aux; `step` is empty for a map that is not told it.
    """
    found = []
    leaves, whole = jtu.tree_flatten(z0)
    args_leaves, args_structure = jtu.tree_flatten(args)

    def pair(
        leaves: list[Array], step: tuple[Array, ...], args: list[Any]
    ) -> tuple[PyTree, PyTree]:
        z = jtu.tree_unflatten(whole, leaves)
        out = fn(z, jtu.tree_unflatten(args_structure, args), *step)
        if not has_aux:
            out = out, None
        if not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(
                "With `has_aux=True`, `fn` must return a pair `(z, aux)`; got "
                f"{type(out).__name__}."
            )
        found[:] = map(jtu.tree_structure, out)
        return plain(out[0]), plain(out[1])

    traced = trace(pair, leaves, step, args_leaves)
    got, of_aux = found
    _check_output(z0, got, jtu.tree_leaves(traced.struct[0]))
    return traced, of_aux


def _solver_of(jaxpr: Any, statics: PyTree) -> Callable:
    """The program that solves for a map with this jaxpr."""
    fixed, tags, max_steps, (start, output, _) = statics

    def solve(
        consts: list[Array], inputs: list[Array], numbers: PyTree
    ) -> optx.Solution:
        solver, adjoint, options = eqx.combine(numbers, fixed)
        closed = jex.core.ClosedJaxpr(jaxpr, consts)
        size = start.num_leaves
        parts, kept = split(closed, inputs, size)
        z0, *first = jtu.tree_unflatten(start, inputs[:size])
        args: Any = Numbered(kept, *first, *first) if first else kept

        def rest(z: PyTree, args: Any) -> PyTree:
            step, kept = ([args.step], args.args) if first else ([], args)
            leaves = parts([*jtu.tree_leaves(z), *step], kept)
            return jtu.tree_unflatten(output, varying(leaves, z))

        sol = optx.fixed_point(
            rest,
            solver,
            z0,
            args,
            options,
            has_aux=True,
            max_steps=max_steps,
            adjoint=adjoint,
            throw=False,
            tags=tags,
        )
        if isinstance(solver, FromOptimistix):
            sol = solver.checked(sol)
        return sol

    return solve


PROGRAMS = Programs(_solver_of)


def _first_step(solver: Any, adjoint: Any, first: Any, has_step: bool) -> Array | None:
    """The number of the first step; None for a map that is not told its step."""
    if not has_step:
        if first is not None:
            raise ValueError(
                '`options["first_step"]` is for a map that is told its step: pass '
                "`has_step=True` too, or leave it out."
            )
        return None
    plain = getattr(solver, "plain", False)
    if not (plain and isinstance(adjoint, ReversibleAdjoint | UnrolledAdjoint)):
        raise ValueError(
            "With `has_step=True` the map is another one in every step and has no "
            "fixed point, so that `solver` must be `deqjax.Picard` or "
            "`deqjax.Reversible`, and `adjoint` `deqjax.ReversibleAdjoint` or "
            "`deqjax.UnrolledAdjoint`; got "
            f"{type(solver).__name__} and {type(adjoint).__name__}."
        )
    number = jnp.asarray(0 if first is None else first)
    if not jnp.issubdtype(number.dtype, jnp.integer) or number.ndim != 0:
        raise ValueError(f'`options["first_step"]` must be an integer; got {first!r}.')
    return number.astype(jnp.int32)


def _check(fn: Any, solver: Any, adjoint: Any, max_steps: Any) -> int:
    """`max_steps` as a Python integer; raises if one of them is not of its kind."""
    if not callable(fn):
        raise TypeError(f"`fn` must be callable; got {type(fn).__name__}.")
    if not isinstance(solver, KINDS):
        raise TypeError(
            "`solver` must be a deqjax solver, or a fixed-point solver, root finder, "
            "least-squares solver or minimiser of optimistix (an instance, not the "
            f"class); got {solver!r}."
        )
    if not isinstance(adjoint, optx.AbstractAdjoint):
        raise TypeError(
            "`adjoint` must be an adjoint of deqjax or optimistix (an instance, not "
            f"the class); got {adjoint!r}."
        )
    return check_count("max_steps", max_steps, 1)


def _check_tags(tags: Any) -> None:
    """Raise unless these are tags of lineax; one of another kind has no effect."""
    try:
        unknown = [
            tag for tag in tags if type(tag).__module__.split(".")[0] != "lineax"
        ]
    except TypeError:
        unknown = [tags]
    if unknown:
        raise TypeError(
            "`tags` must be a set of tags of lineax (`lineax.symmetric_tag`, …); got "
            f"{tags!r}."
        )


def _as_dictionary(options: Any) -> dict[str, Any]:
    if not (options is None or isinstance(options, Mapping)):
        raise TypeError(f"`options` must be a dictionary or None; got {options!r}.")
    return {} if options is None else dict(options)


def _canonical_options(solver: Any, options: dict[str, Any]) -> dict[str, Any]:
    known = getattr(solver, "known_options", None)
    if known is not None:
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(
                f"`options` has unknown entries {unknown} for "
                f"{type(solver).__name__}; known are {sorted(known)}."
            )
    # Arrays, so that another value is not another program.
    if "step_budget" in options:
        value = jnp.asarray(options["step_budget"])
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(
                '`options["step_budget"]` must be an integer; got '
                f"{options['step_budget']!r}."
            )
        options["step_budget"] = value.astype(jnp.int32)
    if "beta" in options:
        beta = canonical_weights('`options["beta"]`', options["beta"])
        options["beta"] = jtu.tree_map(jnp.asarray, beta)
    if "record" in options:
        options["record"] = check_flag('`options["record"]`', options["record"])
    return options


def _check_budget(solver: Any, z0: PyTree, budget: Array | None, has_aux: bool) -> None:
    """Raise unless a budget is one number, or one for every problem."""
    if budget is None or budget.ndim == 0:
        return
    batch = batch_shape(z0, getattr(solver, "batch_ndim", 0))
    if budget.shape != batch:
        raise ValueError(
            '`options["step_budget"]` must be an integer, or an array with a budget '
            f"for every problem, of the shape {batch} of the batch (`batch_ndim` of "
            f"the solver says which axes those are); got the shape {budget.shape}."
        )
    if has_aux and not solver.keeps_best:
        raise ValueError(
            "With `has_aux=True` a solve without a test has one budget: `aux` is that "
            "of the last evaluation, which is not the last one of every problem. Use "
            "`jax.vmap` over a solver with `batch_ndim=0`, or tolerances."
        )


def _canonical_leaf(path: Any, leaf: Any) -> Array:
    name = f"`z0{jtu.keystr(path)}`"
    try:
        dtype = jnp.result_type(leaf)
    except TypeError as error:
        raise TypeError(
            f"{name} must be an array; got {type(leaf).__name__}."
        ) from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must be real and floating-point; got {dtype}. Cast it, or split a "
            "complex state into real and imaginary parts."
        )
    return jnp.asarray(leaf, dtype=dtype)


def _check_output(z0: PyTree, structure: Any, leaves: list[Any]) -> None:
    """Raise unless fn returned the structure, shapes and dtypes of the iterate."""
    if jtu.tree_structure(z0) != structure:
        raise ValueError(
            "`fn` must return the tree structure of `z0`; `z0` has "
            f"{jtu.tree_structure(z0)}, `fn` returned {structure}. "
            "(If it returns a pair `(z, aux)`, pass `has_aux=True`.)"
        )
    if len(leaves) < structure.num_leaves:
        raise ValueError(
            "`fn` must return arrays, as `z0` holds; a leaf that it returned is none. "
            "Use `jnp.asarray`."
        )
    for (path, a), b in zip(jtu.tree_leaves_with_path(z0), leaves, strict=True):
        for what in ("shape", "dtype"):
            if getattr(a, what) != getattr(b, what):
                raise ValueError(
                    f"`fn` must return the {what} of `z0`; at leaf "
                    f"`{jtu.keystr(path) or 'z0'}` `z0` has {what} {getattr(a, what)}, "
                    f"`fn` returned {getattr(b, what)}."
                )
