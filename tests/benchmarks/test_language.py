"""The language program: data, training, resuming after a kill, and what it refuses."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import deqjax
from benchmarks.common import training
from benchmarks.language import __main__ as program
from benchmarks.language._config import Config, preset_fields
from benchmarks.language._data import TrainBatches, load_corpus, valid_batches
from benchmarks.language._errors import UsageError
from benchmarks.language._models import make_model
from benchmarks.language._train import loss_fn

ROOT = Path(program.__file__).resolve().parents[2]
SMALL = "--dim 8 --heads 2 --hidden 8 --length 8 --batch-size 4 --eval-windows 8"


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Optax's Adam leans on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question.\n" * 30)
    return path


def options(tmp_path, text, *more):
    given = f"{SMALL} --data {text} --output {tmp_path / 'out'} --progress off"
    return [*given.split(), *more]


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


# --- data -----------------------------------------------------------------------------


def test_batches_are_windows_of_the_text_and_depend_on_the_step_alone():
    tokens = np.arange(100, dtype=np.uint8)
    batches = TrainBatches(tokens, 4, 9, seed=3)
    assert batches[5].shape == (4, 10)
    assert np.all(np.diff(batches[5]) == 1)
    np.testing.assert_array_equal(batches[5], TrainBatches(tokens, 4, 9, seed=3)[5])
    assert np.any(batches[5] != batches[6])


def test_every_validation_token_counts_once():
    pairs = valid_batches(np.arange(31, dtype=np.uint8), 4, 10, most=99)
    targets = np.concatenate([w[k > 0][:, 1:].ravel() for w, k in pairs])
    assert sorted(targets) == list(range(1, 31))


@pytest.mark.slow
def test_the_standard_library_is_split_by_files():
    corpus = load_corpus("stdlib", None, 128)
    assert corpus.vocab_size == 256
    share = len(corpus.valid) / (len(corpus.train) + len(corpus.valid))
    assert 0.01 < share < 0.15
    again = load_corpus("stdlib", None, 128)
    np.testing.assert_array_equal(corpus.valid, again.valid)


def test_words_of_wikitext_are_sorted_by_frequency(tmp_path):
    (tmp_path / "wiki.train.tokens").write_text(" the cat <unk> the \n the dog \n")
    (tmp_path / "wiki.valid.tokens").write_text(" the bird \n the dog \n")
    corpus = load_corpus("wikitext-103", tmp_path, 2)
    assert corpus.vocabulary == ["the", "<eos>", "<unk>", "cat", "dog"]
    assert corpus.train.tolist() == [0, 3, 2, 0, 1, 0, 4, 1]
    assert corpus.valid.tolist() == [0, 2, 1, 0, 4, 1]
    assert corpus.token_bytes.tolist() == [4, 1, 6, 4, 4]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "--data: nowhere is neither"),
        (["--data", "wikitext-103"], "--data-dir: missing"),
        (["--data", "wikitext-103", "--data-dir", "."], "wiki.train.tokens"),
        (["--length", "5000"], "fewer than the 5001"),
        (["--mesh", "rows=2"], "--mesh: got 'rows=2'"),
        (["--mesh", "data=64"], "there are only"),
        (["--heads", "3"], "num_heads"),
    ],
)
def test_refusals_name_the_option_and_write_nothing(
    tmp_path, text, capsys, more, message
):
    assert program.main(options(tmp_path, text, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_empty_text_is_refused(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(UsageError, match="is empty"):
        load_corpus(str(tmp_path / "empty"), None, 8)


# --- whole runs -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", ["revdeq", "deq", "explicit"])
def test_a_run_learns_and_leaves_its_results(tmp_path, text, capsys, model):
    more = ["--steps", "200", "--eval-every", "100", "--model", model]
    given = options(tmp_path, text, *more)
    assert program.main(given) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert last == f"bits per byte: {results['bits_per_byte']:.4f}"
    assert results["bits_per_byte"] < 6  # of 8 for a uniform guess
    rows = training.read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(1, 201))
    assert (out / "figure.png").stat().st_size > 10_000
    # Again: refused without --resume, of another configuration refused with it.
    assert program.main(given) == 2
    assert "add --resume" in capsys.readouterr().err
    assert program.main([*given, "--resume", "--lr", "0.5"]) == 2
    assert "lr = 0.003" in capsys.readouterr().err
    assert program.main([*given, "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == last


@pytest.mark.slow
def test_models_have_equal_numbers_of_parameters():
    for preset in ("tiny", "small"):
        counts = {}
        for name in ("revdeq", "deq", "explicit"):
            config = Config(**{**preset_fields(preset), "model": name})
            shapes = eqx.filter_eval_shape(lambda c=config: make_model(c, 256))
            counts[name] = deqjax.nn.count_parameters(shapes)
        assert max(counts.values()) < 1.01 * min(counts.values())


def start(given, **env):
    command = [sys.executable, "-m", "benchmarks.language", *given]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def losses(out):
    rows = training.read_metrics(out / "metrics.jsonl")
    return [(r["kind"], r["step"], r.get("loss", r.get("valid_loss"))) for r in rows]


def kill_and_resume(tmp_path, text, want, seed):
    """Kill a run at a random step, resume it, compare its losses bit for bit."""
    path = tmp_path / f"killed-{seed}"
    path.mkdir()
    given = options(path, text, "--steps", "400", "--eval-every", "100")
    given += ["--save-every", "20"]
    process = start(given)
    checkpoints, wanted = path / "out" / "checkpoints", random.Random(seed)
    least = wanted.randrange(1, 15) * 20
    while process.poll() is None:
        steps = [int(p.name) for p in checkpoints.glob("*") if p.name.isdigit()]
        if max(steps, default=0) >= least:
            time.sleep(wanted.random() * 0.1)
            break
        time.sleep(0.005)
    process.kill()
    process.wait()
    process.stdout.close()
    finished = (path / "out" / "results.json").exists()
    process = start([*given, "--resume"])
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output
    assert losses(path / "out") == want
    return finished


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path, text):
    given = options(tmp_path, text, "--steps", "400", "--eval-every", "100")
    process = start([*given, "--save-every", "20"])
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output
    want = losses(tmp_path / "out")
    finished = [kill_and_resume(tmp_path, text, want, seed) for seed in range(2)]
    assert not all(finished)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path, text, number):
    given = options(tmp_path, text, "--steps", "100000", "--eval-every", "50")
    process = start(given)
    checkpoints = tmp_path / "out" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("50")):
        time.sleep(0.05)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 128 + number, output
    assert "continue with --resume" in output
    saved = max(int(p.name) for p in checkpoints.glob("*") if p.name.isdigit())
    assert losses(tmp_path / "out")[-1][1] == saved > 50


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=4,fsdp=2", "fsdp=8"])
def test_losses_on_several_devices_are_those_of_one(tmp_path, text, mesh):
    more = ["--batch-size", "16", "--dim", "16", "--steps", "20", "--seed", "1"]
    flags = "--xla_force_host_platform_device_count=8"
    rows = []
    for name, extra in (("one", []), ("many", ["--mesh", mesh])):
        path = tmp_path / name
        path.mkdir()
        process = start([*options(path, text, *more), *extra], XLA_FLAGS=flags)
        output = process.communicate()[0].decode()
        assert process.returncode == 0, output
        rows.append([r[2] for r in losses(path / "out")])
    assert len(rows[0]) == 21
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-5)
