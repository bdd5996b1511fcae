"""Every named configuration of deqjax's models: parameters, sizes and memory.

    python benchmarks/model_table.py              print the table
    python benchmarks/model_table.py --memory     compile one gradient of each, and
                                                  record what memory it takes
    python benchmarks/model_table.py --write      write the table of the documentation

Nothing is allocated: models are counted, and gradients compiled, from shapes alone.
"""

import argparse
import functools as ft
import json
import math
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import deqjax
from deqjax.nn import (
    DEQTransformerLM,
    ImplicitResNet,
    MDEQClassifier,
    MDEQSegmenter,
    MonotoneClassifier,
    RevDEQClassifier,
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
        make: `make(key=key)` makes it.
        inputs: The input of one example, in words.
        data: The shapes of one example's input and target.
        run: `run(model, state, data, key)` returns a scalar loss of one example, and
            its equilibria. `state` is that of batch norms, None where there are none.
        source: Where the configuration is from.
        cell: What of the model is evaluated again and again; None: nothing.
    """

    make: Callable[..., Any]
    inputs: str
    data: Any
    run: Callable[..., Any]
    source: str
    cell: Callable[[Any], Any]

    @property
    def name(self) -> str:
        """How it is made, below `deqjax.nn`."""
        return self.make.__qualname__


# --- language models ------------------------------------------------------------------


def tokens(length: int) -> tuple[Any, Any]:
    """The shapes of one sequence, and of what follows each of its tokens."""
    shape = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return shape, shape


def nll(logits: Any, targets: Any) -> Any:
    """The mean of −log p of the targets; classes along the last axis."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def reversible_lm(model: Any, state: None, data: Any, key: Any) -> Any:
    """`RevDEQLM`."""
    sol = model.solve(data[0])
    return nll(model.logits(sol.value), data[1]), sol.value


def explicit_lm(model: Any, state: None, data: Any, key: Any) -> Any:
    """`TransformerLM`."""
    return nll(model(data[0]), data[1]), ()


def adaptive_lm(model: Any, state: None, data: Any, key: Any) -> Any:
    """`DEQTransformerLM`, whose softmax is adaptive."""
    sol, _ = model.solve(data[0], key=key)
    return jnp.mean(model.nll(sol.value, data[1], key=key)), sol.value


# --- image models ---------------------------------------------------------------------


def image(height: int, width: int, *labels: int) -> tuple[Any, Any]:
    """The shapes of one image, and of its label or labels."""
    shape = jax.ShapeDtypeStruct((1, 3, height, width), jnp.float32)
    return shape, jax.ShapeDtypeStruct((1, *labels), jnp.int32)


def multiscale(model: Any, state: Any, data: Any, key: Any) -> Any:
    """`MDEQClassifier` and `MDEQSegmenter`."""
    sol, state = model.solve(data[0], state, key=key)
    logits, _ = model.logits(sol.value, state)
    return nll(jnp.moveaxis(logits, 1, -1), data[1]), sol.value


def reversible_images(model: Any, state: Any, data: Any, key: Any) -> Any:
    """`RevDEQClassifier`, with an equilibrium for each scale."""
    features, sols, _ = model.solve(data[0], state)
    return nll(model.logits(features), data[1]), [sol.value for sol in sols]


def residual(model: Any, state: Any, data: Any, key: Any) -> Any:
    """`ImplicitResNet`."""
    sol, _ = model.solve(data[0], state, key=key)
    return nll(model.logits(sol.value, key=key), data[1]), sol.value


def monotone(model: Any, state: None, data: Any, key: Any) -> Any:
    """`MonotoneClassifier`."""
    sol = model.solve(data[0])
    return nll(model.logits(sol.value), data[1]), sol.value


MCCALLUM = "McCallum et al. (2025)"
MDEQ = "Bai et al. (2020)"
MONDEQ = "Winston & Kolter (2020)"

CIFAR, IMAGENET = ("3 × 32 × 32", image(32, 32)), ("3 × 224 × 224", image(224, 224))
STREETS = ("3 × 512 × 1024", image(512, 1024, 128, 256))
WIDE_STREETS = ("3 × 768 × 1024", image(768, 1024, 192, 256))
DIGITS = jax.ShapeDtypeStruct((1, 784), jnp.float32), image(28, 28)[1]

of_deq = lambda model: model.deq
of_deqs = lambda model: model.deqs
of_backbone = lambda model: model.backbone.deq
of_operator = lambda model: model.layer.operator
DEQ_2019 = (adaptive_lm, "Bai et al. (2019)", of_deq)
DEQ_2021 = (adaptive_lm, "Bai et al. (2021)", of_deq)
MULTISCALE = (multiscale, MDEQ, of_backbone)
MONOTONE = (monotone, MONDEQ, of_operator)
LONG = ("448 tokens", tokens(448))
REVERSIBLE = (reversible_images, MCCALLUM, of_deqs)

ROWS = [
    Row(RevDEQLM.wikitext103, *LONG, reversible_lm, MCCALLUM, of_deq),
    Row(
        TransformerLM.wikitext103,
        *LONG,
        explicit_lm,
        "of equal size, for comparison",
        lambda model: None,
    ),
    Row(
        DEQTransformerLM.wikitext103,
        "150 tokens, memory of 150",
        tokens(150),
        *DEQ_2019,
    ),
    Row(
        DEQTransformerLM.wikitext103_regularised,
        "150 tokens, memory of 300",
        tokens(150),
        *DEQ_2021,
    ),
    Row(MDEQClassifier.cifar10_tiny, *CIFAR, *MULTISCALE),
    Row(MDEQClassifier.cifar10_large, *CIFAR, *MULTISCALE),
    Row(MDEQClassifier.imagenet_small, *IMAGENET, *MULTISCALE),
    Row(MDEQClassifier.imagenet_large, *IMAGENET, *MULTISCALE),
    Row(MDEQSegmenter.cityscapes_small, *STREETS, *MULTISCALE),
    Row(MDEQSegmenter.cityscapes_large, *STREETS, *MULTISCALE),
    Row(MDEQSegmenter.cityscapes_xl, *WIDE_STREETS, *MULTISCALE),
    Row(RevDEQClassifier.cifar10, *CIFAR, *REVERSIBLE),
    Row(RevDEQClassifier.cifar10_single, *CIFAR, *REVERSIBLE),
    Row(ImplicitResNet.cifar10, *CIFAR, residual, "Fung et al. (2022)", of_deq),
    Row(MonotoneClassifier.mnist_dense, "784", DIGITS, *MONOTONE),
    Row(MonotoneClassifier.cifar10_conv, *CIFAR, *MONOTONE),
    Row(MonotoneClassifier.cifar10_tiers, *CIFAR, *MONOTONE),
    Row(MonotoneClassifier.cifar10_conv_large, *CIFAR, *MONOTONE),
    Row(MonotoneClassifier.cifar10_tiers_large, *CIFAR, *MONOTONE),
]


# --- what is said of them -------------------------------------------------------------


def init(row: Row, key: Any, **settings: Any) -> tuple[Any, Any]:
    """The model, and the state of its batch norms (empty where it has none)."""
    return eqx.nn.make_with_state(row.make)(key=key, **settings)


@ft.cache
def shapes(row: Row) -> tuple[Any, Any]:
    """What `init` returns, in shapes."""
    return eqx.filter_eval_shape(init, row, jr.key(0))


def count(row: Row) -> tuple[int, int]:
    """Parameters of the model, and of its cell."""
    model, _ = shapes(row)
    return count_parameters(model), count_parameters(row.cell(model))


def state_size(row: Row) -> int:
    """Entries of the equilibria of one example."""
    _, equilibria = eqx.filter_eval_shape(row.run, *shapes(row), row.data, jr.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(equilibria))


def gradient(row: Row, model: Any, state: Any) -> tuple[Callable, Any]:
    """A function of arrays, and the arrays it takes beside data and key.

    It returns the loss of one example and its gradient.
    """
    moving, fixed = eqx.partition(model, _is_inexact)
    arrays, static = eqx.partition(state, _is_array)

    def run(arrays: Any, data: Any, key: Any) -> Any:
        moving, state = arrays

        def loss(moving: Any) -> Any:
            state_ = eqx.combine(state, static)
            return row.run(eqx.combine(moving, fixed), state_, data, key)[0]

        return jax.value_and_grad(loss)(moving)

    return run, (moving, arrays)


def memory(row: Row) -> int:
    """Bytes that one example's loss and gradient take beside model and gradient.

    By the compiler's own account.
    """
    run, arrays = gradient(row, *shapes(row))
    # Buffers are assigned before LLVM optimises, which takes half the time.
    run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    compiled = run.lower(arrays, row.data, jr.key(0)).compile()
    account = compiled.memory_analysis()
    if account is None:
        raise RuntimeError(f"{jax.default_backend()} gives no account of memory.")
    return int(account.temp_size_in_bytes)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype")


def _is_inexact(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


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
