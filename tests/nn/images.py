"""What the tests of the image models share."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from deqjax._fold import fold
from tests.nn.training import nll


def fill(make, seed=0, mean=0.5):
    """What `make` makes, every parameter drawn around `mean`: none is special."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jnp.asarray(mean + rng.normal(size=leaf.shape) / 2, leaf.dtype)

    return jax.tree.map(draw, eqx.filter_eval_shape(make, key=jr.key(0)))


def repeated(fn, z, args):
    """Of a solve with `fn`: the primitives of each evaluation, and what is kept."""
    found = []

    def trace(z, arrays):
        rest, kept, _ = fold(fn, z, eqx.combine(arrays, static))
        eqns = jax.make_jaxpr(rest)(z, kept).eqns
        found.extend(eqn.primitive.name for eqn in eqns)
        return kept

    # Traced as a whole, so that nothing is compiled.
    arrays, static = eqx.partition(args, eqx.is_array)
    return found, jax.eval_shape(trace, z, arrays)


def data(classes=2, n=6, side=8, channels=3):
    """Noisy images of as many textures as there are classes, and their labels."""
    labels = np.arange(n) % classes
    columns = np.arange(side)
    waves = np.cos(np.pi * (labels[:, None] + 1) * columns / 4)
    images = np.broadcast_to(waves[:, None, None], (n, channels, side, side))
    noise = 0.3 * np.random.default_rng(0).normal(size=images.shape)
    return jnp.asarray(images + noise, jnp.float32), jnp.asarray(labels)


def cross_entropy(logits, labels):
    """The mean over a batch, and over pixels where logits have them."""
    return jnp.mean(nll(logits, labels, axis=1))


# --- layers in NumPy, on one example --------------------------------------------------


def np_conv(x, w, stride=1):
    """A convolution with zeros around, written as the sum over the kernel."""
    size = w.shape[-1]
    x = np.pad(x, ((0, 0), *2 * ((size // 2, size // 2),)))
    h, v = (n - size + 1 for n in x.shape[1:])
    out = sum(
        np.einsum("oc,chw->ohw", w[:, :, i, j], x[:, i : i + h, j : j + v])
        for i in range(size)
        for j in range(size)
    )
    return out[:, ::stride, ::stride]


def np_norm(x, norm):
    """Group norm with the parameters of an equinox layer."""
    groups = x.reshape(norm.groups, -1)
    groups = groups - groups.mean(1, keepdims=True)
    out = groups / np.sqrt(groups.var(1, keepdims=True) + norm.eps)
    out = out.reshape(x.shape)
    if norm.weight is None:
        return out
    return (
        out * np.asarray(norm.weight)[:, None, None]
        + np.asarray(norm.bias)[:, None, None]
    )


def relu(x):
    return np.maximum(x, 0)
