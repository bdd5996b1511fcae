"""Mixed scales and disturbed evaluations, for `reversal_maps.py`."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback

import deqjax

from . import _reversal_measures as measures
from ._reversal_pieces import matrix
from .reversal import relative_error

BETAS = (0.5, 0.8)
SCALES = (1e2, 1e4, 1e6, 1e8)
# Steps until the maps below, of Lipschitz constant 0.6, have converged.
DEEP = {0.5: 160, 0.8: 90}
SHAPE = (4, 16)


# Mixed scales: z = S f(S⁻¹ z), S diagonal


def tanh(h: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
    """A bounded contraction."""
    return jnp.tanh(0.6 * h @ w + x)


def affine(h: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
    """A contraction without a bound."""
    return 0.3 * h + 0.3 * h @ w + x


MIXED = {"tanh": tanh, "affine": affine}
WHERE = ("two leaves", "one entry", "start", "rows")


def diagonal(where: str, s: float) -> np.ndarray:
    """S: where the state is s times as large as elsewhere."""
    scale = np.ones(SHAPE)
    if where == "two leaves":
        scale[:, : SHAPE[1] // 2] = s
    elif where == "one entry":
        scale[1, 2] = s
    elif where == "rows":
        scale[:2] = s
    return scale


def split(where: str, t: Any) -> Any:
    """An array in the structure of the state."""
    half = SHAPE[1] // 2
    return (t[:, :half], t[:, half:]) if where == "two leaves" else t


def join(z: Any) -> jax.Array:
    """The state as an array."""
    return jnp.concatenate(z, -1) if isinstance(z, tuple) else z


class Mixed(NamedTuple):
    """A map whose states are of two scales, and its solve for every scale."""

    map: str
    where: str
    beta: float

    def fn(self, z: Any, args: Any) -> Any:
        """S f(S⁻¹ z)."""
        x, (w, scale) = args
        return split(self.where, scale * MIXED[self.map](join(z) / scale, x, w))

    def rows(self, seed: int) -> Iterator[dict[str, Any]]:
        """One for each scale."""
        methods = (measures.reversal, measures.backpropagation)
        ours, textbook = (
            _natural_gradient(make(self.fn, self.beta, DEEP[self.beta]), i == 0)
            for i, make in enumerate(methods)
        )
        for s in SCALES:
            shown = {"map": self.map, "where": self.where, "β": self.beta, "s": s}
            row: dict[str, Any] = shown | {"steps": DEEP[self.beta]}
            try:
                row |= self._row(ours, textbook, seed, s)
                row["failure"] = measures.judge(row)
            except Exception as error:
                row["failure"] = f"{type(error).__name__}: {error}"[:300]
            yield row

    def _row(
        self, ours: Callable, textbook: Callable, seed: int, s: float
    ) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        scale, w = diagonal(self.where, s), matrix(rng, SHAPE[1], SHAPE[1])
        x, c, start = rng.normal(size=(3, *SHAPE))
        cast = lambda t: jnp.asarray(t, jnp.float32)
        x, w, scale, c = map(cast, (x, w, scale, c))
        if self.where == "start":
            star, wide = jnp.zeros(SHAPE), measures.widened((x, w))
            for _ in range(100):
                star = MIXED[self.map](star, *wide)
            z0 = cast(s * star)
        else:
            z0 = cast(scale * 0.1 * start)
        given = (split(self.where, z0), x, (w, scale), None)
        g_x, g_w, stats = ours(*given, deqjax.BackwardStats(), c)
        exact = textbook(*measures.widened(given[:3]), None, None, c)
        plain = textbook(*given, None, c)
        # Each scale has its own entries of x, in natural units: judge it by itself.
        large = diagonal(self.where, 2) == 2
        groups = {"large": large, "small": ~large}
        worst = lambda got: {
            name: relative_error(np.asarray(got)[mask], np.asarray(exact[0])[mask])
            for name, mask in groups.items()
            if mask.any()
        }
        errors, backpropagation = worst(g_x), worst(plain[0])
        errors["weights"] = relative_error(g_w, exact[1])
        backpropagation["weights"] = relative_error(plain[1], exact[1])
        row: dict[str, Any] = {"errors": errors, "allowed": measures.ROUNDING}
        # NaN is the largest.
        row["error"] = float(np.max([*errors.values()]))
        row["backpropagation"] = float(np.max([*backpropagation.values()]))
        return row | measures.record(stats)


def _natural_gradient(method: Callable, ours: bool) -> Callable:
    """The gradient for x and w of a loss of S⁻¹ z."""

    def run(z0: Any, x: Any, w: Any, beta: Any, extra: Any) -> tuple[Any, Any]:
        z, report = method(z0, x, w, beta, extra)
        return join(z) / lax.stop_gradient(w[1]), report

    gradient = measures.gradient(run, ours, jit=True)

    def natural(*inputs: Any) -> tuple[Any, ...]:
        (_, g_x, (g_w, _), _, *stats), _ = gradient(*inputs)
        return g_x, g_w, *stats

    return natural


# Evaluations that differ in their last places


def post_norm(h: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
    """A residual layer with a normalisation after it."""
    h = h + jax.nn.gelu(h @ w + x)
    h = h - h.mean(-1, keepdims=True)
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5)


def gated(h: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
    """A gate between the state and a layer of it."""
    u = jax.nn.sigmoid(h @ w.T + 0.5)
    return (1 - u) * h + u * jnp.tanh(0.8 * h @ w + x)


NOISY = {"tanh": tanh, "post-norm": post_norm, "gated": gated}
DTYPES = ("float32", "float64", "bfloat16")
ULPS = (1, 4)
RELATIVE = ("entry", "row")
STEPS = 24
# Gradients may be off by this many times the disturbance of the evaluations.
AMPLIFIED = 100


def noise() -> np.ndarray:
    """Another one at every call, in units of 2⁻³¹.

    As integers, since a map that computes with float32 numbers is taken for one of
    their precision, and callbacks do not know whether x64 is on.
    """
    return _NOISE.integers(-(2**31), 2**31, SHAPE, dtype=np.int32)


_NOISE = np.random.default_rng(0)


class Noisy(NamedTuple):
    """A map whose evaluations are disturbed."""

    map: str
    dtype: str
    beta: float

    def clean(self, z: jax.Array, args: Any) -> jax.Array:
        """The map without its noise."""
        x, (w, *_) = args
        return NOISY[self.map](z, x, w)

    def fn(self, z: jax.Array, args: Any) -> jax.Array:
        """The map, and noise of sizes relative to each entry and to the row."""
        out = self.clean(z, args)
        wide = jnp.promote_types(out.dtype, jnp.float32)
        entry, row = (t.astype(wide) for t in args[1][1:])
        value = lax.stop_gradient(out).astype(wide)
        rms = jnp.sqrt(jnp.mean(value * value, -1, keepdims=True))
        drawn = io_callback(noise, jax.ShapeDtypeStruct(SHAPE, jnp.int32))
        size = (entry * jnp.abs(value) + row * rms) / 2**31
        moved = value + drawn.astype(wide) * size
        return out + lax.stop_gradient(moved.astype(out.dtype) - out)

    def rows(self, seed: int) -> Iterator[dict[str, Any]]:
        """One for each size of the noise."""
        method = measures.reversal(self.fn, self.beta, STEPS)
        ours = measures.gradient(method, ours=True, jit=True)
        method = measures.backpropagation(self.clean, self.beta, STEPS)
        textbook = measures.gradient(method, ours=False, jit=True)
        for relative in RELATIVE:
            for ulps in ULPS:
                row: dict[str, Any] = self._asdict() | {"ulps": ulps}
                row |= {"relative": relative, "steps": STEPS}
                try:
                    row |= self._row(ours, textbook, seed, row)
                    row["failure"] = measures.judge(row)
                except Exception as error:
                    row["failure"] = f"{type(error).__name__}: {error}"[:300]
                yield row

    def _row(
        self, ours: Callable, textbook: Callable, seed: int, row: dict[str, Any]
    ) -> dict[str, Any]:
        rng, eps = np.random.default_rng(seed), float(jnp.finfo(self.dtype).eps)
        w = matrix(rng, SHAPE[1], SHAPE[1])
        x, c, z0 = rng.normal(size=(3, *SHAPE))
        sizes = [row["ulps"] * eps * (row["relative"] == r) for r in RELATIVE]
        cast = lambda t: jnp.asarray(t, self.dtype)
        z0, x, w, c = map(cast, (0.1 * z0, x, w, c))
        given = (z0, x, (w, *map(jnp.asarray, sizes)), None)
        (*grad, stats), _ = ours(*given, deqjax.BackwardStats(), c)
        exact, _ = textbook(*measures.widened(given[:3]), None, None, c)
        used = lambda g: (g[0], g[1], g[2][0])
        allowed = AMPLIFIED * row["ulps"] * eps
        error = relative_error(used(grad), used(exact))
        return measures.record(stats) | {"error": error, "allowed": allowed}


def mixed() -> list[Mixed]:
    """All of them."""
    return [Mixed(m, w, b) for w in WHERE for m in MIXED for b in BETAS]


def noisy() -> list[Noisy]:
    """All of them."""
    return [Noisy(m, d, b) for m in NOISY for d in DTYPES for b in BETAS]
