"""The program for accelerators runs on the CPU, and reports what is wrong."""

import json
import math
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from benchmarks import _reversal_measures as measures
from benchmarks._reversal_costs import CELLS
from benchmarks.accelerators import (
    _cases as cases,
    _checks as checks,
    _gradients as gradients,
    _language_model as language_model,
    _programs as programs,
    _session as session,
    compile as ahead,
    run,
)
from deqjax.models import RevDEQLM

pytestmark = pytest.mark.optimised


@pytest.fixture(autouse=True)
def promotion():
    """As users have it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def check(name="tanh", dtype="float32", **changes):
    """A check of two solves."""
    case = cases.RECIPES[name].case(dtype, **changes)
    return cases.Check(name, case, betas=(0.5, 0.8), steps=(4,))


def section_of(tmp_path, seconds=60.0):
    """A section that ends after so many seconds."""
    record = session.Record(tmp_path / "results.json", {"device": "test"})
    now = time.monotonic()
    return session.Section("test", record, now, now + seconds)


# Checks


def test_a_right_gradient_passes():
    made = check()
    rows = checks.measure(made, checks.prepare(made))
    assert [(row["β"], row["steps"]) for row in rows] == [(0.5, 4), (0.8, 4)]
    for row in rows:
        assert row["failure"] is None, row
        assert row["drift"] == 0
        assert row["error"] <= 2e-6


def test_a_static_solve_passes():
    case = cases.RECIPES["tanh"].case("float32", beta="number", number=0.7, steps=3)
    made = cases.Check("tanh", case, (0.7,), (3,))
    (row,) = checks.measure(made, checks.prepare(made))
    assert row["failure"] is None, row
    assert row["error"] <= 2e-6


def test_a_wrong_gradient_fails(monkeypatch):
    """One that leaves out what the weights do in the last evaluation but one."""

    def forgetful(fn, number, steps, options=None, **_):
        def method(z0, x, w, beta, probe):
            y = z = z0
            for i in range(steps):
                frozen = jax.lax.stop_gradient(w) if i == 1 else w
                y = (1 - beta) * y + beta * fn(z, (x, frozen))
                z = (1 - beta) * z + beta * fn(y, (x, w))
            return z, None

        return method

    monkeypatch.setattr(measures, "reversal", forgetful)
    made = check()
    for row in checks.measure(made, checks.prepare(made)):
        assert row["failure"].startswith("silently, gradient error")
    assert checks.verdict([row]).startswith("FAIL, 1 of 1: silently")


def test_a_drift_fails(monkeypatch):
    """f is another one in every evaluation, by far more than a repair can mend."""
    noise = np.random.default_rng(0)

    def draw():
        return np.float32(noise.uniform(-0.1, 0.1))

    def drifting(self, z, args):
        value = jax.pure_callback(draw, jax.ShapeDtypeStruct((), jnp.float32))
        # Dependent on z, so that it is not taken out of the loop.
        moved = jax.lax.stop_gradient(value + 0 * jnp.sum(z))
        return jnp.tanh(z @ args[1][0][0] + args[0]) + moved

    monkeypatch.setattr(cases.random_cases.Case, "fn", drifting)
    made = check()
    for row in checks.measure(made, checks.prepare(made)):
        assert row["drift"] > 0
        assert row["failure"].startswith("drift ")


def test_whatever_raises_is_a_failure(tmp_path, monkeypatch):
    def broken(made):
        if "relu" in made.name:
            raise ValueError("planted\nand more")
        return

    monkeypatch.setattr(checks, "prepare", broken)
    monkeypatch.setattr(checks, "measure", lambda *_: [])
    section = section_of(tmp_path)
    section.record.results["sections"]["checks"] = {"rows": section.rows}
    whole = session.Session(section.record, "cpu", False, math.inf, 2, ("relu, float",))
    checks.run(whole, section)
    (row,) = [row for row in section.rows if "failure" in row]
    assert row == {"case": "relu, float32", "failure": "ValueError: planted"}
    assert section.record.failures == ["relu, float32: ValueError: planted"]
    assert run.status(section.record, ("checks",)) == 1


def test_the_maps_are_those_that_were_asked_for():
    made = cases.checks()
    assert 40 <= len(made) <= 60
    assert len({c.name for c in made}) == len(made)
    texts = {c.name: c.case.text for c in made}
    for name, part in (
        ("transformer block, float32", "causal > layer norm over 64 > perceptron"),
        ("convolution by channel, float32", "by channel"),
        ("sort, float32", "[sort 64]"),
        ("bf16 product, float32", "in bfloat16"),
        ("cumulative sum, float32", "cumsum 64]"),
        ("scan in f, bfloat16", "inner scan"),
    ):
        assert part in texts[name]
    assert {d for c in made for d in c.case.states} == {
        *("float32", "bfloat16", "float16", "float64")
    }
    assert {c.betas for c in made if c.static} == {(0.5,), (0.8,), (0.95,)}
    assert {c.steps for c in made if c.static} == {(8,), (16,), (32,)}
    assert set(cases.QUICK) <= set(texts)
    with pytest.raises(ValueError, match="`name` must fit a piece of kind 'sort'"):
        cases.piece("sort", "no such piece", (8, 64))


# Programs and time


def test_jobs_run_at_once_and_tell_their_exceptions():
    meet = threading.Barrier(2, timeout=10)

    def broken():
        meet.wait()
        raise RuntimeError("planted")

    done = dict(programs.at_once({"a": meet.wait, "b": broken}, 2, 20))
    assert done["a"] in (0, 1)
    assert str(done["b"]) == "planted"


def test_jobs_that_do_not_fit_are_told(tmp_path):
    jobs = {"slow": lambda: time.sleep(1), "never": lambda: 1}
    done = dict(programs.at_once(jobs, 1, 0.1))
    assert all(isinstance(d, session.OutOfTime) for d in done.values())
    section = section_of(tmp_path, 0.1)
    assert programs.compile_all(jobs, 1, section) == {}
    saved = json.loads(section.record.path.read_text())
    assert saved["device"] == "test"
    assert [row["case"] for row in section.rows] == ["slow", "never"]
    assert all("no time left" in row["skipped"] for row in section.rows)


def test_times_are_of_one_call():
    runs = {"long": lambda: time.sleep(0.02), "short": lambda: time.sleep(0.0005)}
    found = programs.in_turns(runs, 0.1, 3, 5)
    assert 0.02 <= np.median(found["long"]) < 0.03
    assert 0.0005 <= np.median(found["short"]) < 0.002
    assert 3 <= len(found["long"]) == len(found["short"]) <= 5
    summary = programs.summary(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert summary == {"median": 3e3, "quartiles": [2e3, 4e3], "samples": 5}


def test_the_time_is_shared_among_the_sections_that_are_run():
    weights = {"a": 40.0, "b": 25.0, "c": 35.0}
    assert session.shares(["a", "b", "c"], weights) == {
        "a": 0.4,
        "b": pytest.approx(25 / 60),
        "c": 1.0,
    }
    assert session.shares(["b"], weights) == {"b": 1.0}


def test_json_has_no_numbers_that_are_not_finite():
    row = {"a": math.nan, "b": [np.float32(1.5), math.inf], 3: (np.int64(2), "x")}
    assert session.tidy(row) == {"a": None, "b": [1.5, None], "3": [2, "x"]}


def test_a_section_that_raises_does_not_end_the_run(tmp_path, capsys):
    record = session.Record(tmp_path / "results.json", {})
    whole = session.Session(record, "cpu", True, time.monotonic() + 10, 1)

    def broken(whole, section):
        section.add({"case": "first"})
        raise RuntimeError("planted")

    whole.run("checks", 0.5, broken)
    saved = json.loads(record.path.read_text())["sections"]["checks"]
    assert saved["rows"] == [{"case": "first"}]
    assert saved["status"] == "RuntimeError: planted"


# What is timed


def test_operations_are_those_of_the_matrices():
    key = jax.random.key(0)
    model = RevDEQLM(32, 8, 2, hidden=16, max_length=4, key=key)
    # q, k, v; the attention's q, k, v and output; 8 → 16 → 16 → 8.
    block = 2 * (7 * 8 * 8 + 8 * 16 + 16 * 16 + 16 * 8) * 4 + 4 * 4 * 4 * 8
    head = 2 * 8 * 32 * 4
    useful, executed = language_model.operations(model, 3, 5)
    assert useful == 3 * (3 * 10 * block + 3 * head)
    assert executed == 3 * (4 * 10 * block + 3 * head)


def test_gradients_are_those_of_the_methods():
    """Of z = z/2 + a, whose N Picard steps from 0 are a (2 − 2^(1 − N))."""
    from benchmarks._reversal_costs import Cell

    cell = Cell(lambda z, a: 0.5 * z + a, jnp.ones((2,)), (2,))
    n = gradients.STEPS
    exact = 2 - 2.0 ** (1 - n)
    want = {
        "implicit, GMRES to 1e-2": 2.0,
        "Neumann, 5 terms": 2 - 2.0**-4,
        "JFB": 1.0,
        "unrolled": exact,
        "checkpointed": exact,
    }
    for name, value in want.items():
        grads, _ = gradients.gradient(cell, gradients.METHODS[name], n)(cell.args)
        np.testing.assert_allclose(grads, value, rtol=2e-2)
    pair = [
        gradients.gradient(cell, gradients.METHODS[name], n)(cell.args)[0]
        for name in ("reversible", "unrolled, reversible steps")
    ]
    np.testing.assert_allclose(*pair, rtol=1e-6)
    ct = gradients.pull_backs(cell, 3)(cell.args)
    np.testing.assert_allclose(ct, 0.125, rtol=1e-6)


# Ahead of time


def test_kernels_of_a_loop_are_counted():
    text = """HloModule jit_run

%inner (p: f32[2]) -> f32[2] {
  ROOT %p = f32[2]{0} parameter(0)
}

%body (c: (s32[], f32[2])) -> (s32[], f32[2]) {
  %c = (s32[], f32[2]{0}) parameter(0)
  %z = f32[2]{0} get-tuple-element(%c), index=1
  %f = f32[2]{0} fusion(%z), kind=kLoop, calls=%inner
  %g = (f32[2]{0}, s8[0]{0}) custom-call(%f), custom_call_target="xla_python_callback"
  ROOT %t = (s32[], f32[2]{0}) tuple(%z, %f)
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %w = (s32[], f32[2]{0}) while(%a), condition=%inner, body=%body
  ROOT %r = f32[2]{0} copy(%a)
}
"""
    assert ahead.loops(text) == [ahead.Loop(kernels=2, host=1)]


def test_a_program_that_fails_is_told(monkeypatch, capsys):
    def refuse(target):
        raise RuntimeError(f"no compiler for {target}")

    monkeypatch.setattr(ahead, "device", refuse)
    assert ahead.main(["--target", "h100"]) == 1
    assert "no compiler for h100" in capsys.readouterr().out


def test_a_step_that_takes_too_much_memory_is_told(monkeypatch):
    """Here for the CPU; a limit of a quarter of a state stands for a larger record."""
    here = jax.devices()[0]
    cell = ahead.cells("float32", ["MLP"])["MLP"]
    found = ahead.examine(here, cell, None)
    assert found.wrong == []
    assert found.slope == pytest.approx(0.5, abs=0.05)
    monkeypatch.setattr(ahead, "MOST", 0.25)
    again = ahead.examine(here, cell, None)
    expected = f"{found.slope:.3f} copies of the state per step, at most 0.25"
    assert again.wrong == [expected]


def test_what_a_program_is_like_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "device", lambda target: jax.devices()[0])
    monkeypatch.setattr(
        ahead, "SOLVERS", {"Picard": deqjax.Picard(None, None), "broken": "Picard"}
    )
    path = tmp_path / "found.json"
    path.write_text('{"programs": {"another": {}}}')
    arguments = ["--target", "h100", "--dtypes", "float32", "--cells", "MLP"]
    arguments += ["--output", str(path)]
    monkeypatch.setattr(ahead, "cells", lambda dtype, only: {"MLP": CELLS["MLP"]()})
    monkeypatch.setattr(ahead, "examine", lambda *_: ahead.Finding([7], []))
    assert ahead.main(arguments) == 1  # the broken one
    programs = json.loads(path.read_text())["programs"]
    assert "another" in programs
    assert programs["h100, MLP, float32, Picard"]["wrong"] == []
    assert len(programs["h100, MLP, float32, Picard"]["kernels"]) == 1
    assert programs["h100, MLP, float32, broken"]["wrong"] != []
    assert programs["h100, MLP, float32, gradient, static"]["kernels"] == [7]


# The whole


def test_a_run_of_one_check_is_whole(tmp_path, capsys):
    argv = ["--output", str(tmp_path), "--only", "checks", "--minutes", "5"]
    status = run.main([*argv, "--cases", "tanh, float32, β and N static"])
    results = json.loads((tmp_path / "results.json").read_text())
    (row,) = results["sections"]["checks"]["rows"]
    assert status == 0
    assert row["failure"] is None
    assert (row["β"], row["steps"]) == (0.8, 32)
    assert results["sections"]["checks"]["status"] == "done"
    assert results["versions"]["jax"] == jax.__version__
    assert results["device"] == jax.devices()[0].device_kind
    text = (tmp_path / "report.md").read_text()
    assert "| float32 | 1 | 0 | 0 |" in text
    assert "No check failed." in text
    assert text in capsys.readouterr().out


@pytest.mark.slow
def test_a_quick_run_is_whole(tmp_path):
    # Everywhere: programs are traced in threads of their own.
    strict = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    try:
        check_quick_run(tmp_path)
    finally:
        jax.config.update("jax_numpy_dtype_promotion", strict)


def check_quick_run(tmp_path):
    status = run.main(["--output", str(tmp_path), "--quick", "--minutes", "15"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["sections"]) == list(run.SECTIONS)
    rows = {name: s["rows"] for name, s in results["sections"].items()}
    assert all(s["status"] == "done" for s in results["sections"].values())
    assert not [r for s in rows.values() for r in s if "reason" in r or "skipped" in r]
    # In bfloat16 with β = 0.95 repairs take more than half of the capacity.
    failed = [row["case"] for row in rows["checks"] if row["failure"] is not None]
    assert status == bool(failed)
    assert [case for case in failed if "float32" in case] == []
    steps = [row for row in rows["training"] if "tokens per second" in row]
    assert [row["drift"] for row in steps] == [0, 0]
    assert {row["case"].split(": ")[-1] for row in rows["gradients"]} >= {
        *gradients.METHODS
    }
    by_name = {row["case"].split(": ")[-1]: row for row in rows["solvers"]}
    assert by_name["Reversible, static"]["evaluations"] == 32
    assert by_name["Picard, static"]["evaluations"] == 16


@pytest.mark.parametrize("text", ["0", "nan", "soon"])
def test_a_time_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit) as exit_:
        run.command_line().parse_args(["--output", "x", "--minutes", text])
    assert exit_.value.code == 2
    assert "a number of minutes from 0.5 to 1440" in capsys.readouterr().err
