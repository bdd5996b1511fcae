"""Reversible gradients of random maps are those of backpropagation."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    _reversal_cases as cases,
    _reversal_maps_report as report,
    _reversal_measures as measures,
    _reversal_scales as scales,
    reversal_maps,
)

pytestmark = pytest.mark.optimised

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("reversal_maps-*.json"))
# Small maps that compile fast: (kind, number).
FEW = (("affine", 1), ("elementwise", 3), ("dense", 1), ("scalar", 0), ("norm", 1))


@pytest.fixture(autouse=True)
def wide():
    """The reference is of 64 bits."""
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(True):
        yield


def check(rows):
    """Right in every row, by the numbers themselves."""
    assert rows
    for row in rows:
        assert row["failure"] is None, row
        assert row["drift"] == 0, row
        assert row["repair"] < 0.5, row
        allowed = max(2 * row.get("backpropagation", 0), row["allowed"])
        assert row["error"] <= allowed, row


@pytest.mark.parametrize(("kind", "number"), FEW)
def test_a_random_map(kind, number):
    check(measures.measure(cases.case(0, kind, number), 2))


# What is asked of all maps and not reached by these; they fail as soon as it is.
GAPS = {
    ("sort", 2): "bfloat16, β = 0.9: a repair of 0.70",
    ("spectral", 0): "float16: the solve does not converge, and is not compared",
    ("centred", 1): "a fixed point next to 0 of terms of order one: drift, visibly",
    ("centred", 2): "likewise, β = 0.9: a repair of 0.67",
}


def many() -> list:
    marks = lambda case: [pytest.mark.xfail(reason=GAPS[case])] if case in GAPS else []
    drawn = [(kind, number) for kind in cases.MAPS for number in range(3)]
    return [pytest.param(*case, marks=marks(case)) for case in drawn]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), many())
def test_many_random_maps(kind, number):
    check(measures.measure(cases.case(1, kind, number), 2))


def test_two_leaves_of_different_scales():
    check(list(scales.Mixed("tanh", "two leaves", 0.5).rows(0)))


@pytest.mark.slow
@pytest.mark.parametrize("case", scales.mixed(), ids=str)
def test_mixed_scales(case):
    check(list(case.rows(0)))


def test_disturbed_evaluations():
    rows = list(scales.Noisy("tanh", "float32", 0.5).rows(0))
    check([row for row in rows if row["relative"] == "entry"])


@pytest.mark.slow
@pytest.mark.parametrize("case", scales.noisy(), ids=str)
def test_disturbed_evaluations_are_repaired_or_noticed(case):
    for row in case.rows(0):
        assert "silently" not in (row["failure"] or ""), row


# The harness itself


def test_every_choice_occurs():
    drawn = [cases.case(0, kind, i) for kind in cases.MAPS for i in range(10)]
    assert {c.call for c in drawn} == {
        *("plain", "jit", "vmap", "scan", "checkpoint", "mesh")
    }
    assert {c.beta for c in drawn} == {"number", "traced", "channel", "entry"}
    dtypes = {dtype for c in drawn for dtype in c.states}
    assert dtypes == {"float32", "float64", "bfloat16", "float16"}
    assert {len(shape) for c in drawn for shape in c.shapes} == {0, 1, 2, 3, 4}
    assert {1, 100} <= {c.steps for c in drawn if not c.tested}
    assert {c.tested for c in drawn} == {False, True}
    assert {c.batch_ndim for c in drawn} == {0, 1}
    assert max(len(c.shapes) for c in drawn) >= 3


def test_a_case_is_the_same_whenever_it_is_drawn():
    one, two = (cases.case(3, "dense", 2) for _ in range(2))
    assert one.text == two.text
    for a, b in zip(*(jax.tree.leaves(c.draw(1)) for c in (one, two)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_reference_is_the_gradient_of_the_steps():
    # z₁ = (1 − β) z₀ + β (k y₁ + x) with y₁ = (1 − β) z₀ + β (k z₀ + x).
    k, beta, x, start, c = 0.7, 0.3, 0.2, 0.5, 2.0
    method = measures.backpropagation(lambda z, a: a[1] * z + a[0], math.nan, 1)
    gradient = measures.gradient(method, ours=False, jit=True)
    numbers = (jnp.array(t) for t in (start, x, k, beta))
    got, _ = gradient(*numbers, None, jnp.array(c))
    y = (1 - beta) * start + beta * (k * start + x)
    dy_dbeta = k * start + x - start
    want = (
        c * ((1 - beta) + beta * k * (1 - beta + beta * k)),
        c * (beta + beta * k * beta),
        c * beta * (y + k * beta * start),
        c * (k * y + x - start + beta * k * dy_dbeta),
    )
    np.testing.assert_allclose(got, want, rtol=1e-14)


def test_a_wrong_gradient_fails(monkeypatch):
    """A solver that forgets a part of the gradient, and one that raises."""

    def forgetful(fn, number, steps, **_):
        inner = measures.backpropagation(fn, number, steps)

        def method(z0, x, w, beta, probe):
            z, _ = inner(jax.lax.stop_gradient(z0), x, w, beta, None)
            return z, (jnp.array(steps), jnp.array(True))

        return method

    def broken(*_, **__):
        def method(*_):
            raise ValueError("`beta` is refused\nand more")

        return method

    case = cases.case(0, "scalar", 0)._replace(call="jit", steps=2, tested=False)
    case = case._replace(beta="number", states=["float32"], computed=["float32"])
    monkeypatch.setattr(measures, "reversal", forgetful)
    (row,) = measures.measure(case, 1)
    assert row["failure"].startswith("silently, gradient error")
    monkeypatch.setattr(measures, "reversal", broken)
    (row,) = measures.measure(case, 1)
    assert row["failure"] == "ValueError: `beta` is refused"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"repair": math.nan}, None),
        ({"drift": 3.0}, "drift 3.0e+00"),
        ({"drift": math.nan}, "drift nan"),
        ({"repair": 0.5}, "repair 0.50"),
        ({"error": 3e-6}, "silently, gradient error 3.0e-06 > 2.0e-06"),
        ({"error": math.nan}, "silently, gradient error nan > 2.0e-06"),
    ],
)
def test_what_fails(changed, reason):
    right = {"drift": 0.0, "repair": 0.1, "error": 1e-7, "allowed": 2e-6}
    assert measures.judge(right | changed) == reason


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_nothing_failed_when_it_was_recorded(path):
    results = json.loads(path.read_text())
    for part in ("maps", "mixed"):
        assert [row for row in results[part] if row["failure"] is not None] == []
    assert {row["kind"] for row in results["maps"]} == set(cases.MAPS)
    assert len(results["mixed"]) == len(scales.mixed()) * len(scales.SCALES)
    for row in results["noise"]:
        assert "silently" not in (row["failure"] or ""), row


def test_the_table_of_the_documentation_is_the_one_recorded():
    path = ROOT / "benchmarks/results/reversal_maps-cpu.json"
    if path not in RESULTS:
        pytest.skip("not recorded yet")
    table = (ROOT / "docs/reversal-maps-table.md").read_text()
    assert table == report.table(json.loads(path.read_text()))


def test_the_program_runs(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    argv = ["reversal_maps.py", "--maps", "--only", "scalar", "--pick", "1"]
    monkeypatch.setattr("sys.argv", [*argv, "--draws", "1", "--out", str(path)])
    monkeypatch.setenv("XLA_FLAGS", "")
    status = reversal_maps.main()
    (row,) = json.loads(path.read_text())["maps"]
    assert status == int(row["failure"] is not None)
    assert f"maps: {status} of 1 failed" in capsys.readouterr().out
