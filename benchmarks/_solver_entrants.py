"""The solvers compared: deqjax's, and those of other libraries where installed."""

import functools as ft
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optimistix as optx

import deqjax


class Goal(NamedTuple):
    """When to stop; may be traced. Each solver takes what it understands.

    Attributes:
        rtol: ‖f(z) − z‖ / ‖f(z)‖.
        atol: ‖f(z) − z‖, for libraries that know of no relative tolerance.
    """

    rtol: Any
    atol: Any


class Report(NamedTuple):
    """What a solver says of its solve, −1 where it does not say."""

    evaluations: Any
    products: Any = 0


class Entrant(NamedTuple):
    """A solver under one calling convention.

    Attributes:
        library: which one it is of.
        run: (fn, start, args, goal, max_steps) to its value and its `Report`.
        static: its tolerance must be known when it is compiled.
        most: steps after which it is given up, where a step costs far more than f.
    """

    library: str
    run: Callable[..., tuple[jax.Array, Report]]
    static: bool = False
    most: int | None = None


LIBRARIES = ("deqjax", "optimistix", "jaxopt", "banax")


def versions() -> dict[str, str | None]:
    """What is installed, None for what is not."""
    found: dict[str, str | None] = {}
    for name in ("jax", "equinox", "lineax", *LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["deqjax"] = deqjax.__version__
    return found


def _here(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _solved(
    make: Callable[[Goal], Any],
    fn: Any,
    start: Any,
    args: Any,
    goal: Goal,
    max_steps: int,
) -> tuple[jax.Array, Report]:
    """By `deqjax.fixed_point`; optimistix's solvers too."""
    sol = deqjax.fixed_point(fn, start, args, solver=make(goal), max_steps=max_steps)
    counts = (sol.stats.get(k, -1) for k in ("num_evals", "num_products"))
    return sol.value, Report(*counts)


def _optimistix(
    fn: Any, start: Any, args: Any, goal: Goal, max_steps: int
) -> tuple[jax.Array, Report]:
    solver = optx.FixedPointIteration(rtol=goal.rtol, atol=goal.rtol)
    kept = {"max_steps": max_steps, "throw": False}
    sol = optx.fixed_point(fn, solver, start, args, **kept)
    return sol.value, Report(sol.stats["num_steps"])


def _jaxopt(
    name: str, extra: dict, fn: Any, start: Any, args: Any, goal: Goal, max_steps: int
) -> tuple[jax.Array, Report]:
    same = {"maxiter": max_steps, "tol": goal.atol, "jit": True, "unroll": False}
    # Its first step is −root(z): of this sign a Picard step.
    root = (lambda z, args: z - fn(z, args)) if name == "Broyden" else fn
    solver = getattr(importlib.import_module("jaxopt"), name)(root, **same, **extra)
    value, state = solver.run(start, args)
    return value, Report(state.num_fun_eval)


def _banax(
    name: str, extra: dict, fn: Any, start: Any, args: Any, goal: Goal, max_steps: int
) -> tuple[jax.Array, Report]:
    kind = getattr(importlib.import_module("banax.solver"), name)
    solver = kind(rtol=goal.rtol, max_steps=max_steps, **extra)
    adjoint = importlib.import_module("banax.adjoint").JFB(solver=solver)
    sol = adjoint((fn, (args,)), start)
    return sol.value, Report(sol.stats.steps + 1)  # One before the first step.


def _deqjax(kind: Any, most: int | None = None, **settings: Any) -> Entrant:
    make = lambda goal: kind(goal.rtol, 0.0, **settings)
    return Entrant("deqjax", ft.partial(_solved, make), most=most)


def _static(kind: Any, **settings: Any) -> Entrant:
    make = lambda goal: kind(None, None, **settings)
    return Entrant("deqjax", ft.partial(_solved, make))


def _foreign(kind: Any) -> Entrant:
    # Its tolerances are of its own norm, entry by entry: of the largest residual.
    make = lambda goal: kind(rtol=goal.rtol, atol=0.1 * goal.rtol, norm=optx.rms_norm)
    return Entrant("optimistix", ft.partial(_solved, make), most=100)


def _others() -> dict[str, Entrant]:
    found = {}
    if _here("jaxopt"):
        for name, kind, extra in (
            ("FixedPointIteration", "FixedPointIteration", {}),
            ("Anderson(5)", "AndersonAcceleration", {"history_size": 5}),
            ("Broyden(10)", "Broyden", {"history_size": 10}),
        ):
            run = ft.partial(_jaxopt, kind, extra)
            found[f"jaxopt {name}"] = Entrant("jaxopt", run)
    if _here("banax"):
        for name, kind, extra in (
            ("Picard", "Picard", {}),
            ("Anderson(5)", "Anderson", {"depth": 5}),
            ("Broyden(10)", "Broyden", {"history_size": 10}),
        ):
            run = ft.partial(_banax, kind, extra)
            found[f"banax {name}"] = Entrant("banax", run, static=True)
    return found


def for_overhead() -> dict[str, Entrant]:
    """Those whose cost beside f is measured."""
    return {
        "Picard, static": _static(deqjax.Picard),
        "Picard": _deqjax(deqjax.Picard),
        "Reversible, static": _static(deqjax.Reversible),
        "Anderson(5)": _deqjax(deqjax.Anderson),
        "Broyden(10)": _deqjax(deqjax.Broyden),
        "NewtonKrylov": _deqjax(deqjax.NewtonKrylov),
        "optimistix FixedPointIteration": Entrant("optimistix", _optimistix),
        **_others(),
    }


def for_work() -> dict[str, Entrant]:
    """Those whose evaluations to a given residual are counted."""
    return {
        "Picard": _deqjax(deqjax.Picard),
        "Picard, β = 0.4": _deqjax(deqjax.Picard, beta=0.4),
        "Reversible, β = 0.5": _deqjax(deqjax.Reversible),
        "Anderson(5)": _deqjax(deqjax.Anderson),
        "Anderson(10)": _deqjax(deqjax.Anderson, history=10),
        "Broyden(10)": _deqjax(deqjax.Broyden),
        "Broyden(30)": _deqjax(deqjax.Broyden, history=30),
        "NewtonKrylov": _deqjax(deqjax.NewtonKrylov, most=200),
        "optimistix Newton": _foreign(optx.Newton),
        "optimistix LevenbergMarquardt": _foreign(optx.LevenbergMarquardt),
        "optimistix BFGS": _foreign(optx.BFGS),
        **_others(),
    }
