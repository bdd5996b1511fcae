"""Random building blocks of maps, for `reversal_maps.py`: functions and products.

A piece maps an array to one of the same shape, with a Lipschitz constant of about one,
and mixes at most the axes after the first one of an array with several axes, so that
the first may index independent problems. Its structure is drawn when it is made, its
weights by `init`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Shape = tuple[int, ...]
Rng = np.random.Generator


class Piece(NamedTuple):
    """A block `apply(h, weights)`, with weights from `init(rng)` in float64."""

    name: str
    apply: Callable[[jax.Array, Any], jax.Array]
    init: Callable[[Rng], Any] = lambda _: None


def at_least(dtype: Any) -> Any:
    """The dtype in which operations run that need 32 bits at least."""
    return jnp.promote_types(dtype, jnp.float32)


def matrix(rng: Rng, m: int, n: int) -> np.ndarray:
    """A random matrix of spectral norm 1."""
    w = rng.normal(size=(m, n))
    return w / np.linalg.norm(w, 2)


def pick(rng: Rng, *items: Any) -> Any:
    """One of the items."""
    return items[rng.integers(len(items))]


# Elementwise

FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "softplus": jax.nn.softplus,
    "relu": jax.nn.relu,
    "leaky relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "exact gelu": lambda h: jax.nn.gelu(h, approximate=False),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "exp of tanh": lambda h: 0.5 * jnp.exp(jnp.tanh(h)),
    "exp(-h²)": lambda h: jnp.exp(-h * h),
    "sqrt": lambda h: jnp.sqrt(1 + h * h),
    "rsqrt": lambda h: lax.rsqrt(1 + h * h),
    "softsign": lambda h: h / (1 + jnp.abs(h)),
    "division": lambda h: 1 / (1.5 + 0.5 * jnp.sin(h)),
    "log": lambda h: jnp.log1p(h * h),
    "arctan": jnp.arctan,
    "arcsinh": jnp.arcsinh,
    "erf": jax.scipy.special.erf,
    "cube": lambda h: 0.5 * jnp.tanh(h) ** 3,
    "logaddexp": lambda h: jnp.logaddexp(h, 0.3 * jnp.ones_like(h)),
    "expm1": lambda h: jnp.expm1(-jax.nn.softplus(h)),
    "where": lambda h: jnp.where(h > 0.1, h, 0.5 * h + 0.05),
}


def elementwise(rng: Rng, shape: Shape) -> Piece:
    names = [pick(rng, *FUNCTIONS) for _ in range(rng.integers(1, 5))]

    def apply(h: jax.Array, w: jax.Array) -> jax.Array:
        for i, name in enumerate(names):
            h = FUNCTIONS[name](h) * w[i, 0] + w[i, 1]
        return h

    scales = lambda rng: rng.uniform(0.5, 1, (len(names), 2)) * (1, 0.5)
    return Piece(" > ".join(names), apply, scales)


# Products of matrices


def dense(rng: Rng, shape: Shape) -> Piece:
    n = shape[-1]
    return Piece(f"dense {n}", lambda h, w: h @ w, lambda rng: matrix(rng, n, n))


def perceptron(rng: Rng, shape: Shape) -> Piece:
    n, hidden = shape[-1], int(rng.integers(1, 65))
    act = FUNCTIONS[pick(rng, "gelu", "relu", "silu", "tanh")]

    def init(rng: Rng) -> Any:
        return matrix(rng, n, hidden), matrix(rng, hidden, n)

    apply = lambda h, w: act(h @ w[0]) @ w[1]
    return Piece(f"perceptron {n}-{hidden}-{n}", apply, init)


def gated(rng: Rng, shape: Shape) -> Piece:
    """A gated recurrent unit, its input being added to what it returns."""
    n = shape[-1]

    def apply(h: jax.Array, w: Any) -> jax.Array:
        r, u = jax.nn.sigmoid(h @ w[0]), jax.nn.sigmoid(h @ w[1] + w[3])
        return (1 - u) * h + u * jnp.tanh((r * h) @ w[2])

    def init(rng: Rng) -> Any:
        return [matrix(rng, n, n) for _ in range(3)] + [rng.normal(size=n)]

    return Piece(f"gated {n}", apply, init)


def bilinear(rng: Rng, shape: Shape) -> Piece:
    n = shape[-1]

    def apply(h: jax.Array, w: Any) -> jax.Array:
        return jnp.tanh(h @ w[0]) * jax.nn.sigmoid(h @ w[1])

    init = lambda rng: (matrix(rng, n, n), matrix(rng, n, n))
    return Piece(f"product of two dense {n}", apply, init)


def spectral(rng: Rng, shape: Shape) -> Piece:
    """A dense layer that computes the spectral norm of its matrix."""
    n, powers = shape[-1], rng.random() < 0.5

    def norm(w: jax.Array, v: jax.Array) -> jax.Array:
        if not powers:
            return jnp.linalg.norm(w.astype(at_least(w.dtype)), 2).astype(w.dtype)
        unit = lambda v: v * lax.rsqrt(jnp.sum(v * v) + 1e-6)
        v, _ = lax.scan(lambda v, _: (unit(w.T @ (w @ v)), None), v, None, length=3)
        return jnp.sqrt(jnp.sum((w @ v) ** 2) + 1e-6)

    init = lambda rng: (rng.normal(size=(n, n)), rng.normal(size=n))
    apply = lambda h, w: h @ (w[0] / (norm(*w) + 0.1))
    name = "power iteration" if powers else "spectral norm"
    return Piece(f"{name} {n}", apply, init)


def narrow(rng: Rng, shape: Shape) -> Piece:
    """Products, or functions, of 16 bits within a wider map."""
    n, small = shape[-1], pick(rng, jnp.bfloat16, jnp.float16)
    wide_result, with_function = (bool(rng.random() < 0.4) for _ in range(2))

    def apply(h: jax.Array, w: jax.Array) -> jax.Array:
        # Without the casts in float64: which of them XLA carries out, forwards and on
        # cotangents, differs between programs, so only the error of all is defined.
        exact = h.dtype == jnp.float64
        inner = h.dtype if exact else small
        dtype = at_least(h.dtype) if wide_result else inner
        kept = dtype if wide_result else None
        y = jnp.matmul(
            h.astype(inner), w.astype(inner), preferred_element_type=kept
        ).astype(dtype)
        if with_function:
            y = jnp.tanh(y.astype(inner))
        return y.astype(h.dtype)

    name = f"dense {n} in {np.dtype(small)}"
    name += " to float32" * wide_result + " > tanh" * with_function
    return Piece(name, apply, lambda rng: matrix(rng, n, n))
