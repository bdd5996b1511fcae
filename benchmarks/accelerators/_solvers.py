"""What a step of a solver costs beside f, on the device."""

import functools as ft
from typing import Any

import jax
import numpy as np

from .. import _solver_entrants as entrants, _solver_measures as measures
from .._reversal_costs import Cell
from ._cells import cell, title
from ._programs import compile_all, in_turns, summary
from ._session import OutOfTime, Section, Session

STEPS = {"small perceptron": 16, "large perceptron": 16, "transformer block": 8}
CELLS = (
    ("small perceptron", "float32"),
    ("transformer block", "bfloat16"),
    ("large perceptron", "float32"),
    ("transformer block", "float32"),
    ("large perceptron", "bfloat16"),
    ("small perceptron", "bfloat16"),
)


def loop(fn: Any, evals: int, z: jax.Array, args: Any) -> jax.Array:
    """The bare loop: so many evaluations, and nothing else."""
    return jax.lax.fori_loop(0, evals, lambda _, z: fn(z, args), z)


def run(session: Session, section: Section) -> None:
    """Every solver on every cell, as many as there is time for."""
    chosen = CELLS[:1] if session.quick else CELLS
    for i, (name, dtype) in enumerate(chosen):
        label = title(name, dtype, session.small)
        if not session.wants(label):
            continue
        if section.left() < 5:
            section.give_up(label, OutOfTime("no time was left for it"))
            continue
        seconds = section.left() / (len(chosen) - i)
        try:
            made = cell(name, dtype, session.small)
            _cell(session, section, label, made, STEPS[name], seconds)
        except Exception as error:
            section.give_up(label, error)


def _cell(
    session: Session,
    section: Section,
    label: str,
    cell: Cell,
    steps: int,
    seconds: float,
) -> None:
    field = {
        name: entrant
        for name, entrant in entrants.for_overhead().items()
        if entrant.library in ("deqjax", "optimistix")
    }
    goal = measures.goal_of(measures.NEVER)
    given = (cell.start, cell.args)

    def job(entrant: entrants.Entrant) -> tuple[Any, float]:
        rtol = measures.NEVER if entrant.static else None
        solve = measures.program(entrant.run, cell.fn, steps, rtol)
        return measures.compiled(solve, *given, goal)

    jobs = {f"{label}: {n}": ft.partial(job, e) for n, e in field.items()}
    solvers = compile_all(jobs, session.workers, section)
    counts: dict[str, tuple[int, int]] = {}
    for name, (program, _) in list(solvers.items()):
        try:
            report = program(*given, goal)[1]
            counts[name] = int(report.evaluations), max(int(report.products), 0)
        except Exception as error:
            section.give_up(name, error)
            del solvers[name]
    # Products of Jacobians count as evaluations of f: about as much arithmetic.
    lengths = sorted({sum(count) for count in counts.values()})
    make = lambda n: measures.compiled(jax.jit(ft.partial(loop, cell.fn, n)), *given)
    loops = compile_all(
        {f"{label}: loop of {n}": ft.partial(make, n) for n in lengths},
        session.workers,
        section,
    )
    each = min(2.0, 0.5 * seconds / max(1, len(solvers)))
    for name, (program, compiling) in solvers.items():
        base = loops.get(f"{label}: loop of {sum(counts[name])}")
        if base is None:
            continue
        runs = {
            "loop": ft.partial(base[0], *given),
            "solver": ft.partial(program, *given, goal),
        }
        found = in_turns(runs, each, least=3, most=100)
        ratios = found["solver"] / found["loop"]
        evals, products = counts[name]
        row = {
            "case": name,
            "steps": steps,
            "evaluations": evals,
            "products": products,
            "ratio": summary(ratios, 1),
            "solver, ms": summary(found["solver"]),
            "loop, ms": summary(found["loop"]),
            "per step beyond the loop, µs": 1e6
            * float(np.median(found["solver"] - found["loop"]))
            / steps,
            "compile, s": compiling,
            "temp bytes": measures.temp_bytes(program),
            "temp bytes of the loop": measures.temp_bytes(base[0]),
        }
        section.add(row)
        section.say(
            f"{name}: {row['ratio']['median']:.2f} × the loop of {evals} + {products}, "
            f"{row['solver, ms']['median']:.3g} ms"
        )
