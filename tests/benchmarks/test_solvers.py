"""The comparison of solvers runs, and the documentation says what was recorded."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest

from benchmarks import (
    _solver_entrants as entrants,
    _solver_maps as maps,
    _solver_measures as measures,
    _solver_report as report,
    solvers,
)

pytestmark = pytest.mark.optimised

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("solvers-*.json"))


@pytest.fixture(scope="module", params=RESULTS, ids=lambda p: p.stem)
def recorded(request):
    return json.loads(request.param.read_text())


def check_schema(results):
    """Every solver on every map, each either with its numbers or with a reason."""
    assert results["versions"]["jax"]
    assert results["commit"]
    for row in results["overhead"]:
        assert row["ratio"] > 0
        assert row["evaluations"] >= 1
        assert row["compile, s"] > 0
        assert row["temp bytes"] >= 0
    pairs = [(r["map"], r["solver"], r["rtol"]) for r in results["work"]]
    assert len(set(pairs)) == len(pairs)
    names, labels, tolerances = (set(column) for column in zip(*pairs, strict=True))
    assert len(pairs) == len(names) * len(labels) * len(tolerances)
    assert {row["map"] for row in results["maps"]} == names
    for row in results["work"]:
        if row["failed"]:
            assert row["failed"] in ("no convergence", "not finite")
            assert row["evaluations"] is None
            continue
        assert 1 <= row["evaluations"] < results["limit"]
        assert row["milliseconds"] > 0
        slack = 1 if row["library"] == "deqjax" else measures.SLACK
        assert row["relative residual"] <= slack * row["rtol"] * (1 + 1e-6), row


def test_there_are_records():
    assert RESULTS


def test_every_record_is_whole(recorded):
    check_schema(recorded)
    assert {row["map"] for row in recorded["work"]} == set(maps.characters(0, 8))
    own = [r["solver"] for r in recorded["overhead"] if r["library"] == "deqjax"]
    want = [k for k, e in entrants.for_overhead().items() if e.library == "deqjax"]
    assert own == 2 * want


def evaluations(results, name, solver, rtol=1e-6):
    (row,) = [
        r
        for r in results["work"]
        if (r["map"], r["solver"], r["rtol"]) == (name, solver, rtol)
    ]
    return row["evaluations"] or math.inf


def test_the_advice_of_the_documentation_holds(recorded):
    of = lambda *which: evaluations(recorded, *which)
    for name in ("radius 0.9", "radius 0.99"):
        assert of(name, "Anderson(5)") < of(name, "Picard") / 2
        assert of(name, "Anderson(5)") <= of(name, "jaxopt Anderson(5)")
        assert of(name, "NewtonKrylov") <= of(name, "Anderson(5)")
        assert of(name, "Reversible, β = 0.5") > of(name, "Picard")
    assert of("not contractive", "Picard") == math.inf
    assert of("not contractive", "Picard, β = 0.4") < math.inf
    assert of("not contractive", "Anderson(5)") < math.inf
    assert of("stiff", "NewtonKrylov") < math.inf
    assert of("normalised", "Anderson(5)") < of("normalised", "Picard") / 2
    # Vectors turned by all angles: a memory of few steps knows nothing of the next.
    assert of("complex spectrum", "Anderson(5)") >= of("complex spectrum", "Picard") / 2


def test_only_a_batch_taken_apart_solves_every_problem(recorded):
    worst = {
        (row["solver"], row["batch_ndim"]): max(row["relative residuals"])
        for row in recorded["batches"]
    }
    for solver in ("Picard", "Anderson"):
        assert worst[solver, 0] > measures.TOLERANCES[0]
        assert worst[solver, 1] <= measures.TOLERANCES[0] * (1 + 1e-6)


def test_the_tables_of_the_documentation_are_the_ones_recorded():
    results = json.loads((ROOT / "benchmarks/results/solvers-cpu.json").read_text())
    assert (ROOT / "docs/solvers-table.md").read_text() == report.table(results)


def test_the_maps_are_what_they_are_called():
    with jax.enable_x64(True):
        problems = maps.characters(seed=3, size=8)
        problem = problems["radius 0.99"]
        found = maps.spectrum(problem, problem.args[1])
        assert found["spectral radius"] == pytest.approx(0.99, rel=1e-9)
        assert found["norm"] == pytest.approx(0.99, rel=1e-9)
        moduli = {
            name: abs(np.linalg.eigvals(problems[name].args[0]))
            for name in ("complex spectrum", "non-normal", "not contractive")
        }
    np.testing.assert_allclose(moduli["complex spectrum"], 0.95, rtol=1e-9)
    assert moduli["non-normal"].max() < 0.8
    assert moduli["not contractive"].max() == pytest.approx(3, rel=1e-9)


def test_a_tiny_run_is_whole(tmp_path):
    options = solvers.command_line().parse_args(
        [
            *("--mlp", "2", "8", "--transformer", "1", "4", "8"),
            *("--size", "8", "--steps", "2", "2", "--runs", "2", "2", "--limit", "200"),
            *("--only", "Picard", "--parts", "overhead", "work"),
            *("--maps", "MLP", "radius 0.5", "not contractive"),
            *("--out", str(tmp_path / "solvers.json")),
        ]
    )
    with jax.numpy_dtype_promotion("standard"):
        results = solvers.run(options)
    check_schema(results)
    assert [row["evaluations"] for row in results["overhead"]] == [2]
    # z_n − z* = A (z_{n−1} − z*) nearly: as many steps as the radius asks for.
    count = evaluations(results, "radius 0.5", "Picard")
    assert count == pytest.approx(math.log(1e6) / math.log(2), abs=3)
    assert evaluations(results, "not contractive", "Picard") == math.inf
    assert "| Picard |" in "\n".join(report.work(results, 1e-6))
