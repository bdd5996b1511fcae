"""Every named configuration of deqjax's models: parameters, sizes and memory.

    python -m benchmarks.model_table              print the table
    python -m benchmarks.model_table --memory     compile one gradient of each, and
                                                  record what memory it takes
    python -m benchmarks.model_table --write      write the table of the documentation

Nothing is allocated: models are counted, and gradients compiled, from shapes alone.
"""

import argparse
import json
import math
import pathlib
import platform
import time
from typing import Any

import equinox as eqx
import jax
import jax.random as jr

import deqjax
from deqjax.nn import count_parameters

from ._published import ROWS, Row, gradient, run, shapes

ROOT = pathlib.Path(__file__).resolve().parents[1]
MEMORY = ROOT / "benchmarks" / "results" / "model-memory-cpu.json"
PAGE = ROOT / "docs" / "model-table.md"


def count(row: Row) -> tuple[int, int]:
    """Parameters of the model, and of its cell."""
    model, _ = shapes(row)
    return count_parameters(model), count_parameters(row.cell(model))


def state_size(row: Row) -> int:
    """Entries of the equilibria of one example."""
    _, sol = eqx.filter_eval_shape(run, *shapes(row), row.data, jr.key(0))
    if not row.cell(shapes(row)[0]):
        return 0
    # One equilibrium, one at each scale, or one solution for each of them.
    equilibria = [s.value for s in sol.aux] if sol.aux else sol.value
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(equilibria))


def memory(row: Row) -> int:
    """Bytes that one example's loss and gradient take beside model and gradient.

    By the compiler's own account.
    """
    evaluate, arrays = gradient(*shapes(row))
    # Buffers are assigned before LLVM optimises, which takes half the time.
    evaluate = jax.jit(evaluate, compiler_options={"xla_backend_optimization_level": 0})
    compiled = evaluate.lower(arrays, row.data, jr.key(0)).compile()
    account = compiled.memory_analysis()
    if account is None:
        raise RuntimeError(f"{jax.default_backend()} gives no account of memory.")
    return int(account.temp_size_in_bytes)


def table(recorded: dict[str, int]) -> str:
    """The table in Markdown.

    Args:
        recorded: Bytes of one example's gradient, by name; a dash where there is none.
    """
    lines = [
        "| configuration | parameters | of these, cell | input | state per example | "
        "memory of one gradient | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        (whole, cell), size = count(row), state_size(row)
        used = recorded.get(row.name)
        entries = (
            f"`{row.name}`",
            f"{whole:,}",
            f"{cell:,}" if cell else "–",
            row.inputs,
            f"{size:,}" if size else "–",
            _size(used) if used else "–",
            row.source,
        )
        lines.append("| " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def _size(number: int) -> str:
    mebi = number / 2**20
    return f"{mebi:,.0f} MiB" if mebi >= 1 else f"{number / 2**10:,.0f} KiB"


def record(names: list[str]) -> dict[str, Any]:
    """What `--memory` writes: one row after the other, what is there already kept.

    Args:
        names: Those to measure.
    """
    old = json.loads(MEMORY.read_text()) if MEMORY.exists() else {"bytes": {}}
    bytes_ = {row.name: old["bytes"].get(row.name) for row in ROWS}
    for row in ROWS:
        if row.name in names:
            start = time.perf_counter()
            bytes_[row.name] = memory(row)
            jax.clear_caches()
            seconds = time.perf_counter() - start
            print(f"{row.name}: compiled in {seconds:.0f} s", flush=True)
    return {
        "versions": {"deqjax": deqjax.__version__, "jax": jax.__version__},
        "device": f"{jax.default_backend()}, {platform.machine()}",
        "bytes": bytes_,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", action="store_true", help="measure memory")
    parser.add_argument("--only", nargs="+", help="of these rows alone")
    parser.add_argument("--write", action="store_true", help="write the documentation")
    options = parser.parse_args()
    if options.memory:
        names = options.only or [row.name for row in ROWS]
        MEMORY.write_text(json.dumps(record(names), indent=2) + "\n")
    text = table(json.loads(MEMORY.read_text())["bytes"])
    if options.write:
        PAGE.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
