"""Memory of gradients against depth: `python -m benchmarks.reasoning.memory`."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array

import deqjax
from benchmarks.common import training

from ._cells import LoopModel
from ._config import Config, make_config
from ._tasks import make_task
from ._train import temporary_bytes
from ._ways import apply_cell, solve

DEPTHS = (4, 8, 16, 32, 64, 128, 256)
_DESCRIPTION = """\
Compile the gradient of one loop for 4 to 256 steps, of two evaluations each, with every
gradient there is, and write down the temporary memory that the compiler gives each:
the model of `groups --preset published`, a batch of 256 words of 32 elements of A5.
Nothing is trained, and nothing of that size is allocated."""

_ADJOINTS: dict[str, Any] = {
    "one-step gradient": deqjax.JFBAdjoint(),
    "last 4 steps": deqjax.UnrolledAdjoint(last=4),
    "exact, by reversal": deqjax.ReversibleAdjoint(),
    "exact, checkpointed": deqjax.UnrolledAdjoint(),
    "exact, all states stored": None,
}
_STYLES = {
    "one-step gradient": {"color": "#D55E00", "marker": "v"},
    "last 4 steps": {"color": "#E69F00", "marker": "^"},
    "exact, by reversal": {"color": "#0072B2", "marker": "o"},
    "exact, checkpointed": {"color": "#009E73", "marker": "s"},
    "exact, all states stored": {"color": "#777777", "marker": "D"},
}


def backpropagate(model: LoopModel, x: Array, config: Config) -> Array:
    """The same steps as a plain loop, of which JAX keeps everything."""
    beta = config.beta
    relax = lambda a, b: jtu.tree_map(lambda a, b: (1 - beta) * a + beta * b, a, b)

    def step(states: Any, _: None) -> tuple[Any, None]:
        y, z = states
        y = relax(y, apply_cell(z, (model.cell, x)))
        z = relax(z, apply_cell(y, (model.cell, x)))
        return (y, z), None

    start = model.initial_state(x)
    (_, z), _ = lax.scan(step, (start, start), length=config.steps)
    return z


def gradient_of(config: Config, adjoint: Any) -> tuple[Callable, LoopModel, Any]:
    """A function whose gradient it is, and the shapes of its arguments."""
    task = make_task(config)
    model = eqx.filter_eval_shape(task.model, jr.key(0))
    params, static = eqx.partition(
        model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    )
    shape = (config.batch_size, config.length)

    def loss(params: Any, inputs: Array, targets: Array) -> Array:
        model = eqx.combine(params, static)
        x = model.inject(inputs)
        if adjoint is None:
            z = backpropagate(model, x, config)
        else:
            z = solve(model, x, config, adjoint)
        logits = jax.nn.log_softmax(model.logits(z))
        return -jnp.mean(jnp.take_along_axis(logits, targets[..., None], axis=-1))

    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    return jax.grad(loss), params, (tokens, tokens)


def measure(config: Config, name: str) -> int | None:
    """Temporary bytes of the compiled gradient."""
    gradient, params, tokens = gradient_of(config, _ADJOINTS[name])
    return temporary_bytes(jax.jit(gradient).lower(params, *tokens).compile())


def draw(results: dict[str, Any], path: Path) -> None:
    """Memory over depth, both logarithmic."""
    from matplotlib.figure import Figure

    with training.use_style():
        figure = Figure(figsize=(7.5, 4.8), dpi=130, layout="constrained")
        axes: Any = figure.subplots()
        for name, row in results["temporary_mib"].items():
            axes.plot(results["depths"], row, label=name, **_STYLES[name])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(results["depths"], map(str, results["depths"]))
        axes.set(xlabel="steps, of two evaluations each")
        axes.set(ylabel="temporary memory of the gradient (MiB)")
        axes.legend()
        figure.suptitle(
            "Memory of a gradient through a loop, by the compiler's account",
            fontsize=12,
            fontweight="bold",
        )
        figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.reasoning.memory",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="receives memory.json and memory.png",
    )
    parser.add_argument(
        "--depths",
        type=int,
        nargs="+",
        default=DEPTHS,
        metavar="N",
        help="increasing numbers of steps, each at least 4. Default: 4 to 256",
    )
    args = parser.parse_args(argv)
    depths = sorted(set(args.depths))
    if depths[0] < 4:
        parser.error(f"--depths: got {depths[0]}, but the last 4 steps need 4 or more")
    config = make_config("groups", "published", {})
    state = config.batch_size * config.length * config.width * 4 / 2**20
    table: dict[str, list[float | None]] = {}
    for name in _ADJOINTS:
        table[name] = []
        for depth in depths:
            size = measure(
                make_config("groups", "published", {"steps": depth, "last": 4}), name
            )
            table[name].append(None if size is None else round(size / 2**20, 2))
            print(f"{name}, {depth} steps: {table[name][-1]} MiB", file=sys.stderr)
    results = {
        "depths": depths,
        "temporary_mib": table,
        "state_mib": state,
        "config": config.to_json(),
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "deqjax": deqjax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
    }
    args.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    training.write_atomically(args.output / "memory.json", text + "\n")
    draw(results, args.output / "memory.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
