"""Are reversible gradients right on this device? Compared with backpropagation."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.tree_util as jtu
import numpy as np

import deqjax

from .. import _reversal_measures as measures
from .._reversal_cases import LANES
from ..reversal import relative_error
from ._cases import QUICK, Check, checks
from ._programs import at_once
from ._session import OutOfTime, Section, Session, reason


class Programs(NamedTuple):
    """Compiled gradients of a check, and the inputs that they are called with.

    Each takes (z0, x, weights, β, steps, probe, weights of the loss).
    """

    ours: Callable
    textbook: Callable
    reference: Callable
    inputs: tuple


@contextlib.contextmanager
def settings(wide: bool, precision: str | None) -> Iterator[None]:
    """JAX's configuration while a program is traced or called, in this thread."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(wide))
        if precision is not None:
            stack.enter_context(jax.default_matmul_precision(precision))
        yield


def host() -> Any:
    """The device that float64 is computed on: a TPU only emulates it."""
    here = jax.devices()[0]
    return jax.devices("cpu")[0] if here.platform == "tpu" else here


def prepare(check: Check) -> Programs:
    """Trace and compile; runs in a thread of its own."""
    case, wide = check.case, "float64" in check.case.states
    with jax.enable_x64(True):
        drawn = case.draw(0)
    z0, x, w, beta, out = jtu.tree_map(np.asarray, drawn)
    count = None if check.static else np.int32(check.steps[0])
    lanes = (LANES,) if case.lanes else ()
    if count is not None and lanes:
        count = np.full(lanes, count)
    with settings(wide, None):
        probe = jtu.tree_map(np.asarray, deqjax.BackwardStats(lanes))
    inputs = z0, x, w, beta, count, probe, out
    with settings(wide, check.precision):
        ours = jax.jit(_reversal(check)).lower(*inputs).compile()
        textbook = jax.jit(_backpropagation(check)).lower(*inputs).compile()
    with settings(True, None), jax.default_device(host()):
        given = *measures.widened(inputs[:3]), *inputs[3:]
        reference = jax.jit(_backpropagation(check)).lower(*given).compile()
    return Programs(ours, textbook, reference, inputs)


def _reversal(check: Check) -> Callable:
    case, longest = check.case, max(check.steps)

    def gradient(z0, x, w, beta, count, probe, out):
        def method(z0: Any, x: Any, w: Any, beta: Any, extra: Any) -> Any:
            probe, count = extra
            options = None if count is None else {"step_budget": count}
            solve = measures.reversal(
                case.fn, case.number, longest, options, batch_ndim=case.batch_ndim
            )
            return solve(z0, x, w, beta, probe)

        # Numbers of steps have no gradient: they come in beside the probe.
        def run(z0: Any, x: Any, w: Any, beta: Any, probe: Any) -> Any:
            spread = measures.spread(method, case.call, beta is not None)
            return spread(z0, x, w, beta, (probe, count))

        return measures.gradient(run, ours=True, jit=False)(z0, x, w, beta, probe, out)[
            0
        ]

    return gradient


def _backpropagation(check: Check) -> Callable:
    case, longest = check.case, max(check.steps)
    method = measures.backpropagation(case.fn, case.number, longest)

    def gradient(z0, x, w, beta, count, probe, out):
        spread = measures.spread(method, case.call, beta is not None)
        return measures.gradient(spread, ours=False, jit=False)(
            z0, x, w, beta, count, out
        )[0]

    return gradient


def measure(check: Check, programs: Programs) -> list[dict[str, Any]]:
    """A row for each β and number of steps."""
    return [
        _row(check, programs, beta, steps)
        for beta in check.betas
        for steps in check.steps
    ]


def _row(check: Check, programs: Programs, beta: float, steps: int) -> dict[str, Any]:
    case, wide = check.case, "float64" in check.case.states
    z0, x, w, betas, count, probe, out = programs.inputs
    if not check.static:
        betas, count = np.full_like(betas, beta), np.full_like(count, steps)
    row: dict[str, Any] = {"case": f"{check.name}, β {beta}, N {steps}"}
    row |= {"map": case.text, "dtype": case.states[0], "β": beta, "steps": steps}
    end = betas, count, probe, out
    with settings(wide, check.precision):
        *grad, stats = programs.ours(z0, x, w, *end)
        grad, stats = jax.device_get((grad, stats))
        backward = lambda given: jax.device_get(programs.textbook(*given, *end))
        backward((z0, x, w))
    with settings(True, None), jax.default_device(host()):
        exact = jax.device_get(programs.reference(*measures.widened((z0, x, w)), *end))
    row |= measures.record(stats)
    # Products of a device are less precise than their dtype: errors scatter there, too.
    scattered = case.states[0] != "float64" and check.precision is None
    with settings(wide, check.precision):
        limit = measures.granted(backward, (z0, x, w), exact, scattered, 0)
    floor = measures.FLOOR.get(case.states[0], measures.ROUNDING)
    row |= {"error": relative_error(grad, exact)}
    row |= {"worst leaf": measures.leaf_errors(grad, exact)}
    row |= {"backpropagation": limit, "allowed": max(2 * limit, floor)}
    return row | {"failure": measures.judge(row)}


def run(session: Session, section: Section) -> None:
    """Check every map, as many as there is time for."""
    wanted = [check for check in checks() if session.wants(check.name)]
    if session.quick and not session.cases:
        wanted = [check for check in wanted if check.name in QUICK]
    if session.platform == "tpu":
        for check in [c for c in wanted if "float64" in c.case.states]:
            wanted.remove(check)
            section.give_up(check.name, OutOfTime("a TPU only emulates float64"))
    named = {check.name: check for check in wanted}
    jobs = {name: lambda c=check: prepare(c) for name, check in named.items()}
    prepared = at_once(jobs, session.workers, section.left())
    for i, (name, programs) in enumerate(prepared):
        if isinstance(programs, OutOfTime):
            section.give_up(name, programs)
            continue
        try:
            if isinstance(programs, BaseException):
                raise programs
            rows = measure(named[name], programs)
        except Exception as error:  # Whatever happens is a row, and a failure.
            rows = [{"case": name, "failure": reason(error)}]
        for row in rows:
            section.add(row)
        section.say(f"{i + 1}/{len(jobs)} {name}: {verdict(rows)}")


def verdict(rows: list[dict[str, Any]]) -> str:
    """PASS or FAIL, and the worst of each figure."""
    failures = [row["failure"] for row in rows if row["failure"] is not None]
    if failures:
        return f"FAIL, {len(failures)} of {len(rows)}: {failures[0]}"
    worst = {
        key: max(row[key] for row in rows)
        for key in ("drift", "repair", "error", "backpropagation")
    }
    return (
        f"PASS {len(rows)}, drift {worst['drift']:g}, repair {worst['repair']:.2f}, "
        f"error {worst['error']:.1e} (backpropagation {worst['backpropagation']:.1e})"
    )
