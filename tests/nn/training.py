"""What trains small models, and compiles them fast."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

# Layers draw many small arrays: XLA compiles this generator in a third of the time.
QUICK = jr.key(0, impl="unsafe_rbg")


def quick(fn):
    """`fn`, compiled in half the time, to run slower: for what is run a few times."""
    return eqx.filter_jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def nll(logits, labels, axis=-1):
    """−log p of each label; classes along an axis of the logits."""
    logs = jnp.moveaxis(jax.nn.log_softmax(logits, axis), axis, -1)
    return -jnp.take_along_axis(logs, labels[..., None], -1)[..., 0]


def train(model, step, num_steps, lr=1e-2, jit=eqx.filter_jit):
    """Adam with `step(model, *carried) -> ((loss, carried), gradient)`.

    Returns a function of what is carried first, which returns the trained model, what
    is carried last, and the losses.
    """
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lr))

    @jit
    def update(model, moments, carried):
        (loss, carried), gradient = step(model, *carried)
        # optax raises a float to the power of its integer counter.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimiser.update(gradient, moments)
        return eqx.apply_updates(model, updates), moments, carried, loss

    def run(carried):
        nonlocal model
        moments = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
        losses = []
        for _ in range(num_steps):
            model, moments, carried, loss = update(model, moments, carried)
            losses.append(loss)
        return model, carried, [float(loss) for loss in losses]

    return run
