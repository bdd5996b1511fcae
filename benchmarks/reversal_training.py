"""Does exact reversal train as backpropagation does?

    python benchmarks/reversal_training.py

Trains a small RevDEQ classifier on the handwritten digits of scikit-learn by float32
backpropagation, for several β and N, and takes the gradient by exact reversal at the
parameters that it passes. Then trains by exact reversal, and by backpropagation from
starts that differ in the last bit (three of them; the largest distance counts), and
compares the loss curves: two float32 trainings part in any case, the more the deeper
the model. Writes
`benchmarks/results/reversal-training-DEVICE.json`.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from sklearn.datasets import load_digits

import deqjax

if not __package__:  # run as a script: what is imported below lies beside it
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks.reversal import commit, normalise, relative_error

ROOT = pathlib.Path(__file__).resolve().parent.parent
WIDTH = 64


class Classifier(eqx.Module):
    """Linear stem, residual post-norm cell, linear head."""

    stem: jax.Array
    inner: jax.Array
    outer: jax.Array
    head: jax.Array

    def __init__(self, key: jax.Array):
        """Initialise, in float32."""
        k1, k2, k3, k4 = jr.split(key, 4)
        draw = lambda k, m, n: jr.normal(k, (m, n), jnp.float32) / m**0.5
        self.stem = draw(k1, 64, WIDTH)
        self.inner = draw(k2, WIDTH, 2 * WIDTH)
        self.outer = draw(k3, 2 * WIDTH, WIDTH)
        self.head = draw(k4, WIDTH, 10)

    def cell(self, z: jax.Array, x: jax.Array) -> jax.Array:
        """A residual MLP with post-normalisation; not a contraction."""
        return normalise(z + jax.nn.gelu(z @ self.inner) @ self.outer + x)


Solve = Callable[[Classifier, jax.Array], jax.Array]


def by_reversal(beta: float, steps: int) -> Solve:
    """The equilibrium, with the gradient by exact reversal."""
    solver = deqjax.Reversible(None, None, beta=beta)

    def solve(model: Classifier, x: jax.Array) -> jax.Array:
        sol = deqjax.fixed_point(model.cell, x, x, solver=solver, max_steps=steps)
        return sol.value

    return solve


def by_backpropagation(beta: float, steps: int) -> Solve:
    """The same iteration in floats, backpropagated through."""

    def solve(model: Classifier, x: jax.Array) -> jax.Array:
        def step(pair: tuple, _: None) -> tuple:
            y, z = pair
            y = (1 - beta) * y + beta * model.cell(z, x)
            z = (1 - beta) * z + beta * model.cell(y, x)
            return (y, z), None

        return jax.lax.scan(step, (x, x), None, length=steps)[0][1]

    return solve


def gradient(solve: Solve) -> Callable:
    """A compiled function (model, images, labels) -> loss, gradient."""

    def loss(model: Classifier, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = solve(model, images @ model.stem) @ model.head
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(entropy)

    return eqx.filter_jit(eqx.filter_value_and_grad(loss))


def train(
    gradient: Callable, model: Any, batches: list, watch: Callable | None = None
) -> list[float]:
    """Losses of a training by Adam; `watch(i, model, batch)` sees every step."""
    optimiser = optax.adam(1e-3)
    state = optimiser.init(model)

    @eqx.filter_jit
    def update(model: Any, state: Any, grads: Any) -> tuple:
        updates, state = optimiser.update(grads, state)
        return eqx.apply_updates(model, updates), state

    losses = []
    for i, batch in enumerate(batches):
        if watch is not None:
            watch(i, model, batch)
        loss, grads = gradient(model, *batch)
        losses.append(float(loss))
        model, state = update(model, state, grads)
    return losses


def nudged(model: Classifier, direction: float) -> Classifier:
    """The next floats towards `direction`."""
    return jax.tree.map(lambda t: jnp.nextafter(t, direction), model)


def case(beta: float, steps: int, seed: int, updates: int) -> dict[str, Any]:
    """One β and N."""
    pixels, digits = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    picks = [rng.choice(1797, 64, replace=False) for _ in range(updates + 1)]
    images = (np.asarray(pixels) / 8 - 1).astype(np.float32)
    batches = [(jnp.asarray(images[i]), jnp.asarray(digits)[i]) for i in picks]
    model = Classifier(jr.key(seed))
    plain = gradient(by_backpropagation(beta, steps))
    ours = gradient(by_reversal(beta, steps))
    errors = []

    def watch(i: int, model: Classifier, batch: tuple) -> None:
        if i % 10 == 0:
            wide, x = jax.tree.map(lambda t: t.astype(jnp.float64), (model, batch[0]))
            _, exact = plain(wide, x, batch[1])
            pair = [relative_error(g(model, *batch)[1], exact) for g in (ours, plain)]
            errors.append(pair)

    curve = np.array(train(plain, model, batches, watch))
    twins = [
        np.array(train(plain, nudged(model, direction), batches))
        for direction in (jnp.inf, -jnp.inf, 0.0)
    ]
    reversal = np.array(train(ours, model, batches))
    return {
        "beta": beta,
        "steps": steps,
        "error, reversal": [e[0] for e in errors],
        "error, backpropagation": [e[1] for e in errors],
        "worst ratio of errors": max(a / b for a, b in errors),
        "distance of losses, reversal": float(np.abs(reversal - curve).max()),
        "distance of losses, last bit": float(max(abs(t - curve).max() for t in twins)),
        "last loss": float(curve[-1]),
    }


def main() -> None:
    """Measure every case, print a line each, write the results."""
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument("--seed", type=int, default=0, help="of model and batches")
    cli.add_argument("--updates", type=int, default=50, help="of Adam (default 50)")
    options = cli.parse_args()
    with jax.enable_x64(True):  # For the reference.
        run(options)


def run(options: argparse.Namespace) -> None:
    """Measure, with float64 enabled."""
    rows = []
    for beta in (0.5, 0.8, 0.9):
        for steps in (4, 12, 40):
            row = case(beta, steps, options.seed, options.updates)
            rows.append(row)
            print(
                f"beta {beta} N {steps:2}: gradient error / backpropagation's "
                f"{row['worst ratio of errors']:.2f}; losses part by "
                f"{row['distance of losses, reversal']:.1e} (last bit: "
                f"{row['distance of losses, last bit']:.1e})",
                flush=True,
            )
    device = jax.devices()[0].device_kind.replace(" ", "-").lower()
    path = ROOT / "benchmarks" / "results" / f"reversal-training-{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {
        "device": device,
        "jax": jax.__version__,
        "commit": commit(),
        "seed": options.seed,
        "cases": rows,
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
