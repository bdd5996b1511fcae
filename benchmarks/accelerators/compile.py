"""Compile solves and gradients for accelerators that are not there, and read them.

    JAX_PLATFORMS=cpu python -m benchmarks.accelerators.compile

The compilers of both kinds of accelerators run on a CPU machine, from a description of
the device. For an NVIDIA H100 that takes `jax-cuda12-plugin`, `jax-cuda12-pjrt` and
`nvidia-cuda-nvcc-cu12`; for a TPU v5e `libtpu`. Nothing runs, so nothing is timed, and
what autotuning would choose on a real GPU is not seen. Printed for each program:

- the temporary memory that one more step takes, in copies of the state (on a TPU small
  records lie in its vector memory, which that account leaves out);
- the kernels that one trip of each loop launches (on a TPU: fusions and other work);
- transfers and calls to the host in its loops, of which there should be none.

The exit status is 1 if a program does not compile, if a loop calls the host, or if a
step of a reversible gradient takes more than 0.6 copies of the state in float32.
"""

import argparse
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import deqjax

from .. import _solver_measures as measures
from .._reversal_costs import CELLS, Cell
from ._cells import structs
from ._session import reason

H100 = pathlib.Path(__file__).parent / "h100.txtpb"
TARGETS = ("h100", "v5e")
DTYPES = ("float32", "bfloat16")
STEPS = (8, 32)
# Copies of the state per step: a byte per entry and half step is 0.5 in float32.
MOST = 0.6

# What launches nothing.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency"),
}
HOST = re.compile(r"callback|MoveToHost|MoveToDevice|\b(in|out)feed\(|\b(send|recv)\(")


class Loop(NamedTuple):
    """A while loop: kernels of one trip, inner loops not counted, and host calls."""

    kernels: int
    host: int


def device(target: str) -> Any:
    """A device to compile for."""
    if target == "h100":
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name="h100",
            target_config=H100.read_text(),
            topology="1x1x1",
        )
    else:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{target}:2x2"
        )
    return described.devices[0]


def compile_for(where: Any, fn: Callable, args: Any) -> jax.stages.Compiled:
    """The program of `fn(args)` for a device that is described."""
    one = SingleDeviceSharding(where)
    place = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one)
    return jax.jit(fn).lower(jax.tree.map(place, structs(args))).compile()


def loops(text: str) -> list[Loop]:
    """All while loops of a compiled program, read from its text."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*-> .*\{$", line)
        if head and not line.startswith(" "):
            name = head[1]
            bodies[name] = []
        elif " = " in line and name:
            bodies[name].append(line.strip())
    found = []
    for lines in list(bodies.values()):
        for line in lines:
            body = re.search(r" while\(.*\bbody=%?([\w.\-]+)", line)
            if body:
                inside = bodies[body[1]]
                kernels = sum(_launches(x) for x in inside)
                host = sum(bool(HOST.search(x)) for x in inside)
                found.append(Loop(kernels, host))
    return found


def _launches(line: str) -> bool:
    # Types hold brackets but no opcode followed by one: `f32[2]{0} fusion(...)`.
    opcode = re.search(r"[\])}] ([a-z][\w\-]*)\(", line.split(" = ", 1)[1])
    return opcode is not None and opcode[1] not in FREE | {"while"}


def gradient(cell: Cell, steps: int, rtol: float | None) -> Callable[[Any], Any]:
    """By exact reversal; tested at every step if there is a tolerance."""
    solver = deqjax.Reversible(rtol, rtol, beta=0.8)

    def loss(args: Any) -> jax.Array:
        sol = deqjax.fixed_point(
            cell.fn, cell.start, args, solver=solver, max_steps=steps
        )
        return jnp.sum(sol.value.astype(jnp.float32))

    return jax.grad(loss)


def solve(cell: Cell, solver: Any) -> Callable[[Any], Any]:
    """Without a gradient."""

    def run(args: Any) -> jax.Array:
        return deqjax.fixed_point(
            cell.fn, cell.start, args, solver=solver, max_steps=STEPS[0]
        ).value

    return run


SOLVERS = {
    "Picard, static": deqjax.Picard(None, None),
    "Picard": deqjax.Picard(),
    "Reversible, static": deqjax.Reversible(None, None),
    "Anderson": deqjax.Anderson(),
    "Broyden": deqjax.Broyden(),
    "NewtonKrylov": deqjax.NewtonKrylov(),
}


def examine(where: Any, cell: Cell, rtol: float | None) -> tuple[str, list[str]]:
    """What a reversible gradient is like, and what is wrong with it."""
    state = int(np.prod(cell.shape)) * jnp.dtype(cell.dtype).itemsize
    made = [compile_for(where, gradient(cell, n, rtol), cell.args) for n in STEPS]
    sizes = [measures.temp_bytes(program) for program in made]
    found = loops(made[0].as_text() or "")
    kernels = " + ".join(str(loop.kernels) for loop in found)
    wrong = [f"{loop.host} host calls in a loop" for loop in found if loop.host]
    text = f"{kernels} kernels per trip"
    if sizes[0] is not None and sizes[1] is not None:
        slope = (sizes[1] - sizes[0]) / (STEPS[1] - STEPS[0]) / state
        text = f"{slope:.3f} z per step, {text}"
        if cell.dtype == jnp.float32 and slope > MOST:
            wrong.append(f"{slope:.3f} copies of the state per step, at most {MOST}")
    return text, wrong


def _solved(where: Any, cell: Cell, solver: Any) -> tuple[str, list[str]]:
    """As `examine`, of a solve without a gradient."""
    found = loops(compile_for(where, solve(cell, solver), cell.args).as_text() or "")
    counts = " + ".join(str(loop.kernels) for loop in found)
    wrong = [f"{loop.host} host calls in a loop" for loop in found if loop.host]
    return f"{counts} kernels per trip", wrong


def cells(dtype: str, only: Sequence[str]) -> dict[str, Cell]:
    """Those of `reversal.py`, in a dtype."""
    cast = lambda t: t.astype(dtype)
    made = {name: CELLS[name]() for name in only}
    return {
        name: Cell(c.fn, jax.tree.map(cast, c.args), c.shape, jnp.dtype(dtype))
        for name, c in made.items()
    }


def command_line() -> argparse.ArgumentParser:
    """The options."""
    cli = argparse.ArgumentParser(
        "python -m benchmarks.accelerators.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = cli.add_argument
    add("--target", nargs="+", choices=TARGETS, default=TARGETS, help="(default: all)")
    add("--cells", nargs="+", choices=tuple(CELLS), default=tuple(CELLS))
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print; returns the exit status."""
    options = command_line().parse_args(argv)
    # Without these libtpu looks for the machine that it would run on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    failed = 0

    def show(name: str, job: Callable[[], tuple[str, list[str]]]) -> None:
        nonlocal failed
        try:
            text, wrong = job()
        except Exception as error:
            text, wrong = "", [reason(error)]
        failed += bool(wrong)
        print(f"{name}: {text}", *(f"  FAIL {line}" for line in wrong), flush=True)

    for target in options.target:
        try:
            where = device(target)
        except Exception as error:
            print(f"{target}: its compiler is not installed: {reason(error)}")
            failed += 1
            continue
        for dtype in options.dtypes:
            for name, cell in cells(dtype, options.cells).items():
                for label, rtol in (("static", None), ("tested", 1e-3)):
                    title = f"{target}, {name}, {dtype}, gradient, {label}"
                    show(title, lambda c=cell, r=rtol, w=where: examine(w, c, r))
        small = cells("float32", ["MLP"])["MLP"]
        for label, solver in SOLVERS.items():
            title = f"{target}, MLP, float32, {label}"
            show(title, lambda s=solver, c=small, w=where: _solved(w, c, s))
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
