"""The main job, on tiny images: what it refuses, what it trains, what it leaves."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from benchmarks import train_images
from benchmarks._images_config import BY_DATA, Config, UsageError, parse_config
from benchmarks._images_models import ConvCell
from benchmarks._images_report import check_output, make_table, write_results
from benchmarks._images_training import augment, make_gradient, normalise
from tests.benchmarks.test_image_data import write_cifar10

SCRIPT = Path(train_images.__file__)


def options(tmp_path, *more):
    """A run that takes seconds, on the 10 training images of a tiny CIFAR-10."""
    text = f"--data cifar10 --data-dir {tmp_path}/data --output {tmp_path}/out"
    text += " --channels 4 --epochs 1 --batch-size 5 --progress off"
    return [*text.split(), *more]


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Optax's Adam leans on implicit promotion; the cell does not (see below)."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: where, its configuration, and what it trained."""
    tmp_path = tmp_path_factory.mktemp("run")
    write_cifar10(tmp_path / "data", "python archive")
    config = parse_config(options(tmp_path, "--steps", "2"))
    runs, path = train_images.run(config)
    return path, config, runs


# --- a finished run -------------------------------------------------------------------


def test_everything_is_written(finished):
    path, config, runs = finished
    assert path == config.output
    names = {"results.json", "figure.png", "revdeq.eqx", "explicit.eqx"}
    assert {item.name for item in path.iterdir()} == names
    assert {item.name for item in path.parent.iterdir()} == {"data", "out"}
    with Image.open(path / "figure.png") as image:
        assert image.width > 1000
    results = json.loads((path / "results.json").read_text(encoding="utf-8"))
    assert Config.from_json(results["config"]) == config
    assert results["images"] == {"train": 10, "test": 2, "shape": [3, 32, 32]}
    for run in runs:
        saved = results["runs"][run.name]
        assert saved["test_accuracy"] == run.test["accuracy"]
        assert len(saved["history"]) == 1
        assert saved["gradient_temp_bytes"] > 0
    assert results["runs"]["explicit"]["relative_residual"] is None
    assert results["versions"]["jax"] == jax.__version__


def test_figures_of_the_run_are_those_of_the_solves(finished):
    _, _, (revdeq, explicit) = finished
    assert revdeq.parameters == explicit.parameters
    # 2 steps with 2 evaluations each, and the cell once.
    assert revdeq.test["evaluations"] == revdeq.history[0]["evaluations"] == 4
    assert explicit.test["evaluations"] == 1
    assert 0 < revdeq.test["residual"] < 2
    assert np.isnan(explicit.test["residual"])
    assert revdeq.residuals["after"].shape == (1, 24, 2)
    assert np.all(np.isfinite(revdeq.residuals["before"]))
    assert not explicit.residuals


def test_equal_seeds_start_from_equal_parameters(finished):
    _, config, _ = finished
    data = train_images.load_data(config)
    models = [train_images.make_model(config, data, n) for n in ("revdeq", "explicit")]
    leaves = [jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in models]
    assert len(leaves[0]) == len(leaves[1])
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_trained_model_loads_again(finished):
    path, _, (revdeq, _) = finished
    model, config = train_images.load_run(path, "revdeq")
    data = train_images.load_data(config)
    logits, _ = model(normalise(jnp.asarray(data.test_images), data, jnp.float32))
    np.testing.assert_array_equal(jnp.argmax(logits, 1), revdeq.predictions)


def test_choices_that_are_no_more_are_left_out(finished):
    _, config, _ = finished
    assert Config.from_json({**config.to_json(), "arithmetic": "exact"}) == config


def test_table_holds_both(finished):
    _, _, runs = finished
    console = Console(width=100)
    with console.capture() as captured:
        console.print(make_table(runs))
    text = captured.get()
    for word in ("RevDEQ", "explicit network", f"{runs[0].parameters:,}", "MiB"):
        assert word in text


def test_results_are_replaced_only_on_request(finished, tmp_path):
    _, config, runs = finished
    data = train_images.load_data(config)
    config = dataclasses.replace(config, output=tmp_path / "a" / "b")
    path = write_results(runs[1:], config, data)
    before = (path / "results.json").read_bytes()
    with pytest.raises(UsageError, match=r"earlier run.*--overwrite"):
        write_results(runs, config, data)
    assert (path / "results.json").read_bytes() == before
    write_results(runs, dataclasses.replace(config, overwrite=True), data)
    assert (path / "revdeq.eqx").exists()
    assert [item.name for item in path.parent.iterdir()] == ["b"]

    (path / "thesis.txt").touch()
    with pytest.raises(UsageError, match=r"`thesis\.txt`"):
        check_output(dataclasses.replace(config, overwrite=True))


def test_what_fails_while_writing_leaves_the_earlier_results(
    finished, tmp_path, monkeypatch
):
    _, config, runs = finished
    data = train_images.load_data(config)
    config = dataclasses.replace(config, output=tmp_path / "out", overwrite=True)
    path = write_results(runs, config, data)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("benchmarks._images_report.eqx.tree_serialise_leaves", full)
    with pytest.raises(OSError, match="no space left"):
        write_results(runs, config, data)
    assert [item.name for item in tmp_path.iterdir()] == ["out"]
    assert (path / "revdeq.eqx").exists()


def test_gradient_is_that_of_the_steps_taken(finished):
    _, config, _ = finished
    data = train_images.load_data(config)
    batch = (jnp.asarray(data.train_images), jnp.asarray(data.train_labels))
    grads = []
    for adjoint in ("reversible", "unrolled"):
        chosen = dataclasses.replace(
            config, adjoint=adjoint, channels=(4,), widths=(1,)
        )
        model = train_images.make_model(chosen, data, "revdeq")
        params, static = eqx.partition(model, eqx.is_inexact_array)
        gradient = jax.jit(make_gradient(chosen, data, static))
        grads.append(gradient(params, *batch, jnp.arange(4), jr.key(0))[0])
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_scales_halve_the_resolution_and_add_their_evaluations(finished):
    _, config, _ = finished
    config = dataclasses.replace(config, channels=(4, 6), widths=(1, 2))
    data = train_images.load_data(config)
    model = train_images.make_model(config, data, "revdeq")
    assert model.blocks[1].deq.cell.conv1.weight.shape == (12, 6, 3, 3)
    logits, effort = eqx.filter_jit(model)(jnp.ones((3, 3, 32, 32)))
    assert logits.shape == (3, 10)
    np.testing.assert_array_equal(effort.evaluations, [8, 8, 8])
    assert effort.residual.shape == (3,)


def test_the_largest_model_has_the_size_of_the_paper(finished):
    _, config, _ = finished
    preset = {k: BY_DATA["cifar10"][k] for k in ("channels", "widths", "pool")}
    config = dataclasses.replace(config, **preset)
    data = train_images.load_data(config)
    model = eqx.filter_eval_shape(train_images.make_model, config, data, "revdeq")
    count = sum(leaf.size for leaf in jax.tree.leaves(model) if hasattr(leaf, "size"))
    assert count == pytest.approx(10.3e6, rel=0.01)


# --- parts ----------------------------------------------------------------------------


def test_cell_keeps_the_dtype_of_the_iterate():
    z = jr.normal(jr.key(0), (2, 4, 8, 8))
    wide, narrow = (
        ConvCell(4, 2, dtype, key=jr.key(1)) for dtype in (jnp.float32, jnp.bfloat16)
    )
    with jax.numpy_dtype_promotion("strict"):
        a, b = wide(z, z), narrow(z, z)
    assert a.dtype == b.dtype == jnp.float32
    error = jnp.linalg.norm(a - b) / jnp.linalg.norm(a)
    assert 1e-5 < error < 2e-2


def test_augmentation_shifts_and_mirrors():
    images = jr.randint(jr.key(0), (64, 1, 6, 6), 1, 255).astype(jnp.uint8)
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    shifted = np.asarray(augment(images, jr.key(1), 1, mirror=False))
    seen = set()
    for image, around in zip(shifted, padded, strict=True):
        places = [
            (i, j)
            for i in range(3)
            for j in range(3)
            if np.array_equal(image, around[:, i : i + 6, j : j + 6])
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 9
    mirrored = np.asarray(augment(images, jr.key(1), 0, mirror=True))
    turned = np.all(mirrored == np.asarray(images)[..., ::-1], axis=(1, 2, 3))
    kept = np.all(mirrored == np.asarray(images), axis=(1, 2, 3))
    assert np.all(turned ^ kept)
    assert 16 < turned.sum() < 48


# --- the command line -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps", "beta", "solver", "adjoint", "rtol"),
    [
        ("", 4, 0.5, "reversible", "reversible", None),
        ("--data cifar10 --data-dir d", 4, 0.8, "reversible", "reversible", None),
        ("--model deq", 30, 1.0, "picard", "implicit", 1e-2),
        ("--model deq --solver reversible", 30, 0.5, "reversible", "reversible", 1e-2),
        ("--model deq --rtol none --steps 3", 3, 1.0, "picard", "implicit", None),
        ("--adjoint unrolled --beta .3", 4, 0.3, "reversible", "unrolled", None),
    ],
)
def test_defaults_follow_the_choices(text, steps, beta, solver, adjoint, rtol):
    config = parse_config(text.split())
    assert (config.steps, config.beta, config.rtol) == (steps, beta, rtol)
    assert (config.solver, config.adjoint) == (solver, adjoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "--epochs 0",
            "--epochs: got '0', but it must be a whole number of at least 1",
        ),
        ("--epochs many", "--epochs: got 'many'"),
        ("--steps -1", "--steps: got '-1'"),
        ("--beta 0", "--beta: got '0', but it must be a number above 0"),
        ("--beta nan", "--beta: got 'nan'"),
        ("--lr inf", "--lr: got 'inf'"),
        ("--rtol 2", "--rtol: got '2', but it must be `none`, or a number above 0"),
        ("--seed -1", "--seed: got '-1'"),
        ("--model tree", "--model: invalid choice: 'tree'"),
        ("--precision float16", "--precision: invalid choice: 'float16'"),
        ("--step 3", "unrecognized arguments: --step 3"),
        ("--beta 1", "--beta: got 1, but the reversible solver divides by 1 − β"),
        ("--model deq --beta 2", "--beta: `beta`, the weight on f, must"),
        ("--model deq --adjoint reversible", "--adjoint: got reversible, which undoes"),
        ("--solver picard", "--solver: got picard, but --model revdeq"),
        ("--model explicit --beta 0.5", "--beta: of no use with --model explicit"),
        ("--arithmetic exact", "unrecognized arguments: --arithmetic exact"),
        ("--channels 8 8 --widths 1", "--widths: got 1 values for 2 scales"),
        ("--channels 8 8 8 8", "--channels: got 4 scales with --pool 2"),
        ("--batch-size 899", "--batch-size: got 899, but there are only 898"),
        ("--data cifar10", "--data-dir: missing"),
        ("--data-dir somewhere", "--data-dir: of no use with --data digits"),
        ("--data cifar10 --data-dir nowhere", "nowhere does not exist"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(text, message, tmp_path, capsys):
    output = tmp_path / "out"
    try:
        status = train_images.main([*text.split(), "--output", str(output)])
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    assert status == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert not list(tmp_path.iterdir())


def test_a_cell_that_changes_the_shape_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        ConvCell, "__call__", lambda self, z, x, *, key=None: z[..., 1:]
    )
    assert train_images.main(["--output", str(tmp_path / "out")]) == 2
    assert "`fn` must return the shape of `z0`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    write_cifar10(tmp_path / "data", "binary")
    text = options(tmp_path, "--lr", "1e38", "--model", "explicit", "--epochs", "3")
    assert train_images.main(text) == 1
    said = capsys.readouterr().err
    assert "error: the explicit network diverged in epoch 1" in said
    assert "lower --lr than 1e+38; nothing was written" in said
    assert [item.name for item in tmp_path.iterdir()] == ["data"]


def start(*args):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_script_trains_and_prints_the_path_last(tmp_path):
    output = tmp_path / "out"
    small = [
        "--model",
        "explicit",
        "--channels",
        "4",
        "--epochs",
        "2",
        "--progress",
        "lines",
    ]
    done = start(*small, "--output", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Results: {output}"
    assert "explicit network  epoch 2/2  loss" in done.stderr
    assert "\r" not in done.stderr
    assert (output / "figure.png").exists()
    # Once more: refused, at once and for a reason.
    again = start(*small, "--output", output)
    assert again.returncode == 2
    assert "holds the results of an earlier run" in again.stderr


def test_script_says_what_is_wrong_with_an_archive(tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"\x1f\x8b cut")
    output = tmp_path / "out"
    done = start("--data", "cifar10", "--data-dir", tmp_path, "--output", output)
    assert done.returncode == 2
    assert "cifar-10-binary.tar.gz is not a whole gzip" in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()
