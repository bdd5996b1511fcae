"""Maps f(z, args) for the comparison of solvers, with what is known of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np


class Problem(NamedTuple):
    """z = fn(z, args) from `start`."""

    fn: Callable[[Any, Any], Any]
    start: jax.Array
    args: Any
    note: str = ""


def normalise(h: jax.Array) -> jax.Array:
    """To mean 0 and variance 1 along the last axis."""
    h = h - h.mean(-1, keepdims=True)
    return h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5)


# Maps as large as a layer, to measure what a solver costs beside them


def mlp(z: jax.Array, args: tuple) -> jax.Array:
    """A two-layer perceptron; a contraction."""
    p, x = args
    return jnp.tanh(jax.nn.gelu(z @ p["a"]) @ p["b"] + x)


def transformer(z: jax.Array, args: tuple) -> jax.Array:
    """A causal transformer block with post-normalisation and 8 heads."""
    p, x = args
    heads = lambda t: t.reshape(*t.shape[:-1], 8, -1)
    q, k, v = (heads(z @ p[name]) for name in "qkv")
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(z.shape)
    z = normalise(0.3 * z + mixed @ p["o"] + x)
    return normalise(z + jax.nn.gelu(z @ p["a"]) @ p["b"])


def layers(
    seed: int, small: tuple[int, int], large: tuple[int, int, int]
) -> dict[str, Problem]:
    """The MLP, (batch, width), and the transformer, (batch, tokens, width)."""
    keys = iter(jr.split(jr.key(seed), 10))
    matrix = lambda m, n, s: s * jr.normal(next(keys), (m, n)) / m**0.5
    width = small[-1]
    p = {"a": matrix(width, 2 * width, 1.0), "b": matrix(2 * width, width, 0.3)}
    x = jr.normal(next(keys), small)
    first = Problem(mlp, jnp.zeros_like(x), (p, x), "contraction")
    width = large[-1]
    p = {name: matrix(width, width, 1.0) for name in "qkv"}
    p["o"] = matrix(width, width, 0.3)
    p["a"], p["b"] = matrix(width, 4 * width, 1.0), matrix(4 * width, width, 0.3)
    x = jr.normal(next(keys), large)
    second = Problem(transformer, jnp.zeros_like(x), (p, x), "post-norm")
    return {"MLP": first, "transformer": second}


# Maps of known character, to measure what a solver needs


def around(z: jax.Array, args: tuple) -> jax.Array:
    """f(z) = z* + A tanh(z − z*): the Jacobian at the fixed point is A.

    tanh bounds f, so that no iteration of it overflows.
    """
    matrix, star = args
    return star + jnp.tanh(z - star) @ matrix.T


def euler(z: jax.Array, args: tuple) -> jax.Array:
    """An implicit Euler step of u' = Δu + 10 u (1 − u²), periodic: y + h u'(z)."""
    y, h = args
    n = z.shape[-1]
    diffusion = (jnp.roll(z, 1, -1) - 2 * z + jnp.roll(z, -1, -1)) * (n / 8) ** 2
    return y + h * (diffusion + 10 * z * (1 - z**2))


def block(z: jax.Array, args: tuple) -> jax.Array:
    """A residual MLP with post-normalisation, as in a DEQ."""
    w, u, x = args
    return normalise(z + jax.nn.gelu(2 * z @ w.T + x @ u.T) @ w)


def _symmetric(rng: np.random.Generator, eigenvalues: np.ndarray) -> np.ndarray:
    q, _ = np.linalg.qr(rng.normal(size=(eigenvalues.size,) * 2))
    return q @ np.diag(eigenvalues) @ q.T


def _rotations(rng: np.random.Generator, size: int, radius: float) -> np.ndarray:
    """A normal matrix whose eigenvalues lie on the circle of `radius`."""
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    blocks = np.zeros((size, size))
    for i in range(0, size - 1, 2):
        angle = rng.uniform(0, np.pi)
        c, s = np.cos(angle), np.sin(angle)
        blocks[i : i + 2, i : i + 2] = [[c, -s], [s, c]]
    return radius * q @ blocks @ q.T


def characters(seed: int, size: int) -> dict[str, Problem]:
    """Problems by name, in the default dtype."""
    rng = np.random.default_rng(seed)
    ones = np.linspace(-1, 1, size)
    upper = np.triu(rng.normal(size=(size, size)), 1) * 1.5 / size**0.5
    matrices = {
        f"radius {radius}": (_symmetric(rng, radius * ones), "symmetric")
        for radius in (0.5, 0.9, 0.99, 0.999)
    }
    slow = np.diag(rng.uniform(0, 0.8, size))
    matrices["non-normal"] = slow + upper, "triangular, radius 0.8"
    matrices["complex spectrum"] = _rotations(rng, size, 0.95), "circle of radius 0.95"
    spread = _symmetric(rng, np.linspace(-3, 0.5, size))
    matrices["not contractive"] = spread, "symmetric, −3 to 0.5"
    star = jnp.asarray(rng.normal(size=size))
    zero = jnp.zeros(size)
    problems = {
        name: Problem(around, zero, (jnp.asarray(a), star), note)
        for name, (a, note) in matrices.items()
    }
    y = jnp.asarray(np.sin(2 * np.pi * np.arange(size) / size) + 0.1 * rng.normal())
    problems["stiff"] = Problem(euler, y, (y, jnp.asarray(0.5)), "implicit Euler step")
    width = size // 2
    for name, gain in (("normalised", 0.9), ("normalised, steep", 2.5)):
        w, u = (jnp.asarray(m) for m in rng.normal(size=(2, width, width)))
        x = jnp.asarray(rng.normal(size=(4, width)))
        args = gain * w / jnp.linalg.norm(w, 2), u / width**0.5, x
        problems[name] = Problem(block, jnp.zeros_like(x), args, f"gain {gain}")
    return problems


def spectrum(problem: Problem, value: jax.Array) -> dict[str, float]:
    """Spectral radius and norm of the Jacobian of fn at `value`."""
    flat = lambda z: problem.fn(z.reshape(value.shape), problem.args).ravel()
    jacobian = np.asarray(jax.jacfwd(flat)(value.ravel()))
    eigenvalues = np.linalg.eigvals(jacobian)
    return {
        "spectral radius": float(np.abs(eigenvalues).max()),
        "largest real part": float(eigenvalues.real.max()),
        "norm": float(np.linalg.norm(jacobian, 2)),
    }
