"""How exact are the gradients of a reversible DEQ, and what do they cost?

    python benchmarks/reversal.py

Measures, for maps of known character, the relative error of the gradient of N
reversible steps against backpropagation in float64: for records of 4, 8 and 16 bits,
for floats undone without a record, and for float32 backpropagation; with the drift and
the largest repair that each backward pass reports. Then how far two evaluations may
differ, the memory that one more step takes, and the time of a gradient over that of its
parts. Writes `benchmarks/results/reversal-DEVICE.json`, and from it the tables and the
figure of the documentation.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.experimental import io_callback

import deqjax

if not __package__:  # run as a script: what is imported below lies beside it
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks._reversal_costs import BITS, memory, normalise, times
from benchmarks._reversal_report import figure, table

ROOT = pathlib.Path(__file__).resolve().parent.parent
BETAS = (0.5, 0.8, 0.9, 0.95)
STEPS = (4, 8, 16, 32, 64, 128)
# Of the two evaluations at one point, relative to the typical size of f.
NOISES = tuple(2.0**k for k in range(-24, -5))


# Maps


def rectified(z: jax.Array, args: tuple) -> jax.Array:
    """A contraction of Lipschitz constant 0.9."""
    w, u, x = args
    return jax.nn.relu(z @ w.T + x @ u.T)


def residual_block(z: jax.Array, args: tuple) -> jax.Array:
    """A residual MLP with post-normalisation; not a contraction."""
    w, u, x = args
    return normalise(z + jax.nn.gelu(2 * z @ w.T + x @ u.T) @ w)


MAPS = {"rectified contraction": rectified, "post-norm block": residual_block}


def arguments(key: jax.Array, batch: int = 8, width: int = 64) -> tuple:
    """(w, u, x) of the maps; w has spectral norm 0.9."""
    k1, k2, k3 = jr.split(key, 3)
    w = jr.normal(k1, (width, width))
    u = jr.normal(k2, (width, width)) / jnp.sqrt(width)
    return 0.9 * w / jnp.linalg.norm(w, 2), u, jr.normal(k3, (batch, width))


# Gradients of (start, args), each with its drift and its largest repair. β and N are
# chosen at run time, so that each method is compiled once.

Gradient = Callable[..., tuple[Any, jax.Array, jax.Array]]


def with_record(fn: Any, bits: int, weights: jax.Array) -> Gradient:
    """By deqjax, with a record of so many bits."""

    def loss(inputs: tuple, probe: Any, beta: jax.Array, steps: jax.Array) -> jax.Array:
        start, args = inputs
        adjoint = deqjax.ReversibleAdjoint(
            record_bits=bits,
            probe=probe,
            drift_tol=float("inf"),  # To see the error instead of NaN.
        )
        sol = deqjax.fixed_point(
            fn,
            start,
            args,
            solver=deqjax.Reversible(None, None),
            adjoint=adjoint,
            max_steps=max(STEPS),
            options={"beta": beta, "step_budget": steps},
        )
        return jnp.sum(sol.value.astype(weights.dtype) * weights)

    def gradient(inputs: tuple, beta: jax.Array, steps: jax.Array) -> Any:
        both = jax.grad(loss, argnums=(0, 1))
        grads, stats = both(inputs, deqjax.BackwardStats(), beta, steps)
        return grads, stats.drift, stats.repair

    return jax.jit(gradient)


def without_record(fn: Any, weights: jax.Array) -> Gradient:
    """By undoing the steps in floating point, as the formula has it."""

    def gradient(inputs: tuple, beta: jax.Array, steps: jax.Array) -> Any:
        start, args = inputs
        beta = beta.astype(start.dtype)

        def forward(_: jax.Array, pair: tuple) -> tuple:
            a, b = pair
            return b, (1 - beta) * a + beta * fn(b, args)

        def backward(_: jax.Array, carry: tuple) -> tuple:
            (a, b), (ct_a, ct_b), total = carry
            f, pull = jax.vjp(fn, a, args)
            g_a, grads = pull(beta * ct_b)
            total = jax.tree.map(jnp.add, total, grads)
            return (
                ((b - beta * f) / (1 - beta), a),
                ((1 - beta) * ct_b, ct_a + g_a),
                total,
            )

        pair = jax.lax.fori_loop(0, 2 * steps, forward, (start, start))
        cts = jnp.zeros_like(start), weights.astype(start.dtype)
        first = pair, cts, jax.tree.map(jnp.zeros_like, args)
        pair, cts, grads = jax.lax.fori_loop(0, 2 * steps, backward, first)
        drift = jnp.max(jnp.abs(jnp.stack(pair) - start))
        return (sum(cts), grads), drift, jnp.array(jnp.nan)

    return jax.jit(gradient)


def backpropagation(fn: Any, weights: jax.Array) -> Gradient:
    """Through a loop that JAX differentiates."""

    def gradient(inputs: tuple, beta: jax.Array, steps: jax.Array) -> Any:
        def loss(inputs: tuple) -> jax.Array:
            start, args = inputs
            b = beta.astype(start.dtype)

            def half(pair: tuple, h: jax.Array) -> tuple:
                new = (pair[1], (1 - b) * pair[0] + b * fn(pair[1], args))
                keep = lambda x, y: jnp.where(h < 2 * steps, x, y)
                return jax.tree.map(keep, new, pair), None

            halves = jnp.arange(2 * max(STEPS))
            (_, z), _ = jax.lax.scan(half, (start, start), halves)
            return jnp.sum(z.astype(weights.dtype) * weights)

        return jax.grad(loss)(inputs), jnp.zeros(()), jnp.array(jnp.nan)

    return jax.jit(gradient)


# Measurements


def relative_error(got: Any, want: Any) -> float:
    """‖got − want‖ / ‖want‖ over all leaves, in float64."""
    flat = lambda t: np.concatenate(
        [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)]
    )
    a, b = flat(got), flat(want)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def errors(name: str, seed: int) -> list[dict[str, Any]]:
    """The gradient errors of one map, for every β, N and method."""
    fn = MAPS[name]
    k1, k2, k3 = jr.split(jr.key(seed), 3)
    args = arguments(k1)
    weights = jr.normal(k2, args[-1].shape)
    start = 0.1 * jr.normal(k3, args[-1].shape)
    cast = lambda dtype: jax.tree.map(lambda t: t.astype(dtype), (start, args))
    methods = {f"{bits} bits": with_record(fn, bits, weights) for bits in BITS}
    methods["no record"] = without_record(fn, weights)
    methods["backpropagation"] = reference = backpropagation(fn, weights)
    rows = []
    for beta in BETAS:
        for steps in STEPS:
            choice = (jnp.array(beta), jnp.array(steps))
            exact, *_ = reference(cast(jnp.float64), *choice)
            row: dict[str, Any] = {"map": name, "beta": beta, "steps": steps}
            for method, gradient in methods.items():
                got, drift, repair = gradient(cast(jnp.float32), *choice)
                row[method] = relative_error(got, exact)
                if method != "backpropagation":
                    row[f"drift, {method}"] = float(drift)
                if method.endswith("bits"):
                    row[f"repair, {method}"] = float(repair)
            rows.append(row)
        print(f"{name}, beta = {beta}: done", flush=True)
    return rows


def tolerance(seed: int, steps: int = 12) -> list[dict[str, Any]]:
    """The largest repair, and the drift, where no two evaluations are alike."""
    args = jax.tree.map(lambda t: t.astype(jnp.float32), arguments(jr.key(seed)))
    start = jnp.zeros_like(args[-1])
    like = jax.ShapeDtypeStruct(start.shape, jnp.float32)
    rng = np.random.default_rng(seed)
    # Two evaluations differ by up to twice the amplitude.
    draw = lambda: rng.uniform(-0.5, 0.5, like.shape).astype(np.float32)
    weights = jnp.ones_like(start)

    def fn(z: jax.Array, scaled: tuple) -> jax.Array:
        noise, args = scaled
        f = residual_block(z, args)
        return f + jax.lax.stop_gradient(noise * io_callback(draw, like))

    rows = []
    for bits in BITS:
        gradient = with_record(fn, bits, weights)
        for beta in BETAS:
            for noise in NOISES:
                inputs = start, (jnp.float32(noise), args)
                _, drift, repair = gradient(inputs, jnp.array(beta), jnp.array(steps))
                row = {"bits": bits, "beta": beta, "noise": noise}
                rows.append({**row, "drift": float(drift), "repair": float(repair)})
        print(f"tolerance of {bits} bits: done", flush=True)
    return rows


def commit() -> str:
    """The commit measured, or "unknown" outside a checkout or without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Measure, and write the results, the tables and the figure."""
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument("--seed", type=int, default=0, help="of the maps (default 0)")
    cli.add_argument(
        "--parts",
        nargs="+",
        choices=("errors", "tolerance", "memory", "times"),
        help="measure these anew; the others stay as recorded (default: all)",
    )
    cli.add_argument(
        "--redraw", action="store_true", help="only draw what was measured before"
    )
    options = cli.parse_args()
    with jax.enable_x64(True):  # For the reference.
        run(options)


def run(options: argparse.Namespace) -> None:
    """Measure, with float64 enabled."""
    device = jax.devices()[0].device_kind.replace(" ", "-").lower()
    path = ROOT / "benchmarks" / "results" / f"reversal-{device}.json"
    parts: dict[str, Callable[[], Any]] = {
        "errors": lambda: [row for name in MAPS for row in errors(name, options.seed)],
        "tolerance": lambda: tolerance(options.seed),
        "memory": memory,
        "times": times,
    }
    if not options.redraw:
        wanted = options.parts or list(parts)
        old = {} if len(wanted) == len(parts) else json.loads(path.read_text())
        results = {
            "device": device,
            "jax": jax.__version__,
            "deqjax": deqjax.__version__,
            "commit": commit(),
            "seed": options.seed,
            **{k: part() if k in wanted else old[k] for k, part in parts.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(path.read_text())
    (ROOT / "docs" / "reversal-table.md").write_text(table(results))
    figure(results, ROOT / "docs" / "images" / "reversal.png")
    print(f"{path}\n{table(results)}")


if __name__ == "__main__":
    main()
