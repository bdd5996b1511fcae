# %% [markdown]
# # Quickstart: a stable DEQ and a RevDEQ
#
# An ordinary network computes $z_1, z_2, \dots, z_N$, one layer after the other. A
# **deep equilibrium model** (DEQ) has one layer, the *cell* $f$, and its output is the
# state that the cell leaves unchanged,
#
# $$ z^* = f(z^*, x). $$
#
# The **solver** finds this fixed point, and the **adjoint** says how gradients get
# through it. This notebook trains three small models on handwritten digits:
#
# 1. a DEQ with an ordinary cell, which looks fine until one asks whether its fixed
#    points exist;
# 2. the same DEQ with a cell that contracts, so that they do;
# 3. a RevDEQ, which takes four steps and needs no fixed point.
#
# It ends by checking what it says. Everything runs on a CPU within a minute.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import deqjax

# %% [markdown]
# ## Data
#
# The 1797 digits of 8 × 8 pixels that come with scikit-learn. Half of them are held out
# for testing.

# %%
digits = load_digits()
train_x, test_x, train_y, test_y = train_test_split(
    (digits.data / 16).astype(np.float32),
    digits.target.astype(np.int32),
    test_size=0.5,
    random_state=0,
    stratify=digits.target,
)
train_x.shape, test_x.shape

# %% [markdown]
# ## A cell, and a model around it
#
# A cell is any callable `cell(z, x, *, key=None) -> z` that returns what `z` looks
# like. Here it is one dense layer. The input `x` enters at every iteration (*input
# injection*): without it, the fixed point could not depend on the input.
#
# The solver is `Picard`: it iterates $z \leftarrow f(z, x)$ until $\lVert f(z) - z
# \rVert \le \mathrm{atol} + \mathrm{rtol}\, \lVert f(z) \rVert$. `batch_ndim=1` says
# that the first axis holds independent problems: each image stops by itself and has its
# own statistics. The default adjoint, `ImplicitAdjoint`, uses the implicit function
# theorem. No iterate is stored or differentiated.


# %%
class Cell(eqx.Module):
    linear: eqx.Module

    def __call__(self, z, x, *, key=None):
        return jnp.tanh(jax.vmap(self.linear)(z) + x)


class Classifier(eqx.Module):
    encoder: eqx.nn.Linear
    deq: deqjax.nn.DEQ
    head: eqx.nn.Linear

    def __init__(self, make_deq, *, size=64, key):
        key1, key2, key3 = jr.split(key, 3)
        self.encoder = eqx.nn.Linear(64, size, key=key1)
        self.deq = make_deq(eqx.nn.Linear(size, size, key=key2))
        self.head = eqx.nn.Linear(size, 10, key=key3)

    def __call__(self, images):  # a whole batch: (batch, 64) -> (batch, 10)
        sol = self.deq.solve(jax.vmap(self.encoder)(images))
        return jax.vmap(self.head)(sol.value), sol


# %% [markdown]
# ## Training
#
# Nothing here knows that the model is a DEQ: it is an Equinox module, trained by Optax.
# The loop records one more number per step, the part of the solves that converged.


# %%
def loss_fn(model, images, labels):
    logits, sol = model(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), jnp.mean(sol.stats["converged"])


def train(model, epochs=20, batch_size=64, learning_rate=3e-3):
    steps = len(train_x) // batch_size
    schedule = optax.cosine_decay_schedule(learning_rate, epochs * steps)
    optimiser = optax.adamw(schedule, weight_decay=1e-2)
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, images, labels):
        value_and_grad = eqx.filter_value_and_grad(loss_fn, has_aux=True)
        (loss, converged), grads = value_and_grad(model, images, labels)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optimiser.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss, converged

    rng, records = np.random.default_rng(0), []
    for _ in range(epochs):
        order = rng.permutation(len(train_x))
        for i in range(steps):
            batch = order[i * batch_size : (i + 1) * batch_size]
            model, state, *record = step(model, state, train_x[batch], train_y[batch])
            records.append(record)
    return model, np.array(records)


@eqx.filter_jit
def test(model):
    logits, sol = model(test_x)
    return jnp.mean(jnp.argmax(logits, 1) == test_y), sol


# %% [markdown]
# ## First try: an ordinary layer
#
# The weight is free, and training decides where it goes.


# %%
def free(linear):
    return deqjax.nn.DEQ(Cell(linear), solver=deqjax.Picard(batch_ndim=1))


free_model, free_record = train(Classifier(free, key=jr.key(0)))
free_accuracy, free_sol = test(free_model)
print(f"test accuracy {free_accuracy:.2%}\n")
print(deqjax.summary(free_sol))

# %% [markdown]
# The loss falls, and the accuracy is that of a model that one might tune a little more.
# `deqjax.summary` shows what is wrong: a part of the solves did not reach their
# tolerance. What the model returned for those images depends on the number of steps,
# and their gradient is the formula of a fixed point at a point that is none. Nothing
# raised, since unconverged solves are usual while a model is being trained. So look at
# `sol.result` or `sol.stats["converged"]` in every training.
#
# Is the map a contraction at six of the images that failed? The report takes the map as
# `fn(z, args)`. The largest singular value of the Jacobian is far above 1, so that
# nothing guarantees convergence. Where the spectral radius, too, is near 1 or above,
# plain iteration crawls, or moves away from the fixed point.


# %%
def fn(z, args):
    cell, x = args
    return cell(z, x)


def contraction(model, images):
    x = jax.vmap(model.encoder)(images)
    z = model.deq(x)
    return deqjax.diagnostics.contraction_report(
        fn, z, (model.deq.cell, x), batch_ndim=1
    )


failed = np.flatnonzero(~free_sol.stats["converged"])
free_report = contraction(free_model, test_x[failed[:6]])
free_report

# %% [markdown]
# ## A cell that contracts
#
# `Contractive` divides a layer's weight by an upper bound of its largest singular value
# wherever that exceeds `kappa`. Tanh has slopes of at most 1, so the map contracts by
# `kappa` per step, whatever the optimiser does to the weight: Banach's theorem then
# gives exactly one fixed point, and every solver finds it. The bound is computed once
# per solve, not once per iteration.


# %%
def contractive(linear):
    return free(deqjax.nn.Contractive(linear, 0.9))


deq_model, deq_record = train(Classifier(contractive, key=jr.key(0)))
deq_accuracy, deq_sol = test(deq_model)
print(f"test accuracy {deq_accuracy:.2%}\n")
print(deqjax.summary(deq_sol))
deq_report = contraction(deq_model, test_x[:6])
deq_report

# %% [markdown]
# ## A RevDEQ
#
# The reversible solver keeps two states and updates them in turn,
#
# $$ y_{n+1} = (1-\beta)\, y_n + \beta f(z_n), \qquad
#    z_{n+1} = (1-\beta)\, z_n + \beta f(y_{n+1}), $$
#
# and each update can be undone: from $z_{n+1}$ and $y_{n+1}$ one gets $z_n$, then
# $y_n$. The forward pass records one byte of each number that it overwrites, by which
# the backward pass repairs its rounding errors. The gradient is that of the steps
# taken, near a fixed point or not, whence nothing is tested.


# %%
def reversible(linear):
    return deqjax.nn.RevDEQ(Cell(linear), num_steps=4, beta=0.5, batch_ndim=1)


revdeq_model, revdeq_record = train(Classifier(reversible, key=jr.key(0)))
revdeq_accuracy, revdeq_sol = test(revdeq_model)
print(f"test accuracy {revdeq_accuracy:.2%}\n")
print(deqjax.summary(revdeq_sol))

# %% [markdown]
# ## All three at a glance

# %%
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(10, 3.1), layout="constrained"
)
records = {
    "DEQ, free": free_record,
    "DEQ, contractive": deq_record,
    "RevDEQ": revdeq_record,
}
for name, record in records.items():
    left.semilogy(record[:, 0], label=name)
for name, record in list(records.items())[:2]:
    middle.plot(100 * record[:, 1], label=name)
left.set(title="Training loss", xlabel="training step", ylabel="cross-entropy")
middle.set(title="Solves that converged", xlabel="training step", ylabel="%")
for name, model in {"free": free_model, "contractive": deq_model}.items():
    x = jax.vmap(model.encoder)(test_x)
    layer = deqjax.nn.DEQ(
        model.deq.cell, solver=deqjax.Picard(None, None, batch_ndim=1), max_steps=40
    )
    history = layer.solve(x, options={"record": True}).stats["residual_history"]
    right.semilogy(range(1, 41), jnp.max(history, 1), label=f"DEQ, {name}")
right.set(title="Plain iteration, worst test image", xlabel="step", ylabel="‖f(z) − z‖")
left.legend(loc="lower left")
right.legend()
plt.show()

# %% [markdown]
# ## Is the gradient right?
#
# `gradient_report` compares adjoints with a dense solution of the linear system in the
# implicit function theorem, here on one image.

# %%
x = deq_model.encoder(test_x[0])[None]
gradients = deqjax.diagnostics.gradient_report(
    fn,
    jnp.zeros_like(x),
    (deq_model.deq.cell, x),
    solver=deqjax.Anderson(rtol=1e-6, atol=0.0),
    adjoints={
        "implicit": deqjax.ImplicitAdjoint(),
        "implicit, 1e-2": deqjax.ImplicitAdjoint(deqjax.linear.GMRES(1e-2)),
        "JFB": deqjax.JFBAdjoint(),
    },
)
gradients

# %% [markdown]
# ## What this notebook claims
#
# Where to go from here: the other notebooks, or [Diagnosing a
# model](../docs/diagnostics.md). `benchmarks/train_images.py` trains a convolutional
# RevDEQ.

# %%
# Without a bound the model learns, and leaves the region where solves converge.
assert free_accuracy > 0.8
assert not bool(jnp.all(free_sol.stats["converged"]))
assert free_record[:, 1].min() < 0.95
assert (free_report.norm > 1).all()

# With a bound, and with a fixed number of reversible steps, it learns better.
assert min(deq_accuracy, revdeq_accuracy) > 0.94

# With one, every solve converges, in training and in testing.
assert bool(jnp.all(deq_sol.stats["converged"]))
assert deq_record[:, 1].min() == 1
assert (deq_report.norm <= 0.9 + 1e-3).all()

# A RevDEQ costs what was asked for: 4 steps with 2 evaluations each.
assert int(revdeq_sol.stats["num_evals"].max()) == 8

# The implicit gradient is exact to its tolerance, and JFB is not.
assert gradients.error[0] < 1e-4
assert gradients.error[1] < 3e-2
assert gradients.error[2] > gradients.error[1]
