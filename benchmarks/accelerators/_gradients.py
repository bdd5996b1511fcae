"""What a gradient costs: time against the sum of its parts, and memory by depth."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import deqjax

from .. import _reversal_costs as costs, _solver_measures as measures
from ._cells import cell, structs, title
from ._programs import compile_all, in_turns, summary
from ._session import OutOfTime, Section, Session

STEPS = 8
CELLS = (
    ("transformer block", "bfloat16"),
    ("small perceptron", "float32"),
    ("large perceptron", "float32"),
    ("transformer block", "float32"),
)
# Small enough for backpropagation through 64 steps: a compiler that is short of memory
# computes values twice, and its account is then of another program.
MEMORY = (("small perceptron", "float32"), ("thin transformer block", "bfloat16"))
DEPTHS = (4, 16, 64)
TERMS = 5


class Method(NamedTuple):
    """A gradient, and the parts that it is made of.

    Attributes:
        make: the adjoint, given a probe.
        reversible: the solver is `deqjax.Reversible` (two evaluations per step), else
            `deqjax.Picard`.
        parts: (steps, products of a linear solve that were counted) to the numbers of
            evaluations of f alone, of those with their pull-back, and of pull-backs at
            a point where f was linearised before.
    """

    make: Callable[[Any], Any]
    reversible: bool
    parts: Callable[[int, int], tuple[int, int, int]]


METHODS = {
    "reversible": Method(
        lambda p: deqjax.ReversibleAdjoint(probe=p),
        True,
        lambda n, k: (2 * n, 2 * n, 0),
    ),
    "implicit, GMRES to 1e-2": Method(
        lambda p: deqjax.ImplicitAdjoint(deqjax.linear.GMRES(1e-2), probe=p),
        False,
        lambda n, k: (n, 1, k),
    ),
    f"Neumann, {TERMS} terms": Method(
        lambda p: deqjax.NeumannAdjoint(TERMS), False, lambda n, k: (n, 1, TERMS - 1)
    ),
    "JFB": Method(lambda p: deqjax.JFBAdjoint(), False, lambda n, k: (n, 1, 0)),
    "unrolled": Method(
        lambda p: deqjax.UnrolledAdjoint(), False, lambda n, k: (0, n, 0)
    ),
    "unrolled, reversible steps": Method(
        lambda p: deqjax.UnrolledAdjoint(), True, lambda n, k: (0, 2 * n, 0)
    ),
    "checkpointed": Method(
        lambda p: deqjax.UnrolledAdjoint(checkpoints=3), False, lambda n, k: (n, n, 0)
    ),
}


def gradient(cell: costs.Cell, method: Method, steps: int) -> Callable[[Any], Any]:
    """args -> gradient of the sum of the answer, and products of a linear solve."""
    if method.reversible:
        solver = deqjax.Reversible(None, None, beta=costs.BETA)
    else:
        solver = deqjax.Picard(None, None)

    def loss(args: Any, probe: Any) -> jax.Array:
        sol = deqjax.fixed_point(
            cell.fn,
            cell.start,
            args,
            solver=solver,
            adjoint=method.make(probe),
            max_steps=steps,
        )
        return jnp.sum(sol.value.astype(jnp.float32))

    def run(args: Any) -> Any:
        grads, stats = jax.grad(loss, argnums=(0, 1))(args, deqjax.BackwardStats())
        return grads, stats.num_products

    return run


def pull_backs(cell: costs.Cell, times: int) -> Callable[[Any], Any]:
    """The last part: f linearised once, and pulled back so many times."""

    def run(args: Any) -> Any:
        _, pull = jax.vjp(lambda z: cell.fn(z, args), cell.start)
        first = jnp.ones_like(cell.start)
        return jax.lax.fori_loop(0, times, lambda _, ct: pull(ct)[0], first)

    return run


def run(session: Session, section: Section) -> None:
    """Time first, then memory; as much as there is time for."""
    chosen = CELLS[1:2] if session.quick else CELLS
    for i, (name, dtype) in enumerate(chosen):
        label = title(name, dtype, session.small)
        if not session.wants(label):
            continue
        if section.left() < 10:
            section.give_up(label, OutOfTime("no time was left for it"))
            continue
        # What is left of the time is for the other cells, and for memory.
        seconds = section.left() / (len(chosen) - i + 1)
        try:
            _times(session, section, label, cell(name, dtype, session.small), seconds)
        except Exception as error:
            section.give_up(label, error)
    for name, dtype in MEMORY[:1] if session.quick else MEMORY:
        _memory(session, section, name, dtype)


def _times(
    session: Session, section: Section, label: str, cell: costs.Cell, seconds: float
) -> None:
    many = 2 * STEPS
    programs: dict[str, Callable[[Any], Any]] = {
        "f": costs.forward_part(cell, STEPS),
        "f and pull-back": costs.backward_part(cell, STEPS),
        "pull-back": pull_backs(cell, many),
    }
    programs |= {name: gradient(cell, m, STEPS) for name, m in METHODS.items()}
    jobs = {
        f"{label}: {name}": ft.partial(measures.compiled, jax.jit(program), cell.args)
        for name, program in programs.items()
    }
    done = compile_all(jobs, session.workers, section)
    runs = {
        name: ft.partial(done[f"{label}: {name}"][0], cell.args)
        for name in programs
        if f"{label}: {name}" in done
    }
    found = in_turns(runs, 0.5 * seconds, least=3, most=60)
    parts = [name for name in list(programs)[:3] if name in found]
    for name in parts:
        once = found[name] / many
        section.add({"case": f"{label}: {name}", "once, ms": summary(once)})
    for name, method in METHODS.items():
        if name not in found:
            continue
        products = float(runs[name]()[1])
        products = 0 if np.isnan(products) else int(products)
        numbers = method.parts(STEPS, products)
        program, compiling = done[f"{label}: {name}"]
        row: dict[str, Any] = {"case": f"{label}: {name}", "steps": STEPS}
        row |= {"parts": dict(zip(list(programs)[:3], numbers, strict=True))}
        row |= {"ms": summary(found[name]), "compile, s": compiling}
        row |= {"temp bytes": measures.temp_bytes(program)}
        text = ""
        if len(parts) == 3:
            total = sum(
                n * found[p] / many for n, p in zip(numbers, parts, strict=True)
            )
            row["ratio"] = summary(found[name] / total, 1)
            text = f", {row['ratio']['median']:.2f} × its parts {numbers}"
        section.add(row)
        section.say(f"{label}: {name}: {row['ms']['median']:.3g} ms{text}")


def _memory(session: Session, section: Section, name: str, dtype: str) -> None:
    """Temporary bytes of gradients by depth; nothing is run."""
    made = cell(name, dtype, session.small)
    shapes = structs(made.args)
    state = int(np.prod(made.shape)) * made.dtype.itemsize
    methods = {
        "reversible": ft.partial(costs.reversal, bits=8),
        "unrolled": ft.partial(costs.backpropagation, keep="activations"),
        "unrolled, states kept": ft.partial(costs.backpropagation, keep="states"),
    }
    label = f"memory, {title(name, dtype, session.small)}"
    if not session.wants(label):
        return

    def job(make: Callable, steps: int) -> int | None:
        program, _ = measures.compiled(jax.jit(make(made, steps)), shapes)
        return measures.temp_bytes(program)

    jobs = {
        f"{label}: {method}, {steps} steps": ft.partial(job, make, steps)
        for steps in DEPTHS
        for method, make in methods.items()
    }
    found = compile_all(jobs, session.workers, section)
    for method in methods:
        names = {steps: f"{label}: {method}, {steps} steps" for steps in DEPTHS}
        sizes = {n: found[key] for n, key in names.items() if key in found}
        row: dict[str, Any] = {"case": f"{label}: {method}", "temp bytes": sizes}
        known = [(n, size) for n, size in sizes.items() if size is not None]
        if len(known) > 1:
            (n0, first), (n1, last) = known[0], known[-1]
            row["copies of z per step"] = (last - first) / (n1 - n0) / state
            section.say(f"{row['case']}: {row['copies of z per step']:.3f} z per step")
        section.add(row)
