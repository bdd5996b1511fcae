"""The reasoning program: its data against brute force, its ways, its command line."""

import itertools
import json
import os
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
from benchmarks.reasoning import __main__ as program
from benchmarks.reasoning._config import (
    TASKS,
    WAYS,
    UsageError,
    cost_of_update,
    make_config,
    updates_of,
)
from benchmarks.reasoning._groups import group_table
from benchmarks.reasoning._sudoku import (
    count_solutions,
    draw_puzzles,
    solved_grids,
    split_grids,
)
from benchmarks.reasoning._tasks import Batches, make_task, running_products
from benchmarks.reasoning._train import loss_fn, share_right
from benchmarks.reasoning._ways import Looped, Stack, build

ROOT = Path(program.__file__).resolve().parents[2]
TINY = {"length": 6, "width": 4, "steps": 4, "batch_size": 4, "test_size": 8}
TINY_OPTIONS = [
    *("--length", "6", "--test-lengths", "9"),
    *("--width", "4", "--steps", "4", "--last", "2"),
    *("--batch-size", "4", "--test-size", "8", "--progress", "off"),
]


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Optax's Adam leans on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def tiny(task, **changes):
    given = {k: v for k, v in TINY.items() if task != "sudoku" or k != "length"}
    return make_config(task, "small", {**given, **changes})


# --- data -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "order"), [("S3", 6), ("A5", 60), ("S5", 120)])
def test_a_table_is_that_of_the_group(name, order):
    table = group_table(name)
    everything = np.arange(order)
    assert table.shape == (order, order)
    np.testing.assert_array_equal(table[0], everything)  # the identity
    np.testing.assert_array_equal(table[:, 0], everything)
    for line in (*table, *table.T):  # a Latin square
        np.testing.assert_array_equal(np.sort(line), everything)
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(order, size=(3, 500))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert np.any(table != table.T)


def test_running_products_are_those_of_permutations():
    words = np.random.default_rng(0).integers(60, size=(5, 20))
    found = np.asarray(running_products(jnp.asarray(words), group_table("A5")))
    parity = lambda p: sum(x > y for x, y in itertools.combinations(p, 2)) % 2
    elements = [p for p in itertools.permutations(range(5)) if parity(p) == 0]
    for word, products in zip(words, found, strict=True):
        where = list(range(5))  # where each of five things is
        for element, product in zip(word, products, strict=True):
            where = [elements[element][place] for place in where]
            assert elements[product] == tuple(where)


def test_prefix_sums_are_the_parities_of_all_prefixes():
    examples = make_task(tiny("prefix")).draw(0, 3, 7, 11)
    bits, answers = np.asarray(examples.inputs), np.asarray(examples.targets)
    assert {0, 1} == set(np.unique(bits))
    for row, answer in zip(bits, answers, strict=True):
        assert [sum(row[: i + 1]) % 2 for i in range(11)] == answer.tolist()
    assert bool(jnp.all(examples.asked))


def test_only_the_first_node_of_a_chain_is_told_the_label():
    examples = make_task(tiny("chains")).draw(0, 0, 16, 9)
    inputs, targets = np.asarray(examples.inputs), np.asarray(examples.targets)
    np.testing.assert_array_equal(inputs[:, 0, 0], 2 * targets[:, -1] - 1)
    assert not np.any(inputs[:, 1:])
    assert np.asarray(examples.asked).sum(axis=1).tolist() == [1] * 16
    assert bool(jnp.all(examples.asked[:, -1]))


def brute_force_solutions(puzzle):
    """Backtracking, without the list of all grids."""
    empty = [i for i, digit in enumerate(puzzle) if digit == 0]
    if not empty:
        return 1
    at = empty[0]
    row, column = divmod(at, 4)
    box = [4 * (row // 2 * 2 + i) + column // 2 * 2 + j for i in (0, 1) for j in (0, 1)]
    peers = {4 * row + j for j in range(4)} | {4 * i + column for i in range(4)}
    used = {puzzle[i] for i in peers | set(box)}
    fill = lambda digit: [*puzzle[:at], digit, *puzzle[at + 1 :]]
    return sum(brute_force_solutions(fill(d)) for d in range(1, 5) if d not in used)


def test_all_grids_are_there():
    grids = solved_grids()
    assert len(np.unique(grids, axis=0)) == 288 == brute_force_solutions([0] * 16)
    assert all(brute_force_solutions(grid) == 1 for grid in grids[:8].tolist())


def test_puzzles_have_one_solution_and_no_clue_to_spare():
    train, held_out = split_grids()
    assert not set(map(tuple, train)) & set(map(tuple, held_out))
    assert len(train) + len(held_out) == 288
    puzzles, solutions = draw_puzzles(held_out, 12, np.random.default_rng(0))
    assert set(map(tuple, solutions)) <= set(map(tuple, held_out))
    for puzzle, solution in zip(puzzles.tolist(), solutions.tolist(), strict=True):
        clues = [i for i in range(16) if puzzle[i]]
        assert all(puzzle[i] == solution[i] for i in clues)
        assert 4 <= len(clues) <= 8
        assert brute_force_solutions(puzzle) == 1
        for i in clues:
            fewer = [*puzzle[:i], 0, *puzzle[i + 1 :]]
            more = brute_force_solutions(fewer)
            assert more > 1
            assert count_solutions(np.array([fewer]))[0] == more


@pytest.mark.parametrize("name", TASKS)
def test_batches_depend_on_seed_and_number_alone(name):
    task = make_task(tiny(name))
    first, again = Batches(task, 0)[5], Batches(make_task(tiny(name)), 0)[5]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    others = (Batches(task, 0)[6], Batches(task, 1)[5], task.test(task.lengths[0]))
    for other in others:
        size = min(len(other.inputs), len(first.inputs))
        assert bool(jnp.any(other.inputs[:size] != first.inputs[:size]))


def test_an_example_is_solved_if_every_asked_position_is_right():
    logits = jax.nn.one_hot(jnp.array([[1, 0, 1], [1, 1, 0]]), 2)
    targets = jnp.array([[1, 0, 0], [1, 1, 1]])
    weights = jnp.array([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    found = share_right(logits, targets, weights)
    assert float(found[0]) == 1.0
    np.testing.assert_allclose(found[1], 2 / 3, rtol=1e-6)


# --- the four ways --------------------------------------------------------------------


def gradient_of(task, model):
    params, static = eqx.partition(model, deqjax.nn.trainable(model))
    examples = task.draw(0, 0, 4, task.lengths[0])
    loss = lambda p: loss_fn(eqx.combine(p, static), examples, jr.key(0))[0]
    return jax.jit(jax.grad(loss))(params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chains", "prefix", "sudoku"])
def test_the_exact_way_has_the_gradient_of_backpropagation(name):
    task = make_task(tiny(name))
    config = task.config
    model = eqx.filter_jit(build)(task.model, config, "exact", jr.key(1))
    # Backpropagation through all steps is a truncation that leaves nothing out.
    everything = tiny(name, last=config.steps)
    full = Looped(model.model, everything, "last-k")
    exact, want = (ravel_pytree(gradient_of(task, m))[0] for m in (model, full))
    assert float(jnp.linalg.norm(exact - want)) < 1e-4 * float(jnp.linalg.norm(want))


@pytest.mark.slow
def test_truncated_gradients_tell_the_embedding_of_a_long_chain_nothing():
    task = make_task(tiny("chains", length=12, steps=12, last=4))
    for way, reaches in (("one-step", False), ("last-k", False), ("exact", True)):
        model = eqx.filter_jit(build)(task.model, task.config, way, jr.key(0))
        gradient = gradient_of(task, model).model.embed.weight
        assert bool(jnp.any(gradient != 0)) is reaches
    model = eqx.filter_jit(build)(task.model, task.config, "stack", jr.key(0))
    assert bool(jnp.any(gradient_of(task, model).model.embed.weight != 0))


def test_a_stack_has_a_cell_for_every_evaluation():
    task = make_task(tiny("prefix"))
    make = lambda way: build(task.model, task.config, way, jr.key(0))
    loop = eqx.filter_eval_shape(make, "exact")
    stack = eqx.filter_jit(make)("stack")
    assert isinstance(stack, Stack)
    count = deqjax.nn.count_parameters
    cell = count(loop.model.cell)
    assert count(stack) - count(loop) == (2 * task.config.steps - 1) * cell
    weights = stack.cell.gate.weight
    assert weights.shape[0] == 2 * task.config.steps
    assert bool(jnp.all(jnp.any(weights[1:] != weights[:-1], axis=(1, 2))))


def test_costs_are_those_of_counted_evaluations():
    config = tiny("prefix", last=2)
    costs = {way: cost_of_update(config, way) for way in WAYS}
    assert costs == {"one-step": 8 + 3, "last-k": 8 + 4 + 12, "exact": 32, "stack": 32}
    config = tiny("prefix", last=2, equal="evaluations", updates=10)
    updates = {way: updates_of(config, way) for way in WAYS}
    assert updates == {"one-step": 30, "last-k": 14, "exact": 10, "stack": 10}


# --- the program ----------------------------------------------------------------------


def options(task, output, *more):
    given = TINY_OPTIONS if task != "sudoku" else TINY_OPTIONS[4:]
    return [task, "--output", str(output), *given, *more]


def losses_of(directory):
    rows = training.read_metrics(directory / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_run_writes_results_figure_and_table(name, tmp_path, capsys):
    output = tmp_path / "out"
    assert program.main(options(name, output, "--updates", "3")) == 0
    results = json.loads((output / "results.json").read_text())
    assert [t["way"] for t in results["trainings"]] == list(WAYS)
    for trained in results["trainings"]:
        assert trained["updates"] == 3
        assert np.isfinite(trained["loss"])
        assert trained["skipped_updates"] == 0
        for found in trained["tests"]:
            assert 0 <= found["exact_match"] <= found["accuracy"] <= 1
            if trained["way"] != "stack":
                assert found["residual"] >= 0
                assert sum(found["verdicts"].values()) == 8
                assert found["exact_match_at"][-1] == found["exact_match"]
    assert (output / "figure.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(title in printed for title in ("exact, all steps", "residual"))
    before = (output / "results.json").read_text()
    assert program.main(options(name, output, "--updates", "3", "--resume")) == 0
    assert json.loads((output / "results.json").read_text()) == json.loads(before)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path):
    more = ("--updates", "400", "--ways", "exact", "--save-every", "5")
    assert program.main(options("prefix", tmp_path / "whole", *more)) == 0
    argv = options("prefix", tmp_path / "cut", *more)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.reasoning", *argv],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = tmp_path / "cut" / "exact-0" / "checkpoints"
    deadline = time.monotonic() + 120
    complete = lambda: (
        checkpoints.exists() and any(p.name.isdigit() for p in checkpoints.iterdir())
    )
    while not complete() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert not (tmp_path / "cut" / "exact-0" / "result.json").exists()
    assert program.main([*argv, "--resume"]) == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert losses_of(whole / "exact-0") == losses_of(cut / "exact-0")
    tests = lambda d: json.loads((d / "results.json").read_text())["trainings"][0]
    assert tests(whole)["tests"] == tests(cut)["tests"]


def refused(capsys, argv):
    try:
        code = program.main(argv)
    except SystemExit as end:
        code = end.code
    message = capsys.readouterr().err
    assert code == 2
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("task", "more", "named"),
    [
        ("mazes", (), "TASK"),
        ("prefix", ("--steps", "3"), "--steps"),
        ("prefix", ("--beta", "1.5"), "--beta"),
        ("prefix", ("--lr", "nan"), "--lr"),
        ("prefix", ("--ways", "exact", "magic"), "--ways"),
        ("prefix", ("--last", "99"), "--last"),
        ("prefix", ("--group", "A5"), "--group"),
        ("groups", ("--group", "S4"), "--group"),
        ("sudoku", ("--ask", "last"), "--ask"),
        ("sudoku", ("--length", "9"), "--length"),
        ("chains", ("--preset", "published"), "--preset"),
    ],
)
def test_a_wrong_choice_is_named(capsys, tmp_path, task, more, named):
    output = tmp_path / "out"
    assert named in refused(capsys, [task, "--output", str(output), *more])
    assert not output.exists()


def test_output_that_cannot_be_used_is_refused(capsys, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    argv = lambda name: ["prefix", "--output", str(tmp_path / name)]
    assert "never overwritten" in refused(capsys, argv("full"))
    assert "no writable directory" in refused(capsys, argv("full/thesis.tex/x"))
    (tmp_path / "run").mkdir()
    config = make_config("prefix", "small", {"width": 8})
    text = json.dumps(config.to_json())
    (tmp_path / "run" / "config.json").write_text(text)
    assert "--resume" in refused(capsys, argv("run"))
    message = refused(capsys, [*argv("run"), "--resume"])
    assert "width = 8" in message
    assert "32" in message


def test_presets_are_whole():
    for task in TASKS:
        assert make_config(task, "small", {}).task == task
    with pytest.raises(UsageError, match="no preset published"):
        make_config("sudoku", "published", {})
