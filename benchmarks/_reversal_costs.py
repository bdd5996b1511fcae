"""What reversible gradients cost: memory per step, and time against its parts."""

import functools as ft
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import deqjax

BITS = (4, 8, 16)
BETA = 0.8


def normalise(h: jax.Array, axes: tuple[int, ...] = (-1,)) -> jax.Array:
    """To mean 0 and variance 1 along axes, the last one by default."""
    h = h - h.mean(axes, keepdims=True)
    return h * jax.lax.rsqrt(jnp.mean(h * h, axes, keepdims=True) + 1e-5)


class Cell(NamedTuple):
    """A cell f(z, args), its arguments, and the shape and dtype of z."""

    fn: Callable[[jax.Array, Any], jax.Array]
    args: Any
    shape: tuple[int, ...]
    dtype: Any = jnp.float32

    @property
    def start(self) -> jax.Array:
        """z₀ = 0."""
        return jnp.zeros(self.shape, self.dtype)


def _draw(key: jax.Array, *shape: int) -> jax.Array:
    return jr.normal(key, shape, jnp.float32)


def _mlp() -> Cell:
    k1, k2, k3 = jr.split(jr.key(0), 3)
    width, hidden, batch = 128, 512, 256
    args = (
        _draw(k1, width, hidden) / width**0.5,
        _draw(k2, hidden, width) / hidden**0.5,
        _draw(k3, batch, width),
    )

    def fn(z: jax.Array, args: Any) -> jax.Array:
        a, b, x = args
        return normalise(z + jax.nn.gelu(z @ a) @ b + x)

    return Cell(fn, args, args[-1].shape)


def _transformer() -> Cell:
    keys = jr.split(jr.key(1), 5)
    batch, tokens, width, heads = 4, 64, 128, 4
    args = (
        _draw(keys[0], width, 3 * width) / width**0.5,
        _draw(keys[1], width, width) / width**0.5,
        _draw(keys[2], width, 4 * width) / width**0.5,
        _draw(keys[3], 4 * width, width) / (4 * width) ** 0.5,
        _draw(keys[4], batch, tokens, width),
    )

    def fn(z: jax.Array, args: Any) -> jax.Array:
        qkv, out, a, b, x = args
        split = (batch, tokens, heads, width // heads)
        q, k, v = (t.reshape(split) for t in jnp.split(z @ qkv, 3, -1))
        h = jax.nn.dot_product_attention(q, k, v).reshape(z.shape)
        h = normalise(z + h @ out + x)
        return normalise(h + jax.nn.gelu(h @ a) @ b)

    return Cell(fn, args, args[-1].shape)


def _convolution() -> Cell:
    k1, k2, k3 = jr.split(jr.key(2), 3)
    batch, channels, size = 8, 16, 16
    args = (
        _draw(k1, channels, channels, 3, 3) / (9 * channels) ** 0.5,
        _draw(k2, channels, channels, 3, 3) / (9 * channels) ** 0.5,
        _draw(k3, batch, channels, size, size),
    )

    def fn(z: jax.Array, args: Any) -> jax.Array:
        a, b, x = args
        conv = lambda h, w: jax.lax.conv_general_dilated(h, w, (1, 1), "SAME")
        h = jax.nn.relu(normalise(conv(z, a), (1, 2, 3)))
        return normalise(z + conv(h, b) + x, (1, 2, 3))

    return Cell(fn, args, args[-1].shape)


CELLS = {"MLP": _mlp, "transformer block": _transformer, "convolutions": _convolution}


# Gradients of the same steps


def reversal(cell: Cell, steps: int, bits: int) -> Callable[[Any], Any]:
    """By `deqjax.ReversibleAdjoint`."""
    solver = deqjax.Reversible(None, None, beta=BETA)
    adjoint = deqjax.ReversibleAdjoint(record_bits=bits)
    start = cell.start

    def loss(args: Any) -> jax.Array:
        sol = deqjax.fixed_point(
            cell.fn, start, args, solver=solver, adjoint=adjoint, max_steps=steps
        )
        return jnp.sum(sol.value)

    return jax.grad(loss)


def backpropagation(cell: Cell, steps: int, keep: str) -> Callable[[Any], Any]:
    """Through a loop that keeps the `"states"` of its steps, or the `"activations"`."""
    start = cell.start

    def loss(args: Any) -> jax.Array:
        def step(pair: tuple, _: None) -> tuple:
            y, z = pair
            y = (1 - BETA) * y + BETA * cell.fn(z, args)
            z = (1 - BETA) * z + BETA * cell.fn(y, args)
            return (y, z), None

        step = jax.checkpoint(step) if keep == "states" else step
        (_, z), _ = jax.lax.scan(step, (start, start), None, length=steps)
        return jnp.sum(z)

    return jax.grad(loss)


def forward_part(cell: Cell, steps: int) -> Callable[[Any], Any]:
    """The half steps alone."""
    start = cell.start

    def run(args: Any) -> Any:
        half = lambda _, ab: (
            ab[1],
            (1 - BETA) * ab[0] + BETA * cell.fn(ab[1], args),
        )
        return jax.lax.fori_loop(0, 2 * steps, half, (start, start))

    return run


def backward_part(cell: Cell, steps: int) -> Callable[[Any], Any]:
    """As many evaluations with their pull-backs."""
    start = cell.start

    def run(args: Any) -> Any:
        def half(_: jax.Array, carry: tuple) -> tuple:
            z, ct, total = carry
            f, pull = jax.vjp(cell.fn, z, args)
            ct, grads = pull(ct)
            return f, ct, jax.tree.map(jnp.add, total, grads)

        zeros = jax.tree.map(jnp.zeros_like, args)
        first = (start, jnp.ones_like(start), zeros)
        return jax.lax.fori_loop(0, 2 * steps, half, first)

    return run


# Measurements


def _temp_bytes(fn: Callable[[Any], Any], args: Any) -> int:
    """The temporary memory that the compiler reserves for fn."""
    analysis = jax.jit(fn).lower(args).compile().memory_analysis()
    if analysis is None:
        raise RuntimeError("This platform does not tell the memory of a program.")
    return analysis.temp_size_in_bytes


def memory() -> list[dict[str, Any]]:
    """Bytes that one more step adds to the gradient program, in copies of the state."""
    rows = []
    for name, make in CELLS.items():
        cell = make()
        state = 4 * int(np.prod(cell.shape))

        def slope(
            gradient: Callable[[int], Callable], cell: Cell = cell, state: int = state
        ) -> float:
            short, long = (_temp_bytes(gradient(n), cell.args) for n in (32, 96))
            return (long - short) / 64 / state

        row: dict[str, Any] = {"cell": name, "shape": cell.shape}
        for bits in BITS:
            row[f"{bits} bits"] = slope(ft.partial(reversal, cell, bits=bits))
        for keep in ("states", "activations"):
            row[keep] = slope(ft.partial(backpropagation, cell, keep=keep))
        rows.append(row)
        print(f"memory, {name}: done", flush=True)
    return rows


def _seconds(fn: Callable[[Any], Any], args: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(fn(args))
    return time.perf_counter() - began


def times(steps: int = 16, repeats: int = 21) -> list[dict[str, Any]]:
    """Seconds of a gradient over those of its parts, which take turns with it."""
    rows = []
    for name, make in CELLS.items():
        cell = make()
        programs = {
            "reversal": reversal(cell, steps, 8),
            "backpropagation": backpropagation(cell, steps, "activations"),
            "forward": forward_part(cell, steps),
            "backward": backward_part(cell, steps),
        }
        compiled = {
            k: jax.jit(fn).lower(cell.args).compile() for k, fn in programs.items()
        }
        runs = [
            {k: _seconds(fn, cell.args) for k, fn in compiled.items()}
            for _ in range(repeats)
        ]
        parts = np.array([run["forward"] + run["backward"] for run in runs])
        row: dict[str, Any] = {"cell": name, "steps": steps}
        for method in ("reversal", "backpropagation"):
            ratios = np.array([run[method] for run in runs]) / parts
            row[method] = float(np.median(ratios))
            row[f"{method}, quartiles"] = np.quantile(ratios, (0.25, 0.75)).tolist()
        row["parts, ms"] = 1e3 * float(np.median(parts))
        rows.append(row)
        print(f"times, {name}: done", flush=True)
    return rows
