"""The comparison of gradients runs, and the documentation says what was recorded."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _gradient_report as report, gradients

pytestmark = pytest.mark.optimised

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("gradients-*.json"))


@pytest.fixture(scope="module", params=RESULTS, ids=lambda p: p.stem)
def recorded(request):
    return json.loads(request.param.read_text())


def check_schema(results):
    """Every gradient on every layer, and the cost of those that are not dense."""
    assert results["versions"]["jax"]
    assert results["commit"]
    keys = [(r["gradient"], r["spectrum"], r["radius"]) for r in results["bias"]]
    assert len(set(keys)) == len(keys)
    names, spectra, radii = (set(column) for column in zip(*keys, strict=True))
    assert spectra == {"symmetric", "random"}
    assert radii == set(gradients.RADII)
    assert len(keys) == len(names) * len(spectra) * len(radii)
    for row in results["bias"]:
        assert 0 <= row["angle"] <= 180
        if row["library"] == "deqjax":
            assert row["error of z"] < report.FOUND, row
        assert row["pull-backs"] is None or row["pull-backs"] >= 1
        if row["exact"]:
            slack = 1 if row["library"] == "deqjax" else 10
            assert row["error"] <= slack * 1e-6, row
    costly = {row["gradient"] for row in results["cost"]}
    assert costly == names - {"optimistix Implicit"}
    for row in results["cost"]:
        assert row["ratio"] > 0
        assert row["copies"] > 0
        assert row["compile, s"] > 0


def test_there_are_records():
    assert RESULTS


def test_every_record_is_whole(recorded):
    check_schema(recorded)
    own = {r["gradient"] for r in recorded["bias"] if r["library"] == "deqjax"}
    field = gradients.gradients().items()
    assert own == {name for name, e in field if e.library == "deqjax"}


def of(results, name, spectrum, radius):
    (row,) = [
        r
        for r in results["bias"]
        if (r["gradient"], r["spectrum"], r["radius"]) == (name, spectrum, radius)
    ]
    return row


@pytest.mark.parametrize("spectrum", ["symmetric", "random"])
def test_the_advice_of_the_documentation_holds(recorded, spectrum):
    row = lambda name, radius: of(recorded, name, spectrum, radius)
    for name in ("JFB", "Neumann(5)", "Phantom(5, β = 0.5)", "Unrolled, last 5"):
        found = [row(name, radius) for radius in gradients.RADII]
        for key in ("angle", "error"):
            values = [r[key] for r in found]
            assert values == sorted(values), (name, key)
        norms = [r["norm"] for r in found]
        assert norms[-1] < norms[0] < 1.1
    for radius in gradients.RADII:
        series, last = (row(k, radius) for k in ("Neumann(5)", "Unrolled, last 5"))
        assert last["error"] == pytest.approx(series["error"], rel=1e-6)
        assert series["error"] < row("JFB", radius)["error"]
        assert row("Implicit, GMRES(1e-2)", radius)["error"] < 0.1
        # One product for the parameters, and those of the approximate inverse.
        assert [row(k, radius)["pull-backs"] for k in ("JFB", "Shine")] == [1, 1]
        assert series["pull-backs"] == 5
        assert row("Phantom(5, β = 0.5)", radius)["pull-backs"] == 5
    assert row("Neumann(5)", 0.5)["error"] < 0.05
    assert row("Neumann(5)", 0.99)["error"] > 0.2
    assert row("Shine", 0.99)["error"] > 0.5
    slow = [row(f"Implicit{k}", 0.99)["pull-backs"] for k in (", Neumann", "")]
    assert slow[0] > 5 * slow[1]


def test_the_tables_of_the_documentation_are_the_ones_recorded():
    results = json.loads((ROOT / "benchmarks/results/gradients-cpu.json").read_text())
    assert (ROOT / "docs/gradients-table.md").read_text() == report.table(results)


def test_the_layers_are_what_they_are_called_and_the_reference_is_their_gradient():
    size = 6
    weights = np.random.default_rng(1).normal(size=size)
    for (name, radius), (args, star) in gradients.layers(3, size).items():
        np.testing.assert_allclose(np.tanh(args[0] @ star + args[1]), star, atol=1e-14)
        jacobian = (1 - star**2)[:, None] * args[0]
        moduli = abs(np.linalg.eigvals(jacobian))
        assert moduli.max() == pytest.approx(radius, rel=1e-9)
        assert (name == "symmetric") == np.allclose(args[0], args[0].T)

        def value(b, w=args[0], z=star):
            for _ in range(20):  # Newton's method
                f = np.tanh(w @ z + b)
                z = z - np.linalg.solve((1 - f**2)[:, None] * w - np.eye(size), f - z)
            return float(weights @ z + 0.5 * z @ z)

        step = 1e-6 * np.eye(size)
        slopes = [(value(args[1] + e) - value(args[1] - e)) / 2e-6 for e in step]
        got = gradients.exact(args, star, weights)[-size:]
        np.testing.assert_allclose(got, slopes, rtol=1e-4, atol=1e-5)


def test_angles_and_norms_are_those_of_the_plane():
    found = gradients.compare(np.array([0.0, 3.0]), np.array([1.5, 0.0]))
    assert found["angle"] == pytest.approx(90)
    assert found["norm"] == pytest.approx(2)
    assert found["error"] == pytest.approx(5**0.5)


def test_pull_backs_are_counted_as_they_run():
    fn, count = gradients.counted(lambda z, a: a * z)
    pull = jax.jit(lambda x: jax.vjp(lambda z: fn(fn(z, 2.0), 3.0), x)[1](x)[0])
    np.testing.assert_allclose(jax.block_until_ready(pull(jnp.ones(2))), 6.0)
    assert count[0] == 2


def test_a_tiny_run_is_whole(tmp_path):
    arguments = ["--size", "12", "--transformer", "1", "4", "8", "--steps", "2"]
    arguments += ["--runs", "1", "--only", "JFB"]
    arguments += ["--out", str(tmp_path / "gradients.json")]
    options = gradients.command_line().parse_args(arguments)
    with jax.numpy_dtype_promotion("standard"):
        results = gradients.run(options)
    check_schema(results)
    assert of(results, "JFB", "random", 0.5)["pull-backs"] == 1
    assert "| JFB |" in report.table(results)
