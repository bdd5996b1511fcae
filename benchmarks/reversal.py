"""How exact are the gradients of a reversible DEQ, and what do they cost in memory?

    python benchmarks/reversal.py

Measures, for maps of known character, the relative error of the gradient of N
reversible steps against backpropagation in float64: for exact and float arithmetic,
with anchors, and for float32 backpropagation. Then the drift that each backward pass
reports, and the bytes per step that the compiler reserves. Writes
`benchmarks/results/reversal-DEVICE.json`, and from it the table and the figure of the
documentation.
"""

import argparse
import functools as ft
import json
import pathlib
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import deqjax

ROOT = pathlib.Path(__file__).resolve().parent.parent
BETAS = (0.5, 0.75, 0.8, 0.9)
STEPS = (4, 8, 16, 32, 64, 128)
METHODS = {
    "exact": "exact arithmetic",
    "float": "float arithmetic",
    "anchors": "float arithmetic, anchors",
    "backpropagation": "backpropagation",
}


# Maps


def normalise(h: jax.Array) -> jax.Array:
    """To mean 0 and variance 1 along the last axis."""
    h = h - h.mean(-1, keepdims=True)
    return h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5)


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


# Measurements


def gradient_of(fn: Any, method: str, weights: jax.Array) -> Any:
    """A compiled function (start, args, β's index, N) -> gradient, drift.

    β and N are chosen at run time, so that each method is compiled once.
    """
    arithmetic = "exact" if method == "exact" else "float"
    solver = deqjax.Reversible(None, None, beta=BETAS, arithmetic=arithmetic)

    def loss(inputs: tuple, probe: Any, beta: jax.Array, steps: jax.Array) -> jax.Array:
        start, args = inputs
        adjoint = deqjax.ReversibleAdjoint(
            probe=probe,
            anchors="auto" if method == "anchors" else None,
            drift_tol=float("inf"),  # To see the error instead of NaN.
        )
        if method == "backpropagation":
            adjoint = deqjax.UnrolledAdjoint()
        sol = deqjax.fixed_point(
            fn,
            start,
            args,
            solver=solver,
            adjoint=adjoint,
            max_steps=max(STEPS),
            options={"beta": beta, "step_budget": steps},
        )
        return jnp.sum(sol.value.astype(weights.dtype) * weights)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


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
    compiled = {method: gradient_of(fn, method, weights) for method in METHODS}
    rows = []
    for i, beta in enumerate(BETAS):
        for steps in STEPS:
            choice = (jnp.array(i), jnp.array(steps))
            probe = deqjax.BackwardStats()
            reference = compiled["backpropagation"]
            exact, _ = reference(cast(jnp.float64), probe, *choice)
            row: dict[str, Any] = {"map": name, "beta": beta, "steps": steps}
            for method, gradient in compiled.items():
                got, stats = gradient(cast(jnp.float32), probe, *choice)
                row[method] = relative_error(got, exact)
                if method != "backpropagation":
                    row[f"drift, {method}"] = float(stats.drift)
            rows.append(row)
        print(f"{name}, beta = {beta}: done", flush=True)
    return rows


def temp_bytes(loss: Any, args: tuple) -> int:
    """The bytes that the compiler reserves for the gradient of `loss`."""
    analysis = jax.jit(jax.grad(loss)).lower(args).compile().memory_analysis()
    if analysis is None:
        raise RuntimeError("This platform does not tell the memory of a program.")
    return analysis.temp_size_in_bytes


def memory() -> list[dict[str, Any]]:
    """Bytes per step of the gradient program, in copies of the state."""

    def block(z: jax.Array, args: tuple) -> jax.Array:
        a, b, x = args
        return normalise(z + jax.nn.gelu(z @ a) @ b + x)

    keys = jr.split(jr.key(0), 3)
    a = jr.normal(keys[0], (128, 512)) / jnp.sqrt(128)
    b = jr.normal(keys[1], (512, 128)) / jnp.sqrt(512)
    args = jax.tree.map(
        lambda t: t.astype(jnp.float32), (a, b, jr.normal(keys[2], (256, 128)))
    )
    start = jnp.zeros_like(args[-1])

    def temp(beta: float, adjoint: Any, arithmetic: Any, steps: int) -> int:
        solver = deqjax.Reversible(None, None, beta=beta, arithmetic=arithmetic)

        def loss(args: tuple) -> jax.Array:
            sol = deqjax.fixed_point(
                block, start, args, solver=solver, adjoint=adjoint, max_steps=steps
            )
            return jnp.sum(sol.value)

        return temp_bytes(loss, args)

    def scan(beta: float, steps: int) -> int:
        def step(pair: tuple, _: None) -> tuple:
            y, z = pair
            y = (1 - beta) * y + beta * block(z, scan_args[0])
            z = (1 - beta) * z + beta * block(y, scan_args[0])
            return (y, z), None

        scan_args: list[Any] = [None]

        def loss(args: tuple) -> jax.Array:
            scan_args[0] = args
            (_, z), _ = jax.lax.scan(step, (start, start), None, length=steps)
            return jnp.sum(z)

        return temp_bytes(loss, args)

    rows = []
    adjoint = deqjax.ReversibleAdjoint()
    slope = lambda measure: (measure(96) - measure(32)) / 64 / start.nbytes
    for beta in BETAS:
        exact = ft.partial(temp, beta, adjoint, "exact")
        floats = ft.partial(temp, beta, adjoint, "float")
        rows.append(
            {
                "beta": beta,
                "exact": slope(exact),
                "float": slope(floats),
                "storing states": 2.0,
                "storing activations": slope(ft.partial(scan, beta)),
            }
        )
    return rows


# Reports


def table(results: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    lines = [
        "| map | β | N | exact | float | float, anchors | backpropagation |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["errors"]:
        if row["beta"] in (0.5, 0.8, 0.9):
            numbers = " | ".join(f"{row[method]:.0e}" for method in METHODS)
            lines.append(
                f"| {row['map']} | {row['beta']} | {row['steps']} | {numbers} |"
            )
    lines += [
        "",
        "| β | exact | float | two states | activations |",
        "|---|---|---|---|---|",
    ]
    for row in results["memory"]:
        numbers = (row[k] for k in ("exact", "float", "storing states"))
        text = " | ".join(f"{n:.3f}" for n in numbers)
        lines.append(f"| {row['beta']} | {text} | {row['storing activations']:.1f} |")
    lines += [
        "",
        f"Measured on {results['device']} with JAX {results['jax']}, commit "
        f"{results['commit']}; float32, batch 8, width 64.",
    ]
    return "\n".join(lines) + "\n"


def figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Gradient error against depth, one panel per map, at β = 0.8."""
    fig, axes = plt.subplots(1, len(MAPS), figsize=(9, 3.6), sharey=True)
    styles = dict(zip(METHODS, ("o-", "s--", "^:", "k."), strict=True))
    for ax, name in zip(axes, MAPS, strict=True):
        rows = [r for r in results["errors"] if r["map"] == name and r["beta"] == 0.8]
        for method, label in METHODS.items():
            values = np.array([row[method] for row in rows])
            values = np.where(np.isfinite(values), np.minimum(values, 1e3), np.nan)
            ax.loglog([r["steps"] for r in rows], values, styles[method], label=label)
        ax.set_title(f"{name}, β = 0.8")
        ax.set_xlabel("steps N")
        ax.set_xticks(STEPS, [str(n) for n in STEPS])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of the gradient")
    axes[0].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=150)


def commit() -> str:
    """The commit measured, or "unknown" outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Measure, and write the results, the table and the figure."""
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument("--seed", type=int, default=0, help="of the maps (default 0)")
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
    if not options.redraw:
        results = {
            "device": device,
            "jax": jax.__version__,
            "deqjax": deqjax.__version__,
            "commit": commit(),
            "seed": options.seed,
            "errors": [row for name in MAPS for row in errors(name, options.seed)],
            "memory": memory(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(path.read_text())
    (ROOT / "docs" / "reversal-table.md").write_text(table(results))
    figure(results, ROOT / "docs" / "images" / "reversal.png")
    print(f"{path}\n{table(results)}")


if __name__ == "__main__":
    main()
