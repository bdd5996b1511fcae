"""Every named configuration of deqjax's models: parameters, sizes and memory.

    python benchmarks/model_table.py              print the table
    python benchmarks/model_table.py --memory     compile one gradient of each, and
                                                  record what memory it takes
    python benchmarks/model_table.py --write      write the table of the documentation

Nothing is allocated: models are counted, and gradients compiled, from shapes alone.
"""

import argparse
import json
import pathlib
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import deqjax
from deqjax.nn import (
    DEQTransformerLM,
    RevDEQLM,
    TransformerLM,
    count_parameters,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
MEMORY = ROOT / "benchmarks" / "results" / "model-memory-cpu.json"
PAGE = ROOT / "docs" / "model-table.md"


class Row(NamedTuple):
    """A configuration.

    Attributes:
        name: How it is made, below `deqjax.nn`.
        make: `make(key=key)` makes it.
        cell: What of the model is evaluated again and again; None: nothing.
        inputs: The input of one example, in words.
        state: Entries of the iterate, per example.
        loss: `loss(model, data, key)`, a scalar: one example's.
        data: The shapes of one example's data.
        source: Where the configuration is from.
    """

    name: str
    make: Callable[..., Any]
    cell: Callable[[Any], Any]
    inputs: str
    state: int
    loss: Callable[[Any, Any, Any], Any]
    data: Any
    source: str


def tokens(length: int) -> tuple[Any, Any]:
    """The shapes of one sequence, and of what follows each of its tokens."""
    shape = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return shape, shape


def cross_entropy(model: Any, data: Any, key: Any) -> Any:
    """Of a language model that returns logits."""
    inputs, targets = data
    log_p = jax.nn.log_softmax(model(inputs))
    return -jnp.mean(jnp.take_along_axis(log_p, targets[..., None], axis=-1))


def adaptive_cross_entropy(model: Any, data: Any, key: Any) -> Any:
    """Of a language model with an adaptive softmax."""
    inputs, targets = data
    sol, _ = model.solve(inputs, key=key)
    return jnp.mean(model.nll(sol.value, targets, key=key))


REVDEQ = "McCallum et al. (2025)"
ROWS = [
    Row(
        "RevDEQLM.wikitext103",
        RevDEQLM.wikitext103,
        lambda model: model.deq,
        "448 tokens",
        448 * 768,
        cross_entropy,
        tokens(448),
        REVDEQ,
    ),
    Row(
        "TransformerLM.wikitext103",
        TransformerLM.wikitext103,
        lambda model: None,
        "448 tokens",
        0,
        cross_entropy,
        tokens(448),
        "of equal size, for comparison",
    ),
    Row(
        "DEQTransformerLM.wikitext103",
        DEQTransformerLM.wikitext103,
        lambda model: model.deq,
        "150 tokens, memory of 150",
        150 * 700,
        adaptive_cross_entropy,
        tokens(150),
        "Bai et al. (2019)",
    ),
    Row(
        "DEQTransformerLM.wikitext103_regularised",
        DEQTransformerLM.wikitext103_regularised,
        lambda model: model.deq,
        "150 tokens, memory of 300",
        150 * 700,
        adaptive_cross_entropy,
        tokens(150),
        "Bai et al. (2021)",
    ),
]


def shapes(row: Row) -> Any:
    """The model, in shapes."""
    return eqx.filter_eval_shape(row.make, key=jr.key(0))


def count(row: Row) -> tuple[int, int]:
    """Parameters of the model, and of its cell."""
    model = shapes(row)
    return count_parameters(model), count_parameters(row.cell(model))


def memory(row: Row) -> int:
    """Bytes that one example's gradient takes beside model and gradient themselves.

    By the compiler's own account.
    """
    moving, fixed = eqx.partition(shapes(row), _is_inexact)

    def gradient(moving: Any, data: Any, key: Any) -> Any:
        loss = lambda moving: row.loss(eqx.combine(moving, fixed), data, key)
        return jax.grad(loss)(moving)

    compiled = jax.jit(gradient).lower(moving, row.data, jr.key(0)).compile()
    account = compiled.memory_analysis()
    if account is None:
        raise RuntimeError(f"{jax.default_backend()} gives no account of memory.")
    return int(account.temp_size_in_bytes)


def _is_inexact(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


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
        whole, cell = count(row)
        used = recorded.get(row.name)
        entries = (
            f"`{row.name}`",
            f"{whole:,}",
            f"{cell:,}" if cell else "–",
            row.inputs,
            f"{row.state:,}" if row.state else "–",
            f"{used / 2**20:,.0f} MiB" if used else "–",
            row.source,
        )
        lines.append("| " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def record() -> dict[str, Any]:
    """What `--memory` writes."""
    return {
        "versions": {"deqjax": deqjax.__version__, "jax": jax.__version__},
        "device": f"{jax.default_backend()}, {platform.machine()}",
        "bytes": {row.name: memory(row) for row in ROWS},
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", action="store_true", help="measure memory")
    parser.add_argument("--write", action="store_true", help="write the documentation")
    options = parser.parse_args()
    if options.memory:
        MEMORY.write_text(json.dumps(record(), indent=2) + "\n")
    text = table(json.loads(MEMORY.read_text())["bytes"])
    if options.write:
        PAGE.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
