"""Random building blocks of maps, for `reversal_maps.py`: whatever mixes entries."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._reversal_pieces import (
    Piece,
    Rng,
    Shape,
    at_least,
    bilinear,
    dense,
    elementwise,
    gated,
    matrix,
    narrow,
    perceptron,
    pick,
    spectral,
)

# Convolutions


def convolution(rng: Rng, shape: Shape, axes: int) -> Piece:
    """Over the `axes` axes before the last one, which holds the channels."""
    channels, size = shape[-1], int(pick(rng, 1, 2, 3, 5))
    grouped = bool(rng.random() < 0.25)
    space = "HW"[-axes:]
    numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
    inputs = 1 if grouped else channels

    def apply(h: jax.Array, w: jax.Array) -> jax.Array:
        whole = (-1, *h.shape[h.ndim - axes - 1 :])
        y = lax.conv_general_dilated(
            h.reshape(whole),
            w,
            window_strides=(1,) * axes,
            padding="SAME",
            dimension_numbers=numbers,
            feature_group_count=channels if grouped else 1,
        )
        return y.reshape(h.shape)

    def init(rng: Rng) -> np.ndarray:
        w = rng.normal(size=(size,) * axes + (inputs, channels))
        return w / np.sqrt(size**axes * inputs)

    name = f"conv{axes}d {size}, {channels} channels" + ", by channel" * grouped
    return Piece(name, apply, init)


def convolution_1d(rng: Rng, shape: Shape) -> Piece:
    if len(shape) >= 2 and rng.random() < 0.8:
        # The first axis of a matrix may be the batch: then each row is a signal.
        if len(shape) > 2:
            return convolution(rng, shape, 1)
        inner = convolution(rng, (*shape, 1), 1)
        return inner._replace(apply=lambda h, w: inner.apply(h[..., None], w)[..., 0])
    size = int(pick(rng, 1, 3, 5))

    def apply(h: jax.Array, w: jax.Array) -> jax.Array:
        rows = h.reshape(-1, h.shape[-1])
        wide = jnp.pad(rows, ((0, 0), (size - 1, size - 1)))
        first = (wide.shape[-1] - (size - 1) - h.shape[-1]) // 2
        along = lambda row: jnp.convolve(row, w, "valid")[first:]
        return jax.vmap(along)(wide)[:, : h.shape[-1]].reshape(h.shape)

    init = lambda rng: rng.normal(size=size) / np.sqrt(size)
    return Piece(f"jnp.convolve {size}", apply, init)


def convolution_2d(rng: Rng, shape: Shape) -> Piece:
    if len(shape) >= 4:
        return convolution(rng, shape, 2)
    inner = convolution(rng, (*shape, 1), 2)
    return inner._replace(apply=lambda h, w: inner.apply(h[..., None], w)[..., 0])


# Along the last axis


def sorting(rng: Rng, shape: Shape) -> Piece:
    every = {
        "sort": lambda h: jnp.sort(h, -1),
        "top_k": lambda h: lax.top_k(h, h.shape[-1])[0],
        "argsort": lambda h: jnp.take_along_axis(h, jnp.argsort(-h, -1), -1),
        "maximum of neighbours": lambda h: jnp.maximum(h, jnp.roll(h, 1, -1)),
        "cummax": lambda h: lax.cummax(h, h.ndim - 1),
        "less median": lambda h: h - 0.5 * jnp.median(h, -1, keepdims=True),
        "less maximum": lambda h: h - 0.5 * jnp.max(h, -1, keepdims=True),
    }
    name = pick(rng, "sort", *every)
    return Piece(f"{name} {shape[-1]}", lambda h, _: every[name](h))


def normalisation(rng: Rng, shape: Shape) -> Piece:
    n = shape[-1]
    name = pick(rng, "layer norm", "rms norm", "l2 norm")
    axes: tuple[int, ...] = (-1,)
    if len(shape) >= 3 and rng.random() < 0.5:
        name = "instance norm"
        axes = tuple(range(1, len(shape) - 1))
        axes = tuple(i - len(shape) for i in axes)  # Whatever axes vmap adds.
    elif n % 4 == 0 and n >= 8 and rng.random() < 0.3:
        name = "group norm"
    size = n if axes == (-1,) else int(np.prod([shape[i] for i in axes]))
    # Centring two entries leaves only a sign, whose derivative is all epsilon's.
    eps = pick(rng, 1e-5, 1e-3) if size > 3 else 0.1

    def apply(h: jax.Array, w: Any) -> jax.Array:
        x = h.reshape(*h.shape[:-1], 4, -1) if name == "group norm" else h
        if name not in ("rms norm", "l2 norm"):
            x = x - x.mean(axes, keepdims=True)
        # In float16 the derivative of 1/√ overflows near 0.
        square = jnp.square(x.astype(at_least(x.dtype)))
        if name == "l2 norm":
            length = jnp.sqrt(jnp.sum(square, axes, keepdims=True) + eps)
            x = x / length.astype(x.dtype) * size**0.5
        else:
            square = jnp.mean(square, axes, keepdims=True)
            x = x * lax.rsqrt(square + eps).astype(x.dtype)
        return x.reshape(h.shape) * w[0] + w[1]

    init = lambda rng: (rng.uniform(0.5, 1, n), 0.3 * rng.normal(size=n))
    return Piece(f"{name} over {size}", apply, init)


def soft(rng: Rng, shape: Shape) -> Piece:
    n = shape[-1]
    mean = lambda h: jnp.sum(jax.nn.softmax(h, -1) * h, -1, keepdims=True)
    every = {
        "softmax": lambda h: jax.nn.softmax(h, -1) * n**0.5,
        "log softmax": lambda h: 0.5 * jax.nn.log_softmax(h, -1),
        "logsumexp": lambda h: 0.5 * (h - jax.nn.logsumexp(h, -1, keepdims=True)),
        "softmax mean": lambda h: 0.5 * (h + mean(h)),
    }
    name = pick(rng, *every)
    return Piece(f"{name} over {n}", lambda h, _: every[name](h))


def cumulative(rng: Rng, shape: Shape) -> Piece:
    n, back = shape[-1], bool(rng.random() < 0.4)
    every = {
        "cumsum": lambda h: jnp.cumsum(h, -1) / n**0.5 * 0.7,
        "lax.cumsum": lambda h: lax.cumsum(h, h.ndim - 1, back) / n**0.5 * 0.7,
        "cumprod": lambda h: lax.cumprod(1 + jnp.tanh(h) / n, h.ndim - 1, back),
        "logcumsumexp": lambda h: 0.5 * lax.cumlogsumexp(h, h.ndim - 1, back),
    }
    name = pick(rng, *every, "logcumsumexp")
    return Piece(f"{name} {n}", lambda h, _: every[name](h))


def indexing(rng: Rng, shape: Shape) -> Piece:
    n = shape[-1]
    index = rng.integers(n, size=n) if rng.random() < 0.5 else rng.permutation(n)
    index = index.astype(np.int32)  # JAX indexes with them whether or not x64 is on.
    shift = int(rng.integers(n)) if n > 1 else 0

    def one_hot(h: jax.Array) -> jax.Array:
        return 0.7 * h @ jax.nn.one_hot(index, n, dtype=h.dtype)

    every = {
        "gather": lambda h: 0.7 * h[..., index],
        "roll": lambda h: jnp.roll(h, shift, -1),
        "one-hot": one_hot,
        "scatter": lambda h: 0.5 * jnp.zeros_like(h).at[..., index].add(h),
        "flip": lambda h: h[..., ::-1] - 0.1 * h,
        "concatenate": lambda h: jnp.concatenate([h[..., shift:], -h[..., :shift]], -1),
        "set": lambda h: h.at[..., shift].set(jnp.sin(h[..., 0])),
        "slice": lambda h: lax.dynamic_update_slice_in_dim(
            h, jnp.tanh(h[..., :1]), shift, h.ndim - 1
        ),
        "differences": lambda h: 0.5 * (h - jnp.roll(h, 1, -1)),
    }
    name = pick(rng, *every)
    return Piece(f"{name} {n}", lambda h, _: every[name](h))


def fourier(rng: Rng, shape: Shape) -> Piece:
    n = shape[-1]
    freqs, name = n // 2 + 1, pick(rng, "filter", "filter", "complex", "modulus")

    def apply(h: jax.Array, w: Any) -> jax.Array:
        wide = h.astype(at_least(h.dtype))
        if name == "complex":
            z = lax.complex(wide, jnp.roll(wide, 1, -1))
            z = z * lax.complex(*(t.astype(wide.dtype) for t in w))
            return (z.real + 0.5 * jnp.tanh(z.imag)).astype(h.dtype)
        spectrum = jnp.fft.rfft(wide)
        if name == "filter":
            spectrum *= lax.complex(*(t.astype(wide.dtype) for t in w))
        else:
            spectrum *= lax.rsqrt(1 + jnp.abs(spectrum) ** 2).astype(spectrum.dtype)
        return jnp.fft.irfft(spectrum, n).astype(h.dtype)

    size = n if name == "complex" else freqs
    init = lambda rng: tuple(rng.uniform(-0.6, 0.6, (2, size)))
    return Piece(f"Fourier {name} {n}", apply, init)


# Others


def attention(rng: Rng, shape: Shape) -> Piece:
    """Over the axis before the last one."""
    d = shape[-1]
    heads = int(pick(rng, *(h for h in (1, 2, 4) if d % h == 0)))
    causal, whole = (bool(rng.random() < 0.5) for _ in range(2))

    def apply(h: jax.Array, w: Any) -> jax.Array:
        split = lambda t: t.reshape(-1, h.shape[-2], heads, d // heads)
        q, k, v = (split(h @ w[i]) for i in range(3))
        if whole:
            y = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        else:
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (d // heads) ** 0.5
            if causal:
                mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
                scores = jnp.where(mask, scores, -1e4)
            y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), v)
        return y.reshape(h.shape) @ w[3]

    name = f"attention, {shape[-2]} tokens of {d}, {heads} heads" + ", causal" * causal
    return Piece(name, apply, lambda rng: [matrix(rng, d, d) for _ in range(4)])


def control(rng: Rng, shape: Shape) -> Piece:
    n = shape[-1]
    name = pick(rng, "recurrence", "inner scan", "fori", "cond", "cond of z", "switch")

    def apply(h: jax.Array, w: jax.Array) -> jax.Array:
        layer = lambda h: jnp.tanh(h @ w)
        if name == "recurrence":  # along the last axis
            step = lambda s, x: ((0.5 * s + 0.5 * x),) * 2
            first = jnp.zeros_like(h[..., 0])
            return jnp.moveaxis(lax.scan(step, first, jnp.moveaxis(h, -1, 0))[1], 0, -1)
        if name == "inner scan":
            step = lambda s, _: (0.5 * s + 0.5 * layer(s), None)
            return lax.scan(step, h, None, length=3)[0]
        if name == "fori":  # Newton's method for a square root
            a = 1 + h * h
            return lax.fori_loop(0, 4, lambda _, y: 0.5 * (y + a / y), jnp.ones_like(a))
        if name == "cond":
            return lax.cond(w[0, 0] > 0, layer, jnp.sin, h)
        if name == "cond of z":  # always the same branch, but XLA does not know it
            return lax.cond(jnp.sum(h) < 1e3, layer, lambda h: -h, h)
        index = (w[0, 0] > 0).astype(jnp.int32) + 1
        return lax.switch(index, [jnp.cos, layer, jnp.tanh], h)

    return Piece(f"{name} {n}", apply, lambda rng: matrix(rng, n, n))


KINDS: dict[str, Callable[[Rng, Shape], Piece]] = {
    "elementwise": elementwise,
    "gated": gated,
    "dense": dense,
    "perceptron": perceptron,
    "bilinear": bilinear,
    "conv1d": convolution_1d,
    "conv2d": convolution_2d,
    "sort": sorting,
    "norm": normalisation,
    "softmax": soft,
    "attention": attention,
    "cumulative": cumulative,
    "indexing": indexing,
    "fourier": fourier,
    "narrow": narrow,
    "control": control,
    "spectral": spectral,
}
