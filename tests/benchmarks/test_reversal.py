"""What the documentation says of exact reversal is what was recorded."""

import itertools
import json
import pathlib

import jax
import pytest

from benchmarks import _reversal_report, reversal, reversal_training
from deqjax.solvers import _remainders

pytestmark = pytest.mark.optimised

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("reversal-*.json"))
GRADIENTS = [path for path in RESULTS if "training" not in path.name]
TRAININGS = [path for path in RESULTS if "training" in path.name]


def test_there_are_records():
    assert GRADIENTS
    assert TRAININGS


@pytest.mark.parametrize("path", GRADIENTS, ids=lambda p: p.stem)
def test_exact_gradients_were_at_the_level_of_float32(path):
    rows = json.loads(path.read_text())["errors"]
    assert len(rows) == len(reversal.MAPS) * len(reversal.BETAS) * len(reversal.STEPS)
    for row in rows:
        for method in ("8 bits", "16 bits"):
            assert row[method] <= max(2e-6, 2 * row["backpropagation"]), row
            assert row[f"drift, {method}"] == 0, row
            assert row[f"repair, {method}"] < 0.5, row
        if row["beta"] == 0.5:
            assert row["drift, 4 bits"] == 0, row


@pytest.mark.parametrize("path", GRADIENTS, ids=lambda p: p.stem)
def test_without_a_record_deep_gradients_were_wrong(path):
    for row in json.loads(path.read_text())["errors"]:
        if row["beta"] >= 0.8 and row["steps"] >= 16:
            assert not row["no record"] <= 1e-3, row


@pytest.mark.parametrize("path", GRADIENTS, ids=lambda p: p.stem)
def test_a_step_cost_its_record_in_memory(path):
    for row in json.loads(path.read_text())["memory"]:
        for bits in (4, 8, 16):
            # Two half steps; besides, two bytes for each row of the state.
            want = 2 * bits / 32
            assert want <= row[f"{bits} bits"] <= want + 0.01
        assert row["states"] == pytest.approx(2, abs=0.01)
        assert row["activations"] > 8


@pytest.mark.parametrize("path", GRADIENTS, ids=lambda p: p.stem)
def test_more_bits_tolerated_more(path):
    rows = json.loads(path.read_text())["tolerance"]
    for beta in reversal.BETAS:
        most = {}
        for bits in (8, 16):
            mine = [r for r in rows if (r["bits"], r["beta"]) == (bits, beta)]
            assert len(mine) == len(reversal.NOISES)
            sound = itertools.takewhile(lambda r: r["drift"] == 0, mine)
            most[bits] = max(row["noise"] for row in sound)
            # Noise above the capacity is noticed.
            assert mine[-1]["drift"] > 0
        assert most[16] >= 16 * most[8]


def test_units_are_those_of_the_library():
    for bits, beta in itertools.product((4, 8, 16), reversal.BETAS):
        shared, own = _reversal_report.units(bits, beta)
        for unit, is_shared in ((shared, True), (own, False)):
            want = _remainders._unit(24, 24, beta, unit.modulus, is_shared)
            assert unit.size == 2.0**want


@pytest.mark.parametrize("path", TRAININGS, ids=lambda p: p.stem)
def test_training_was_as_good_as_by_backpropagation(path):
    for case in json.loads(path.read_text())["cases"]:
        assert case["worst ratio of errors"] <= 2, case
        distance = case["distance of losses, last bit"]
        assert case["distance of losses, reversal"] <= 3 * distance, case


def test_the_table_of_the_documentation_is_the_one_recorded():
    results = json.loads((ROOT / "benchmarks/results/reversal-cpu.json").read_text())
    table = _reversal_report.table(results)
    assert (ROOT / "docs/reversal-table.md").read_text() == table


def test_a_training_follows_backpropagation():
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(True):
        case = reversal_training.case(beta=0.8, steps=9, seed=1, updates=2)
    assert case["worst ratio of errors"] <= 2
    assert case["distance of losses, reversal"] <= 1e-5
