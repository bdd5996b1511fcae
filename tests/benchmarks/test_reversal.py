"""What the documentation says of exact reversal is what was recorded."""

import json
import pathlib

import jax
import pytest

from benchmarks import reversal, reversal_training

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("reversal-*.json"))
GRADIENTS = [path for path in RESULTS if "training" not in path.name]
TRAININGS = [path for path in RESULTS if "training" in path.name]


def test_there_are_records():
    assert GRADIENTS
    assert TRAININGS


@pytest.mark.parametrize("path", GRADIENTS, ids=lambda p: p.stem)
def test_exact_gradients_were_at_the_level_of_float32(path):
    results = json.loads(path.read_text())
    rows = results["errors"]
    assert len(rows) == len(reversal.MAPS) * len(reversal.BETAS) * len(reversal.STEPS)
    for row in rows:
        assert row["exact"] <= max(2e-6, 2 * row["backpropagation"]), row
        assert row["drift, exact"] == 0, row
    for row in results["memory"]:
        # log2(10) = 3.3 bits per entry and evaluation at most, of 32.
        assert row["exact"] <= 2 * 3.6 / 32 * 1.3
        assert row["float"] <= 0.01


@pytest.mark.parametrize("path", TRAININGS, ids=lambda p: p.stem)
def test_training_was_as_good_as_by_backpropagation(path):
    for case in json.loads(path.read_text())["cases"]:
        assert case["worst ratio of errors"] <= 2, case
        distance = case["distance of losses, last bit"]
        assert case["distance of losses, reversal"] <= 3 * distance, case


def test_the_table_of_the_documentation_is_the_one_recorded():
    results = json.loads((ROOT / "benchmarks/results/reversal-cpu.json").read_text())
    assert (ROOT / "docs/reversal-table.md").read_text() == reversal.table(results)


def test_a_training_follows_backpropagation():
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(True):
        case = reversal_training.case(beta=0.8, steps=9, seed=1, updates=2)
    assert case["worst ratio of errors"] <= 2
    assert case["distance of losses, reversal"] <= 1e-5
