"""Gradients by reversal beside gradients by backpropagation, for `reversal_maps.py`."""

import functools as ft
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import deqjax

from ._reversal_cases import DEVICES, LANES, TESTED, Case
from .reversal import relative_error

NARROW = ("bfloat16", "float16")
# The error that is always granted, by the widest dtype of the state.
FLOOR = {"float64": 1e-13}
ROUNDING = 2e-6
REPAIR = 0.5  # The part of the capacity that a repair may take.


# One solve: `method(z0, x, weights, β, extra)` returns the answer and what it reports


def reversal(
    fn: Callable, number: float, steps: int, options: Any = None, **solver: Any
) -> Callable:
    """By deqjax; `extra` is the probe."""
    solver = {"rtol": None, "atol": None, **solver}

    def method(z0: Any, x: Any, w: Any, beta: Any, probe: Any) -> tuple[Any, Any]:
        beta = number if beta is None else beta
        sol = deqjax.fixed_point(
            fn,
            z0,
            (x, w),
            solver=deqjax.Reversible(beta=beta, **solver),
            adjoint=deqjax.ReversibleAdjoint(probe=probe),
            max_steps=steps,
            options=options,
        )
        return sol.value, (sol.stats["num_steps"], sol.stats["converged"])

    return method


def relax(a: jax.Array, f: jax.Array, beta: Any) -> jax.Array:
    """(1 − β) a + β f, in the wider dtype of the state and β."""
    if not isinstance(beta, jax.Array):
        return (1 - beta) * a + beta * f
    wide = jnp.promote_types(a.dtype, beta.dtype)
    a_, f_, b = (t.astype(wide) for t in (a, f, beta))
    return ((1 - b) * a_ + b * f_).astype(a.dtype)


def backpropagation(fn: Callable, number: float, steps: int) -> Callable:
    """By the iteration of the textbook; `extra` is each problem's steps, or None."""

    def method(z0: Any, x: Any, w: Any, beta: Any, counts: Any) -> tuple[Any, None]:
        given = number if beta is None else beta
        same = jtu.tree_structure(given) == jtu.tree_structure(z0)
        betas = given if same else jtu.tree_map(lambda _: given, z0)
        half = lambda a, f: jtu.tree_map(relax, a, f, betas)

        def step(pair: Any, i: jax.Array) -> tuple[Any, None]:
            y, z = pair
            y = half(y, fn(z, (x, w)))
            z = half(z, fn(y, (x, w)))
            if counts is None:
                return (y, z), None

            def keep(new: jax.Array, old: jax.Array) -> jax.Array:
                shape = counts.shape + (1,) * (new.ndim - counts.ndim)
                return jnp.where((i < counts).reshape(shape), new, old)

            return jtu.tree_map(keep, (y, z), pair), None

        (_, z), _ = lax.scan(jax.checkpoint(step), (z0, z0), jnp.arange(steps))
        return z, None

    return method


# Many solves


def spread(method: Callable, call: str, betas: bool) -> Callable:
    """The method as it is called: over lanes, in a scan, or once."""
    if call == "vmap":
        return jax.vmap(method, in_axes=(0, 0, None, 0 if betas else None, 0))
    if call != "scan":
        return method

    def run(z0: Any, x: Any, w: Any, beta: Any, extra: Any) -> tuple[Any, Any]:
        def body(z: Any, item: Any) -> tuple[Any, Any]:
            x, own, extra = item
            z, report = method(z, x, w, own if betas else beta, extra)
            return z, (z, report)

        return lax.scan(body, z0, (x, beta if betas else None, extra))[1]

    return run


def gradient(run: Callable, ours: bool, jit: bool) -> Callable:
    """(z0, x, weights, β, extra, weights of the loss) -> gradients, reports.

    β is differentiated where it is an array.
    """

    def loss(z0, x, w, beta, extra, out):
        value, report = run(z0, x, w, beta, extra)
        wide = lambda t: t.astype(jnp.result_type(float))
        terms = jtu.tree_map(lambda v, c: jnp.sum(wide(v) * wide(c)), value, out)
        return sum(jtu.tree_leaves(terms)), report

    wanted = (0, 1, 2, 3, 4) if ours else (0, 1, 2, 3)
    grad = jax.grad(loss, argnums=wanted, has_aux=True)
    return jax.jit(grad) if jit else grad


def shard(tree: Any) -> Any:
    """Spread the first axis over the devices."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("batch",))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    return jtu.tree_map(lambda t: jax.device_put(t, rows), tree)


def widened(tree: Any) -> Any:
    """In float64, on the host."""
    return jtu.tree_map(lambda t: np.asarray(t, np.float64), tree)


def disturbed(tree: Any, rng: np.random.Generator) -> Any:
    """With every entry moved by at most one unit in the last place."""

    def move(t: Any) -> np.ndarray:
        u = rng.uniform(-1, 1, t.shape) * float(jnp.finfo(t.dtype).eps)
        return (np.asarray(t, np.float64) * (1 + u)).astype(t.dtype)

    return jtu.tree_map(move, tree)


def leaf_errors(got: Any, want: Any) -> float:
    """The largest relative error of a leaf that is not zero."""
    pairs = zip(jtu.tree_leaves(got), jtu.tree_leaves(want), strict=True)
    return max(relative_error(a, b) for a, b in pairs if np.any(np.asarray(b)))


def judge(row: dict[str, Any]) -> str | None:
    """Why a row fails, or None."""
    reasons = []
    if row["drift"] != 0:
        reasons.append(f"drift {row['drift']:.1e}")
    # Not a number: the repair is not told by this version of deqjax.
    if row["repair"] >= REPAIR:
        reasons.append(f"repair {row['repair']:.2f}")
    if not row["error"] <= row["allowed"]:
        silent = "silently, " if not reasons else ""
        reasons.append(
            f"{silent}gradient error {row['error']:.1e} > {row['allowed']:.1e}"
        )
    return ", ".join(reasons) or None


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: None for what is not a finite number."""
    bad = lambda v: isinstance(v, float) and not math.isfinite(v)
    return {key: None if bad(value) else value for key, value in row.items()}


def record(stats: Any) -> dict[str, float]:
    """The worst drift and repair of all solves."""
    worst = lambda v: float(np.max(np.asarray(v, np.float64)))
    repair = getattr(stats, "repair", math.nan)
    return {"drift": worst(stats.drift), "repair": worst(repair)}


def measure(case: Case, draws: int) -> list[dict[str, Any]]:
    """A row for each draw of the case; what goes wrong is told in the row."""
    shown = {"kind": case.kind, "pick": case.pick, "call": case.call}
    shown |= {"map": case.text, "dtypes": case.states, "β": case.beta}
    shown |= {"steps": case.steps, "tested": case.tested, "batch": case.batch_ndim}
    programs = _programs(case)
    rows = []
    for i in range(draws):
        row: dict[str, Any] = {**shown, "draw": i}
        start = time.perf_counter()
        try:
            row |= _row(case, programs, i)
            row["failure"] = judge(row)
        except Exception as error:  # Whatever happens is a row.
            text = str(error).strip().split("\n")[0]
            row["failure"] = f"{type(error).__name__}: {text}"[:300]
        row["seconds"] = round(time.perf_counter() - start, 2)
        rows.append(row)
    return rows


def _programs(case: Case) -> tuple[Callable, Callable]:
    """The gradients by reversal and by backpropagation."""
    solver: dict[str, Any] = {"batch_ndim": case.batch_ndim}
    if case.tested:
        # Iterates of a map that rounds to 16 bits end in a cycle, not at a point.
        rtol = max(TESTED[dtype] for dtype in case.states)
        rtol = max(rtol, TESTED["bfloat16"]) if case.kind == "narrow" else rtol
        solver |= {"rtol": rtol, "atol": rtol}
    betas = case.beta == "traced" and bool(case.lanes)
    method = reversal(case.fn, case.number, case.steps, **solver)
    if case.call == "checkpoint":
        method = jax.checkpoint(method)
    ours = gradient(spread(method, case.call, betas), True, case.call != "plain")
    method = backpropagation(case.fn, case.number, case.steps)
    return ours, gradient(spread(method, case.call, betas), False, True)


def _row(case: Case, programs: tuple[Callable, Callable], draw: int) -> dict[str, Any]:
    ours, textbook = programs
    z0, x, w, beta, out = case.draw(draw)
    probe = deqjax.BackwardStats((LANES,) if case.lanes else ())
    placed = shard((z0, x)) if case.call == "mesh" else (z0, x)
    (*grad, stats), (counts, converged) = ours(*placed, w, beta, probe, out)
    row: dict[str, Any] = record(stats)
    if case.tested and not np.all(converged):
        raise RuntimeError("the solve did not converge, and is not compared")
    # The last step of a tested solve only finds that the test is passed.
    counts = jnp.asarray(np.asarray(counts) - 1) if case.tested else None
    backward = lambda given: textbook(*given, beta, counts, out)[0]
    exact = backward(widened((z0, x, w)))
    narrow = set(NARROW) & {*case.states, *case.computed} or case.kind == "narrow"
    floor = FLOOR["float64"] if {*case.states} == {"float64"} else ROUNDING
    limit = granted(backward, (z0, x, w), exact, bool(narrow), draw)
    row |= {
        "error": relative_error(grad, exact),
        "worst leaf": leaf_errors(grad, exact),
    }
    row |= {"backpropagation": limit, "allowed": max(2 * limit, floor)}
    return row


def granted(
    backward: Callable, inputs: tuple, exact: Any, scattered: bool, seed: int
) -> float:
    """The error of backpropagation in the dtypes of the solve.

    Errors of few digits scatter: then it is the largest of a few, at inputs (z0, x, w)
    moved by a unit in the last place.
    """
    errors = [relative_error(backward(inputs), exact)]
    if scattered:
        move = ft.partial(disturbed, rng=np.random.default_rng(seed))
        moved = [backward((*move(inputs[:2]), inputs[2])) for _ in range(3)]
        errors += [relative_error(g, exact) for g in moved]
    return max(errors)
