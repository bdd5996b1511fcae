"""Compile solves and gradients for accelerators that are not there, and read them.

    JAX_PLATFORMS=cpu python -m benchmarks.accelerators.compile

The compilers of both kinds of accelerators run on a CPU machine, from a description of
the device: `pip install -e ".[bench,cuda-aot]"` for an NVIDIA H100, `tpu-aot` for a TPU
v5e. Nothing runs, so nothing is timed, and what autotuning would choose on a real GPU
is not seen. Printed for each program:

- the temporary memory that one more step takes, in copies of the state (on a TPU small
  records lie in its vector memory, which that account leaves out);
- the kernels that one trip of each loop launches (on a TPU: fusions and other work);
- transfers and calls to the host in its loops, of which there should be none;
- for the published models, loss and gradient of one example, the temporary memory.

The exit status is 1 if a program does not compile, if a loop calls the host, or if a
step of a reversible gradient takes more than 0.6 copies of the state in float32.
"""

import argparse
import functools as ft
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import deqjax

from .. import _published as published, _solver_measures as measures
from .._reversal_costs import CELLS, Cell
from . import _language_model as language_model
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


class Finding(NamedTuple):
    """What one program is like.

    Attributes:
        kernels: that one trip of each loop launches.
        wrong: what should not be.
        temporaries: bytes that it takes beside arguments and results.
        slope: what one more step takes, in copies of the state.
    """

    kernels: list[int]
    wrong: list[str]
    temporaries: int | None = None
    slope: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.slope is not None:
            parts.append(f"{self.slope:.3f} z per step")
        if self.temporaries is not None:
            parts.append(f"{self.temporaries / 2**20:,.1f} MiB")
        loops = " + ".join(map(str, self.kernels))
        return ", ".join([*parts, f"{loops} kernels per trip" if loops else "no loop"])


def read(program: jax.stages.Compiled, **known: Any) -> Finding:
    """Its loops, and what is wrong with them."""
    found = loops(program.as_text() or "")
    wrong = [f"{loop.host} host calls in a loop" for loop in found if loop.host]
    return Finding([loop.kernels for loop in found], wrong, **known)


def examine(where: Any, cell: Cell, rtol: float | None) -> Finding:
    """A reversible gradient."""
    state = int(np.prod(cell.shape)) * jnp.dtype(cell.dtype).itemsize
    made = [compile_for(where, gradient(cell, n, rtol), cell.args) for n in STEPS]
    sizes = [measures.temp_bytes(program) for program in made]
    if sizes[0] is None or sizes[1] is None:
        return read(made[0])
    slope = (sizes[1] - sizes[0]) / (STEPS[1] - STEPS[0]) / state
    found = read(made[0], slope=slope)
    if cell.dtype == jnp.float32 and slope > MOST:
        found.wrong.append(f"{slope:.3f} copies of the state per step, at most {MOST}")
    return found


def _solved(where: Any, cell: Cell, solver: Any) -> Finding:
    """A solve without a gradient."""
    return read(compile_for(where, solve(cell, solver), cell.args))


def _model(where: Any, row: published.Row) -> Finding:
    """Loss and gradient of one example."""
    evaluate, arrays = published.gradient(*published.shapes(row))
    given = arrays, row.data, jax.random.key(0)
    program = compile_for(where, lambda given: evaluate(*given), given)
    return read(program, temporaries=measures.temp_bytes(program))


def _training(where: Any, step: language_model.Step) -> Finding:
    """A step of training of the RevDEQ language model, 32 sequences of 448 tokens."""
    row = next(r for r in published.ROWS if r.name == "RevDEQLM.wikitext103")
    params, static = eqx.partition(published.shapes(row)[0], _is_inexact)
    optimiser = optax.adamw(1e-3)
    tokens = jax.ShapeDtypeStruct((32, 448), jnp.int32)
    state = jax.eval_shape(optimiser.init, params)
    given = params, state, deqjax.BackwardStats(), tokens, tokens
    run = language_model.train_step(static, step, optimiser)
    program = compile_for(where, lambda given: run(*given), given)
    return read(program, temporaries=measures.temp_bytes(program))


def _is_inexact(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def cells(dtype: str, only: Sequence[str]) -> dict[str, Cell]:
    """Those of `reversal.py`, in a dtype."""
    cast = lambda t: t.astype(dtype)
    made = {name: CELLS[name]() for name in only}
    return {
        name: Cell(c.fn, jax.tree.map(cast, c.args), c.shape, jnp.dtype(dtype))
        for name, c in made.items()
    }


def names_of_models() -> tuple[str, ...]:
    """The published configurations."""
    return tuple(row.name for row in published.ROWS)


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
    names = names_of_models()
    add("--models", nargs="*", choices=names, metavar="MODEL",
        help="published models, or `--models` alone for all of them; takes half a "
        "minute or more for each (default: none)")  # fmt: skip
    add("--training", nargs="+", metavar="DEPTH", type=int, default=(),
        help="steps of training of the RevDEQ language model of published size, in "
        "bfloat16, by each adjoint, with so many steps of the solve (default: none)",
    )  # fmt: skip
    add("--output", type=pathlib.Path, metavar="FILE",
        help="a JSON file for what is printed; what it holds already is replaced "
        "program by program")  # fmt: skip
    return cli


def programs(
    options: argparse.Namespace, target: str, where: Any
) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """What to compile for a target, by name."""
    for dtype in options.dtypes:
        for name, cell in cells(dtype, options.cells).items():
            for label, rtol in (("static", None), ("tested", 1e-3)):
                title = f"{target}, {name}, {dtype}, gradient, {label}"
                yield title, ft.partial(examine, where, cell, rtol)
    if "MLP" in options.cells:
        small = cells("float32", ["MLP"])["MLP"]
        for label, solver in SOLVERS.items():
            title = f"{target}, MLP, float32, {label}"
            yield title, ft.partial(_solved, where, small, solver)
    for depth in options.training:
        for adjoint in ("reversible", "implicit", "unrolled"):
            step = language_model.Step("bfloat16", adjoint, depth)
            title = f"{target}, step of training, {step.name}"
            yield title, ft.partial(_training, where, step)
    chosen = () if options.models is None else options.models or names_of_models()
    for row in published.ROWS:
        if row.name in chosen:
            title = f"{target}, {row.name}, float32, gradient of one example"
            yield title, ft.partial(_model, where, row)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print; returns the exit status."""
    options = command_line().parse_args(argv)
    # Without these libtpu looks for the machine that it would run on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    failed = 0
    for target in options.target:
        try:
            where = device(target)
        except Exception as error:
            print(f"{target}: its compiler is not installed: {reason(error)}")
            failed += 1
            continue
        for title, job in programs(options, target, where):
            try:
                found = job()
            except Exception as error:
                found = Finding([], [reason(error)])
            jax.clear_caches()
            failed += bool(found.wrong)
            print(
                f"{title}: {found}", *(f"  FAIL {x}" for x in found.wrong), flush=True
            )
            if options.output:
                record(options.output, title, found)
    print(f"{failed} failed")
    return int(failed > 0)


def record(path: pathlib.Path, title: str, found: Finding) -> None:
    """Add it to the file, or put it in the place of what the file has of it."""
    old = json.loads(path.read_text()) if path.exists() else {"programs": {}}
    versions = {name: version(name) for name in ("deqjax", "jax", "jaxlib")}
    kept = {**old["programs"], title: found._asdict()}
    text = json.dumps({"versions": versions, "programs": kept}, indent=1)
    draft = path.with_suffix(".partial")
    draft.write_text(text + "\n")
    draft.replace(path)


if __name__ == "__main__":
    sys.exit(main())
