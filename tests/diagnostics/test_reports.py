"""Reports as text, in notebooks and as figures, and solutions in words."""

import importlib

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx
import pytest

import deqjax
from deqjax import diagnostics
from tests import helpers

mpl.use("agg")


def report(cls, **changes):
    """A report of known numbers, without a solve."""
    two, batch = jnp.array([0.5, 2e-3]), jnp.array([0.5])
    flags = jnp.array([True, False])
    fields = {
        "Spectrum": {
            "eigenvalues": jnp.array([0.3 + 0.4j, 0.3 - 0.4j]),
            "residual": two,
            "error": two,
            "converged": flags,
            "spectral_radius": jnp.array(0.5),
            "num_products": jnp.array(7),
        },
        "SingularValues": {
            **dict.fromkeys(("jacobian", "largest", "smallest", "condition"), batch),
            "residual": jnp.full((1, 3), 1e-6),
            "converged": jnp.ones((1, 3), bool),
            "num_products": jnp.array(7),
        },
        "ContractionReport": {
            **dict.fromkeys(
                ("spectral_radius", "norm", "lipschitz", "radius", "residual"), batch
            ),
            "rate_known": flags[:1],
            "norm_known": flags[:1],
            "steps": 14 * jnp.ones(1),
            "steps_bound": jnp.array([jnp.inf]),
            "reduction": jnp.array(1e-4),
        },
        "LipschitzReport": {
            "constant": batch,
            "quotient": batch,
            "norms": jnp.array([[0.5], [0.4]]),
            "converged": jnp.ones((2, 1), bool),
        },
        "CouplingReport": {
            "derivative": jnp.array([[1.0, 0.1], [0.0, 1.0]]),
            "changed": jnp.eye(2, dtype=bool),
            "poisoned": jnp.eye(2, dtype=bool),
        },
        "SolverReport": {
            "names": ("one", "<two>"),
            **dict.fromkeys(("num_steps", "num_evals"), jnp.array([3.0, jnp.nan])),
            **dict.fromkeys(("residual", "relative_residual", "converged"), two),
            **dict.fromkeys(("seconds", "compile_seconds"), two),
            "memory": jnp.array([2048.0, jnp.nan]),
        },
        "DepthReport": {
            "depths": jnp.array([0, 4]),
            **dict.fromkeys(("residual", "score"), jnp.array([[0.5, 1.0], [0.1, 0]])),
            "verdict": jnp.array([0, 1]),
            "period": jnp.array([0, 3]),
            "moved": two,
            **dict.fromkeys(
                ("start_residual", "start_score", "start_distance"), jnp.eye(2)
            ),
            "tolerance": jnp.array(1e-3),
        },
        "GradientReport": {
            "names": ("one", "<two>"),
            "reference": "dense",
            "reference_residual": jnp.array(1e-8),
            "reference_norm": jnp.array(2.0),
            **dict.fromkeys(("error", "angle", "ratio", "num_products"), two),
            "converged": jnp.array([1.0, jnp.nan]),
            **dict.fromkeys(("seconds", "compile_seconds"), two),
            "memory": jnp.array([2048.0, jnp.nan]),
        },
    }[cls]
    if "num_steps" in fields:
        fields["num_steps"] = jnp.array([3.0, 4.0])
    return getattr(diagnostics, cls)(**fields | changes)


REPORTS = [
    "Spectrum",
    "SingularValues",
    "ContractionReport",
    "LipschitzReport",
    "CouplingReport",
    "DepthReport",
    "SolverReport",
    "GradientReport",
]


@pytest.mark.parametrize("cls", REPORTS)
def test_tables_are_aligned_and_safe_in_html(cls):
    text = str(report(cls))
    assert repr(report(cls)) == text
    title, head, rule, first, *_ = text.splitlines()
    assert title
    assert set(rule) == {"-", " "}
    # Columns begin where the rules do.
    starts = [i for i, c in enumerate(rule) if c == "-" and rule[i - 1 : i] != "-"]
    assert all(head[i - 1 : i] in ("", " ") for i in starts if i < len(head))
    assert len(first) <= len(rule)
    html = report(cls)._repr_html_()
    assert html.count("<tr>") == html.count("</tr>") >= 2
    assert "<two>" not in html


@pytest.mark.parametrize("cls", REPORTS)
def test_figures_have_labelled_axes(cls):
    figure, ax = plt.subplots()
    assert report(cls).plot(ax) is ax
    assert ax.get_xlabel()
    assert ax.get_ylabel() or len(ax.get_yticklabels()) == 2
    figure.canvas.draw()
    plt.close(figure)
    own = report(cls).plot()
    assert own is not ax
    plt.close(own.figure)


def test_numbers_and_units_are_readable():
    text = str(report("SolverReport"))
    assert "2 KiB" in text
    assert "500 ms" in text
    assert "2 ms" in text
    assert "–" in text
    assert "0.3 + 0.4i" in str(report("Spectrum"))
    assert "0 → 1" in str(report("CouplingReport"))


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    def missing(name, *args):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install deqjax\[examples\]"):
        report("Spectrum").plot()


def test_summary_of_one_problem():
    p = helpers.problem("tanh", 3)
    sol = deqjax.fixed_point(p.fn, p.z0, p.args)
    lines = dict(x.split(maxsplit=1) for x in deqjax.summary(sol).splitlines())
    assert lines["result"] == "successful"
    assert lines["converged"] == "yes"
    assert lines["evaluations"] == str(int(sol.stats["num_evals"]))
    assert float(lines["residual"]) == pytest.approx(
        float(sol.stats["residual"]), rel=1e-3
    )
    short = deqjax.fixed_point(p.fn, p.z0, p.args, max_steps=1)
    text = deqjax.summary(short)
    assert optx.RESULTS[short.result].split()[0] in text
    assert "converged    no" in text


def test_summary_of_a_batch():
    p = helpers.batched()
    solver = deqjax.Picard(rtol=1e-4, atol=1e-6, batch_ndim=1)
    sol = deqjax.fixed_point(p.fn, p.z0, p.args, solver=solver, max_steps=8)
    done = np.asarray(sol.stats["converged"])
    text = deqjax.summary(sol)
    assert f"{done.sum()} of 4 problems" in text
    names = "; ".join(str(i) for i in np.flatnonzero(~done))
    assert f"(not: {names})" in text
    assert f"{float(jnp.max(sol.stats['residual'])):.4g} (largest)" in text


def test_summary_refuses_what_it_cannot_read():
    def traced(a):
        sol = deqjax.fixed_point(lambda z, a: 0.5 * z + a, jnp.zeros(2), a)
        return deqjax.summary(sol)

    with pytest.raises(TypeError, match="being traced"):
        jax.jit(traced)(jnp.ones(2))


def test_backward_statistics_print_their_numbers():
    p = helpers.problem("tanh", 3)

    def loss(args, probe):
        adjoint = deqjax.ImplicitAdjoint(probe=probe)
        sol = deqjax.fixed_point(p.fn, p.z0, args, adjoint=adjoint)
        return jnp.sum(sol.value)

    stats = jax.grad(loss, argnums=1)(p.args, deqjax.BackwardStats())
    text = repr(stats)
    assert str(stats) == text
    assert "converged=1" in text
    assert "drift=nan" in text
    assert f"num_products={int(stats.num_products)}" in text
    assert "residual=[0, 0]" in repr(deqjax.BackwardStats((2,)))
    # Neither tracers nor structures nor large arrays have numbers to print.
    assert "f32[40]" in repr(deqjax.BackwardStats((40,)))
    seen = []
    jax.eval_shape(lambda s: seen.append(repr(s)), stats)
    shape = repr(jax.eval_shape(lambda s: s, stats))
    assert "residual=f32[]" in shape
    assert "residual=" in seen[0]
    assert "num_products=None" in repr(jax.tree.map(lambda _: None, stats))
