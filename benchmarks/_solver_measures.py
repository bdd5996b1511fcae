"""What a solver costs beside f, and how much of f it needs."""

import functools as ft
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import deqjax

from ._solver_entrants import Entrant, Goal
from ._solver_maps import Problem, spectrum

TOLERANCES = (1e-3, 1e-6)
SLACK = 3.0
NEVER = 1e-30  # A test that runs at every step and never passes.


# Programs, each compiled once


@ft.cache
def program(
    run: Callable, fn: Callable, max_steps: int, rtol: float | None = None
) -> Any:
    """(start, args, goal) -> value and report, with `rtol` fixed where given."""

    def solve(start: jax.Array, args: Any, goal: Goal) -> Any:
        goal = goal if rtol is None else goal._replace(rtol=rtol)
        return run(fn, start, args, goal, max_steps)

    return jax.jit(solve)


@ft.cache
def watched(fn: Callable) -> tuple[Callable, list[float]]:
    """`fn`, and the list that its relative residuals are written to as it runs."""
    trail: list[float] = []

    def watching(z: jax.Array, args: Any) -> jax.Array:
        f = fn(z, args)
        relative = jnp.linalg.norm(f - z) / jnp.linalg.norm(f)
        jax.debug.callback(lambda r: trail.append(float(r)), relative)
        return f

    return watching, trail


def count(entrant: Entrant, problem: Problem, goal: Goal, max_steps: int) -> int:
    """Evaluations of a solve, counted from outside."""
    fn, trail = watched(problem.fn)
    trail.clear()
    rtol = float(goal.rtol) if entrant.static else None
    run = program(entrant.run, fn, max_steps, rtol)
    jax.block_until_ready(run(problem.start, problem.args, goal))
    jax.effects_barrier()
    return len(trail)


def goal_of(rtol: float, scale: float = 1.0) -> Goal:
    """‖f(z) − z‖ ≤ rtol ‖f(z)‖, in all terms; `scale` is about ‖f(z)‖."""
    return Goal(jnp.asarray(rtol), jnp.asarray(rtol * scale))


def compiled(fn: Any, *args: Any) -> tuple[Any, float]:
    """The program, and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    done = fn.lower(*args).compile()
    return done, time.perf_counter() - start


def seconds(run: Callable, *args: Any) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start


def temp_bytes(program: Any) -> int | None:
    """What the compiler reserves."""
    analysis = program.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def _copies(problem: Problem, solver: Any, base: Any) -> float | None:
    """What the solver needs beyond the loop, in copies of z."""
    both = temp_bytes(solver), temp_bytes(base)
    if both[0] is None or both[1] is None:
        return None
    return (both[0] - both[1]) / problem.start.nbytes


# Overhead


def overhead(
    name: str, problem: Problem, entrants: dict[str, Entrant], steps: int, runs: int
) -> list[dict[str, Any]]:
    """Each solver for `steps` steps beside the compiled loop of as many evaluations.

    The two take turns, and the median of the ratios of neighbours counts.
    """

    def loop(evals: int, z: jax.Array, args: Any) -> jax.Array:
        return jax.lax.fori_loop(0, evals, lambda _, z: problem.fn(z, args), z)

    rows = []
    goal, given = goal_of(NEVER), (problem.start, problem.args)
    for label, entrant in entrants.items():
        evals = count(entrant, problem, goal, steps)
        rtol = NEVER if entrant.static else None
        solve = program(entrant.run, problem.fn, steps, rtol)
        solver, compile_time = compiled(solve, *given, goal)
        report = solver(*given, goal)[1]
        products = max(int(report.products), 0)
        if entrant.library == "deqjax" and int(report.evaluations) != evals:
            raise RuntimeError(
                f"{label}: {report.evaluations} evaluations reported, {evals} made."
            )
        base, base_compile = compiled(
            jax.jit(ft.partial(loop, evals + products)), *given
        )
        pairs = [
            (seconds(base, *given), seconds(solver, *given, goal))
            for _ in range(runs + 2)
        ][2:]  # The first two warm up.
        ratios = np.array([b / a for a, b in pairs])
        rows.append(
            {
                "map": name,
                "solver": label,
                "library": entrant.library,
                "steps": steps,
                "evaluations": evals,
                "products": products,
                "ratio": float(np.median(ratios)),
                "quartiles": [float(q) for q in np.percentile(ratios, (25, 75))],
                "loop, ms": float(np.median([a for a, _ in pairs]) * 1e3),
                "compile, s": compile_time,
                "compile of the loop, s": base_compile,
                "temp bytes": temp_bytes(solver),
                "temp bytes of the loop": temp_bytes(base),
                "extra copies": _copies(problem, solver, base),
            }
        )
        print(f"{name:12} {label:32} {rows[-1]['ratio']:6.2f}", flush=True)
    return rows


# Work


def work(
    name: str, problem: Problem, entrants: dict[str, Entrant], limit: int
) -> list[dict[str, Any]]:
    """Evaluations and time of each solver to each relative residual.

    Each stops by its own test, which is set to ask for the same; the residual of what
    it returns is measured afterwards, and may be `SLACK` times as large.
    """
    rows = []
    scale = float(jnp.linalg.norm(equilibrium(problem)))
    for label, entrant in entrants.items():
        for rtol in TOLERANCES:
            row = _reach(entrant, problem, rtol, scale, limit)
            head = {"map": name, "solver": label, "library": entrant.library}
            rows.append({**head, "rtol": rtol, **row})
        counts = [r["evaluations"] or r["failed"] for r in rows[-len(TOLERANCES) :]]
        print(f"{name:18} {label:32} {counts}", flush=True)
    return rows


def _reach(
    entrant: Entrant, problem: Problem, rtol: float, scale: float, limit: int
) -> dict[str, Any]:
    max_steps = limit if entrant.most is None else min(limit, entrant.most)
    goal, given = goal_of(rtol, scale), (problem.start, problem.args)
    fixed = rtol if entrant.static else None
    run = program(entrant.run, problem.fn, max_steps, fixed)
    value, report = run(*given, goal)
    f = problem.fn(value, problem.args)
    residual = float(jnp.linalg.norm(f - value) / jnp.linalg.norm(f))
    evals, products = int(report.evaluations), int(report.products)
    if evals < 0:
        evals = count(entrant, problem, goal, max_steps)
    row: dict[str, Any] = {"relative residual": residual, "failed": None}
    if not residual <= SLACK * rtol or evals >= max_steps:
        row["relative residual"] = residual if np.isfinite(residual) else None
        row["failed"] = "no convergence" if np.isfinite(residual) else "not finite"
        evals, products = None, None
    times = [] if row["failed"] else [seconds(run, *given, goal)]
    if times and times[0] < 0.1:
        times += [seconds(run, *given, goal) for _ in range(6)]
    row["evaluations"] = evals
    row["products"] = None if products == -1 else products
    row["milliseconds"] = float(np.median(times)) * 1e3 if times else None
    return row


def equilibrium(problem: Problem) -> jax.Array:
    """The fixed point that Newton's method finds, or else Anderson acceleration."""
    for solver in (deqjax.NewtonKrylov(1e-10, 1e-12), deqjax.Anderson(1e-10, 1e-12)):
        sol = deqjax.fixed_point(*problem[:3], solver=solver, max_steps=500)
        if bool(sol.stats["converged"]):
            return sol.value
    raise RuntimeError("No fixed point found; choose another `--seed`.")


def description(name: str, problem: Problem) -> dict[str, Any]:
    """What the map is like at its fixed point."""
    value = equilibrium(problem)
    head = {"map": name, "note": problem.note, "shape": list(value.shape)}
    return {**head, **spectrum(problem, value)}


# Choices

VARIED = (
    "radius 0.9",
    "radius 0.99",
    "non-normal",
    "complex spectrum",
    "not contractive",
    "stiff",
    "normalised",
)
BATCHED = ("radius 0.5", "radius 0.9", "radius 0.99", "non-normal", "complex spectrum")


def choices(problems: dict[str, Problem], limit: int) -> list[dict[str, Any]]:
    """Evaluations to the smallest tolerance, by history and by β."""
    rtol = TOLERANCES[-1]
    settings: list[tuple[str, str, Any, Any]] = [
        (kind.__name__, "history", m, kind(rtol, 0.0, history=m))
        for kind, sizes in (
            (deqjax.Anderson, (1, 2, 3, 5, 10, 20)),
            (deqjax.Broyden, (5, 10, 20, 40)),
        )
        for m in sizes
    ]
    settings += [
        (kind.__name__, "beta", beta, kind(rtol, 0.0, beta=jnp.asarray(beta)))
        for kind in (deqjax.Picard, deqjax.Anderson)
        for beta in (0.25, 0.5, 0.75, 1.0)
    ]
    rows = []
    for label, name, value, solver in settings:
        for which, problem in problems.items():
            sol = deqjax.fixed_point(
                problem.fn, problem.start, problem.args, solver=solver, max_steps=limit
            )
            good = bool(sol.stats["converged"])
            evals = int(sol.stats["num_evals"]) if good else None
            head = {"solver": label, "choice": name, "value": value}
            rows.append({**head, "map": which, "evaluations": evals})
        print(f"{label} {name} = {value}: done", flush=True)
    return rows


def batches(problems: dict[str, Problem], limit: int) -> list[dict[str, Any]]:
    """Several problems at once, as one (`batch_ndim=0`) and each for itself (1)."""
    stack = lambda *xs: jnp.stack(xs)
    start = jax.tree.map(stack, *(p.start for p in problems.values()))
    args = jax.tree.map(stack, *(p.args for p in problems.values()))
    (fn,) = {p.fn for p in problems.values()}
    each = jax.vmap(fn)
    rtol, rows = TOLERANCES[0], []
    for kind in (deqjax.Picard, deqjax.Anderson, deqjax.Broyden):
        for ndim in (0, 1):
            solver = kind(rtol, 0.0, batch_ndim=ndim)
            sol = deqjax.fixed_point(each, start, args, solver=solver, max_steps=limit)
            f = each(sol.value, args)
            norm = lambda x: jnp.linalg.norm(x, axis=-1)
            relative = norm(f - sol.value) / norm(f)
            rows.append(
                {
                    "solver": kind.__name__,
                    "batch_ndim": ndim,
                    "maps": list(problems),
                    "evaluations": int(sol.stats["num_evals"]),
                    "steps": np.asarray(sol.stats["num_steps"]).tolist(),
                    "relative residuals": np.asarray(relative).tolist(),
                }
            )
    return rows
