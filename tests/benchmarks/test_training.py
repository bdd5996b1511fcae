"""The training package: optimiser, step, precision, checkpoints and log."""

import math
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import deqjax
from benchmarks.common import training
from benchmarks.language._config import Config, preset_fields
from benchmarks.language._models import make_model
from benchmarks.language._train import loss_fn


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Optax's Adam leans on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# --- the optimiser and the step -------------------------------------------------------


class Line(eqx.Module):
    cell: jax.Array
    rest: jax.Array


def squares(model, batch, key):
    return jnp.mean((batch @ (model.cell + model.rest)) ** 2), {}


def line_step(learning_rate=0.1, **kwargs):
    model = Line(jnp.ones((3, 1)), jnp.ones((3, 1)))
    schedule = training.Schedule(
        learning_rate=learning_rate,
        steps=10,
        weight_decay=0.0,
        clip=math.inf,
        cell_rate=kwargs.pop("cell_rate", 1.0),
    )
    optimiser = training.make_optimiser(schedule)
    state, static = training.init_state(
        model, optimiser, key=jr.key(0), ema="ema_decay" in kwargs
    )
    return state, training.make_step(squares, static, optimiser, **kwargs)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    state, step = line_step()
    batch = np.ones((4, 3), np.float32)
    state, _ = step(state, batch)
    before = jax.device_get((state.params, state.opt_state.inner_state))
    state, metrics = step(state, np.full((4, 3), np.inf, np.float32))
    after = jax.device_get((state.params, state.opt_state.inner_state))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (1, 1)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
    state, metrics = step(state, batch)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (1, 0)
    assert int(state.step) == 3


def test_the_cell_has_a_rate_of_its_own():
    state, step = line_step(cell_rate=0.5)
    start = jax.device_get(state.params)
    for _ in range(2):  # the rate of the very first step is 0
        state, _ = step(state, np.ones((4, 3), np.float32))
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, start)
    assert np.all(moved.rest != 0)
    np.testing.assert_allclose(moved.cell, 0.5 * moved.rest, rtol=1e-5)


def test_an_accumulated_gradient_is_that_of_the_whole_batch():
    batch = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    (whole, step), (parts, step_of_parts) = line_step(), line_step(accumulate=4)
    for _ in range(2):
        whole, first = step(whole, batch)
        parts, second = step_of_parts(parts, batch)
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-6)
    np.testing.assert_allclose(first["grad_norm"], second["grad_norm"], rtol=1e-6)


def test_the_average_follows_the_parameters():
    state, step = line_step(ema_decay=0.9)
    want = np.asarray(state.ema.rest)
    for i in range(4):
        state, _ = step(state, np.ones((4, 3), np.float32))
        decay = min(0.9, (1 + i) / (10 + i))
        want = decay * want + (1 - decay) * np.asarray(state.params.rest)
    np.testing.assert_allclose(state.ema.rest, want, rtol=1e-5)


@pytest.mark.slow
def test_mixed_precision_has_gradients_of_float32():
    config = Config(**{**preset_fields("tiny"), "dim": 8, "hidden": 8, "length": 8})
    model = make_model(config, 16)
    cast = training.cast_linear(model, "bfloat16")
    assert cast.head.weight.dtype == jnp.bfloat16
    assert cast.tokens.weight.dtype == cast.deq.cell.norm1.weight.dtype == jnp.float32
    params, static = eqx.partition(model, deqjax.nn.trainable(model))
    windows = np.arange(18).reshape(2, 9) % 16

    def loss(params, dtype):
        model = training.cast_linear(eqx.combine(params, static), dtype)
        return loss_fn(model, jnp.asarray(windows), jr.key(0))[0]

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    exact, narrow = (gradient(params, d) for d in ("float32", "bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype("float32")}
    flat = lambda tree: ravel_pytree(tree)[0]
    gap = jnp.linalg.norm(flat(exact) - flat(narrow))
    assert 0 < float(gap) < 0.05 * float(jnp.linalg.norm(flat(exact)))


# --- checkpoints and the log ----------------------------------------------------------


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    state, step = line_step()
    kept = {}
    with training.Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        for _ in range(2):
            state, _ = step(state, np.ones((4, 3), np.float32))
            checkpoints.save(state)
            kept[int(state.step)] = np.asarray(state.params.rest).copy()
        checkpoints.wait()
    for file in (tmp_path / "c" / "2").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    (tmp_path / "c" / "7.orbax-checkpoint-tmp").mkdir()  # one that was cut short
    like, _ = line_step()
    with training.Checkpoints(tmp_path / "c") as checkpoints:
        found = checkpoints.restore(like)
    assert int(found.step) == 1
    np.testing.assert_array_equal(found.params.rest, kept[1])


def test_the_best_checkpoint_and_the_latest_are_kept(tmp_path):
    state, step = line_step()
    with training.Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for loss in (3.0, 1.0, 2.0, 4.0, 5.0):
            state, _ = step(state, np.ones((4, 3), np.float32))
            checkpoints.save(state, {"valid_loss": loss})
        checkpoints.wait()
        assert checkpoints.steps == [2, 4, 5]


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "log"
    with training.MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.write("train", step, {"loss": 1.0 / step})
    path.write_text(path.read_text() + '{"kind": "train", "st')
    with training.MetricsLog(path, resume_at=2) as log:
        log.write("train", 3, {"loss": math.nan})
    rows = training.read_metrics(path)
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert rows[-1]["loss"] is None
