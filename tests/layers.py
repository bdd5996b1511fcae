"""Maps made of the layers that DEQs are made of, to be evaluated twice alike."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from tests.helpers import norm_map, weights


def attention(z, args):
    """A post-norm causal transformer block without its MLP; z: (tokens, width)."""
    p, x = args
    q, k, v = (z @ w for w in p)
    scores = jnp.where(jnp.tri(len(z), dtype=bool), q @ k.T / 2, -1e9)
    h = 0.3 * z + jax.nn.softmax(scores) @ v + x
    h = h - jnp.mean(h, -1, keepdims=True)
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-3)


class Case(NamedTuple):
    fn: Any
    z0: Any
    args: Any


def norm_last(h, eps=1e-5):
    h = h - jnp.mean(h, -1, keepdims=True)
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + eps)


def conv(x, w, dtype=None):
    dtype = dtype or x.dtype
    x, w = x.astype(dtype), w.astype(dtype)
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def conv_group_norm(z, args):
    w, x = args
    h = jax.nn.relu(conv(z, w) + x)
    groups = norm_last(jnp.moveaxis(h, 3, 1).reshape(len(h), 2, -1))
    out = jnp.moveaxis(groups.reshape(len(h), -1, *h.shape[1:3]), 1, 3)
    return jax.nn.relu(0.3 * z + out)


def dropout(z, args):
    key, w, x = args
    keep = jr.bernoulli(jr.wrap_key_data(key), 0.8, z.shape)
    return norm_last(0.3 * z + jnp.where(keep, jnp.tanh(z @ w), 0) / 0.8 + x)


def half_matmul(z, args):
    w, x = args
    product = (z.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(z.dtype)
    return norm_last(0.3 * z + product + x)


def half_conv(z, args):
    w, x = args
    return jnp.tanh(conv(z, w, jnp.bfloat16).astype(z.dtype) + x)


def rms(z, args):
    w, x = args
    h = 0.3 * z + jax.nn.silu(z @ w) + x
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5)


# Easily contracted to a fused multiply-add in one pass only.
contracted = lambda z, args: jnp.tanh(0.3 * z + z @ args[0] + args[1])
power = lambda z, args: jnp.sin(z * z * 0.7 + args[1]) + 0.1 * z @ args[0]


def elementwise(z, args):
    w, x = args
    return 0.4 * z * jnp.cos(x) + jnp.diag(w) * jnp.sin(z**3) + x


def case(name):
    ks = jr.split(jr.key(2), 3)
    w, x = weights(ks[0], 12, gain=0.8), jr.normal(ks[1], (5, 12))
    z0 = 0.3 * jr.normal(ks[2], (5, 12))
    if "conv" in name:
        w = 0.2 * jr.normal(ks[0], (3, 3, 4, 4))
        x = jr.normal(ks[1], (2, 6, 6, 4))
        fn = conv_group_norm if name == "conv" else half_conv
        return Case(fn, jnp.zeros_like(x), (w, x))
    if name == "attention":
        return Case(attention, z0, ([w, w.T, w @ w], x))
    if name == "dropout":
        return Case(dropout, z0, (jr.key_data(jr.key(5)), w, x))
    maps = {
        "rms": rms,
        "norm": norm_map,
        "bf16 matmul": half_matmul,
        "contracted": contracted,
        "power": power,
        "elementwise": elementwise,
    }
    return Case(maps[name], z0, (w, x))
