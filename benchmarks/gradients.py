"""Which gradient? How wrong each adjoint is, and what its backward pass costs.

    python benchmarks/gradients.py

Runs deqjax's adjoints, and those of optimistix, jaxopt and banax where they are
installed, on the same maps in one process:

- bias: the gradient of a smooth loss with respect to all parameters of a tanh layer,
  solved tightly, beside that of a dense linear solve in NumPy: angle, relative error,
  ratio of norms; and the pull-backs of f that it took, counted from outside. float64.
- cost: the time of `value_and_grad` over that of the forward solve alone, the two
  taking turns, and the bytes that the compiler reserves, in copies of the state, for a
  fixed number of steps of a transformer block. float32.

Writes `benchmarks/results/gradients-DEVICE.json`, and from it the tables and the figure
of the documentation.
"""

import argparse
import functools as ft
import importlib
import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx

import deqjax

if not __package__:  # run as a script: what is imported below lies beside it
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import (
    _gradient_report as report,
    _solver_entrants as entrants,
    _solver_maps as maps,
    _solver_measures as measures,
)
from benchmarks.reversal import commit

ROOT = pathlib.Path(__file__).resolve().parent.parent
RADII = (0.5, 0.9, 0.99)
TIGHT, LIMIT = 1e-12, 20000  # of the forward solves whose gradients are compared


# The gradients compared


class Forward(NamedTuple):
    """The solve to be differentiated; without `rtol`, exactly `steps` steps."""

    rtol: float | None
    steps: int


class Entrant(NamedTuple):
    """A gradient: `run` is (fn, start, args, forward) to a value that has it."""

    library: str
    run: Callable[..., jax.Array]
    exact: bool = False
    countable: bool = True  # It takes nothing of f but its pull-back.
    dense: bool = False  # It forms the Jacobian: for small problems alone.


def _solved(
    make: Any, solver: Any, fn: Any, start: Any, args: Any, forward: Forward
) -> jax.Array:
    """By `deqjax.fixed_point`."""
    solver = solver(forward.rtol, None if forward.rtol is None else 0.0)
    given = {"solver": solver, "adjoint": make(), "max_steps": forward.steps}
    return deqjax.fixed_point(fn, start, args, **given).value


def _jaxopt(name: str, fn: Any, start: Any, args: Any, forward: Forward) -> jax.Array:
    tol = 1e-30 if forward.rtol is None else forward.rtol
    kept = {"maxiter": forward.steps, "tol": tol, "jit": True, "implicit_diff": True}
    solver = getattr(importlib.import_module("jaxopt"), name)(fn, **kept)
    return solver.run(start, args)[0]


def _banax(name: str, fn: Any, start: Any, args: Any, forward: Forward) -> jax.Array:
    kinds = importlib.import_module("banax.solver")
    rtol = 1e-30 if forward.rtol is None else forward.rtol
    kept: dict[str, Any] = {"rtol": rtol, "max_steps": forward.steps}
    extra: dict[str, Any] = {}
    if name == "Implicit":
        extra["b_solver"] = kinds.Picard(rtol=_linear(), max_steps=LIMIT)
    if name == "UnrollPhantom":
        walk = {"damp": 0.5, "rtol": 0.0, "max_steps": 5, "loop_kind": "checkpointed"}
        extra["b_solver"] = kinds.Relaxed(**walk)
    kind = kinds.Broyden if name == "GDEQ" else kinds.Picard
    if name == "BPTT":
        kept["loop_kind"] = "checkpointed"
    adjoint = getattr(importlib.import_module("banax.adjoint"), name)
    return adjoint(solver=kind(**kept), **extra)((fn, (args,)), start).value


def at(
    make: Any, solver: Any = deqjax.Picard, library: str = "deqjax", **kept: bool
) -> Entrant:
    """An adjoint in `deqjax.fixed_point`, and the solver that it is for."""
    return Entrant(library, ft.partial(_solved, make, solver), **kept)


def gradients() -> dict[str, Entrant]:
    """All of them, by name."""
    gmres, neumann = deqjax.linear.GMRES, deqjax.linear.Neumann
    broyden = ft.partial(deqjax.Broyden, history=30)
    krylov = lambda: lx.GMRES(rtol=_linear(), atol=_linear(), restart=30)
    found = {
        "Implicit": at(deqjax.ImplicitAdjoint, exact=True),
        "Implicit, GMRES(1e-2)": at(lambda: deqjax.ImplicitAdjoint(gmres(1e-2))),
        "Implicit, Neumann": at(
            lambda: deqjax.ImplicitAdjoint(neumann(max_steps=LIMIT)), exact=True
        ),
        "Implicit, lineax GMRES": at(
            lambda: deqjax.ImplicitAdjoint(krylov()), exact=True
        ),
        "Unrolled": at(deqjax.UnrolledAdjoint, exact=True),
        "Reversible": at(deqjax.ReversibleAdjoint, deqjax.Reversible, exact=True),
        "Unrolled, last 5": at(lambda: deqjax.UnrolledAdjoint(last=5)),
        "Neumann(5)": at(lambda: deqjax.NeumannAdjoint(5)),
        "Phantom(5, β = 0.5)": at(lambda: deqjax.PhantomAdjoint(5, 0.5)),
        "Shine": at(deqjax.ShineAdjoint, broyden),
        "Shine, no fallback": at(lambda: deqjax.ShineAdjoint(None), broyden),
        "JFB": at(deqjax.JFBAdjoint),
    }
    optimistix = ft.partial(at, library="optimistix", countable=False, exact=True)
    found["optimistix Implicit"] = optimistix(optx.ImplicitAdjoint, dense=True)
    make = lambda: optx.ImplicitAdjoint(krylov())
    found["optimistix Implicit, GMRES"] = optimistix(make)
    present = entrants.versions()
    if present["jaxopt"]:
        for name in ("FixedPointIteration", "AndersonAcceleration"):
            run = ft.partial(_jaxopt, name)
            found[f"jaxopt {name}"] = Entrant("jaxopt", run, countable=False)
    if present["banax"]:
        for name in ("Implicit", "BPTT", "UnrollPhantom", "GDEQ", "JFB"):
            exact = name in ("Implicit", "BPTT")
            run = ft.partial(_banax, name)
            found[f"banax {name}"] = Entrant("banax", run, exact=exact)
    return found


def _linear() -> float:
    """The default of `deqjax.linear.GMRES`, for the linear solvers of others."""
    return 1e-8 if jnp.result_type(float) == jnp.float64 else 1e-5


# Bias


def layer(z: jax.Array, args: tuple) -> jax.Array:
    """tanh(W z + b)."""
    w, b = args
    return jnp.tanh(w @ z + b)


def layers(seed: int, size: int) -> dict[tuple[str, float], tuple]:
    """(W, b) and z* by spectrum and radius: z* is chosen, b and W's scale follow.

    With z* = tanh(a) and D = diag(1 − z*²), J = D W: W is scaled until J has the
    radius, and b = a − W z*.
    """
    rng = np.random.default_rng(seed)
    a = rng.normal(size=size)
    star = np.tanh(a)
    dense = rng.normal(size=(size, size))
    found = {}
    for name, w in (("symmetric", dense + dense.T), ("random", dense)):
        radius = np.abs(np.linalg.eigvals((1 - star**2)[:, None] * w)).max()
        for wanted in RADII:
            scaled = w * wanted / radius
            found[name, wanted] = (scaled, a - scaled @ star), star
    return found


def exact(args: tuple, star: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The gradient of `loss` by a dense solve, for W and then b."""
    slope = 1 - star**2
    jacobian = slope[:, None] * args[0]
    adjoint = np.linalg.solve((np.eye(star.size) - jacobian).T, weights + star)
    flow = slope * adjoint
    return np.concatenate([np.outer(flow, star).ravel(), flow])


def loss(z: jax.Array, weights: jax.Array) -> jax.Array:
    """⟨weights, z⟩ + ‖z‖²/2."""
    return jnp.sum(weights * z + 0.5 * z * z)


def compare(got: np.ndarray, want: np.ndarray) -> dict[str, float]:
    """Angle in degrees, relative error and ratio of norms."""
    sizes = np.linalg.norm(got), np.linalg.norm(want)
    a, b = got / sizes[0], want / sizes[1]
    # Of unit vectors; accurate for small angles too.
    angle = 2 * math.atan2(np.linalg.norm(a - b), np.linalg.norm(a + b))
    error = np.linalg.norm(got - want) / sizes[1]
    of_norms = float(sizes[0] / sizes[1])
    return {"angle": math.degrees(angle), "error": float(error), "norm": of_norms}


def counted(fn: Callable) -> tuple[Callable, list[int]]:
    """`fn`, and how often it was pulled back (in programs that are run, not traced)."""
    count = [0]

    def seen(ct: Any) -> np.ndarray:
        count[0] += 1
        return np.ones((), np.float32)

    @jax.custom_vjp
    def tick(f: jax.Array) -> jax.Array:
        return f

    # Pure, so that the compiler removes the pull-backs whose result nobody uses.
    one = jax.ShapeDtypeStruct((), jnp.float32)
    back = lambda _, ct: (ct * jax.pure_callback(seen, one, ct).astype(ct.dtype),)
    tick.defvjp(lambda f: (f, None), back)
    return lambda z, args: tick(fn(z, args)), count


def bias(seed: int, size: int, field: dict[str, Entrant]) -> list[dict[str, Any]]:
    """Each gradient on each layer."""
    weights = np.random.default_rng(seed + 1).normal(size=size)
    problems, rows = layers(seed, size), []
    for label, entrant in field.items():
        ticking, count = counted(layer)
        plain, watched = (_gradient(entrant, fn, weights) for fn in (layer, ticking))
        for (name, radius), (args, star) in problems.items():
            want, given = exact(args, star, weights), jax.tree.map(jnp.asarray, args)
            (_, z), g = plain(given)
            got = np.concatenate([np.ravel(x) for x in g])
            count[0] = 0
            if entrant.countable:
                jax.block_until_ready(watched(given))
            pulls = count[0] if entrant.countable else None
            off = float(np.linalg.norm(z - star) / np.linalg.norm(star))
            head = {"gradient": label, "library": entrant.library}
            head |= {"exact": entrant.exact, "spectrum": name, "radius": radius}
            found = compare(got, want)
            rows.append({**head, **found, "pull-backs": pulls, "error of z": off})
            print(f"{label:28} {name:10} {radius} {found['error']:.1e}", flush=True)
    return rows


def _gradient(entrant: Entrant, fn: Callable, weights: np.ndarray) -> Any:
    def value(args: tuple) -> tuple[jax.Array, jax.Array]:
        z = entrant.run(fn, jnp.zeros(weights.size), args, Forward(TIGHT, LIMIT))
        return loss(z, jnp.asarray(weights)), z

    return jax.jit(jax.value_and_grad(value, has_aux=True))


# Cost


def cost(
    options: argparse.Namespace, field: dict[str, Entrant]
) -> list[dict[str, Any]]:
    """Time over the forward solve's, and memory in copies of the state."""
    problem = maps.layers(options.seed, (2, 8), options.transformer)["transformer"]
    start, rows = problem.start, []
    weights = jax.random.normal(jax.random.key(options.seed), start.shape)
    for label, entrant in field.items():
        if entrant.dense:
            continue

        def solve(args: Any, entrant: Entrant = entrant) -> jax.Array:
            forward = Forward(None, options.steps)
            return loss(entrant.run(problem.fn, start, args, forward), weights)

        base, _ = measures.compiled(jax.jit(solve), problem.args)
        both = jax.jit(jax.value_and_grad(solve))
        grad, compile_time = measures.compiled(both, problem.args)
        pairs = [
            (measures.seconds(base, problem.args), measures.seconds(grad, problem.args))
            for _ in range(options.runs + 1)
        ][1:]  # The first warms up.
        ratios = np.array([b / a for a, b in pairs])
        temp = [measures.temp_bytes(program) for program in (base, grad)]
        copies = [None if t is None else t / start.nbytes for t in temp]
        row = {"gradient": label, "library": entrant.library, "steps": options.steps}
        row |= {
            "ratio": float(np.median(ratios)),
            "quartiles": [float(q) for q in np.percentile(ratios, (25, 75))],
            "forward, ms": float(np.median([a for a, _ in pairs]) * 1e3),
            "compile, s": compile_time,
            "forward copies": copies[0],
            "copies": copies[1],
        }
        rows.append(row)
        print(f"{label:28} {row['ratio']:6.2f} {copies[1]}", flush=True)
    return rows


def command_line() -> argparse.ArgumentParser:
    """The options."""
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = cli.add_argument
    add("--seed", type=int, default=0, help="of the maps (default 0)")
    add("--size", type=int, default=64, help="dimension of the tanh layers")
    shape = {"type": int, "nargs": 3, "default": (4, 64, 128)}
    add("--transformer", help="batch, tokens and width, a multiple of 8", **shape)
    add("--steps", type=int, default=12, help="of the timed forward solves (12)")
    add("--runs", type=int, default=9, help="of each, in turns (9)")
    add("--only", nargs="+", default=None, help="gradients to measure, by name")
    add("--out", type=pathlib.Path, default=None, help="where to write the results")
    add("--redraw", action="store_true", help="only draw what was measured before")
    return cli


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure or read, write, and draw what belongs to the documentation."""
    device = jax.devices()[0].device_kind.replace(" ", "-").lower()
    default = ROOT / "benchmarks" / "results" / f"gradients-{device}.json"
    path = options.out or default
    if not options.redraw:
        names = options.only
        field = {k: v for k, v in gradients().items() if names is None or k in names}
        results: dict[str, Any] = {"device": device, "versions": entrants.versions()}
        results |= {"commit": commit(), "seed": options.seed, "size": options.size}
        results["transformer"] = list(options.transformer)
        with jax.enable_x64(True):
            results["bias"] = bias(options.seed, options.size, field)
        results["cost"] = cost(options, field)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(path.read_text())
    if path.resolve() == default:
        (ROOT / "docs" / "gradients-table.md").write_text(report.table(results))
        report.figure(results, ROOT / "docs" / "images" / "gradients.png")
    print(path)
    return results


def main() -> None:
    """Measure, and write the results, the tables and the figure."""
    run(command_line().parse_args())


if __name__ == "__main__":
    main()
