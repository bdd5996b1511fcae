"""The results of a run as short tables in Markdown."""

from collections.abc import Callable
from typing import Any

from .._reversal_maps_report import largest, number
from .._solver_report import _grid

Rows = list[dict[str, Any]]


def checks(rows: Rows) -> list[str]:
    """The worst of each dtype, and every failure."""
    measured = [row for row in rows if "dtype" in row]
    head = ["states", "solves", "failed", "largest drift", "largest repair"]
    head += ["gradient error", "of backpropagation"]
    body = []
    for dtype in dict.fromkeys(row["dtype"] for row in measured):
        mine = [row for row in measured if row["dtype"] == dtype]
        failed = sum(row["failure"] is not None for row in mine)
        keys = ("drift", "repair", "error", "backpropagation")
        worst = [number(largest(mine, key)) for key in keys]
        body.append([dtype, str(len(mine)), str(failed), *worst])
    return _grid(head, body)


def training(rows: Rows) -> list[str]:
    """A line for each step, after the rates of matrix products."""
    rates = [row for row in rows if row["case"].startswith("matrix")]
    lines = _grid(
        ["matrix products", "Tflop/s"],
        [[row["case"], _middle(row, "Tflop/s")] for row in rates],
    )
    head = ["training step", "ms", "tokens / s", "Tflop/s", "share of the matrix rate"]
    head += ["share, executed", "× its parts", "temporary GiB", "drift", "repair"]
    body = []
    for row in rows:
        if "tokens per second" not in row:
            continue
        line = [row["case"], _middle(row, "ms"), f"{row['tokens per second']:,.0f}"]
        keys = ("model operations, Tflop/s", "model operations, share")
        keys += ("executed operations, share", "ratio to its parts")
        line += [_short(row.get(key)) for key in keys]
        line.append(_short(row["temp bytes"], 2**-30))
        body.append([*line, *(_short(row.get(key)) for key in ("drift", "repair"))])
    lines += _grid(head, body)
    head = ["against float64", "drift", "repair", "error", "of backpropagation", ""]
    keys = ("drift", "repair", "error", "backpropagation")
    body = [
        [
            row["case"],
            *(number(row[key]) for key in keys),
            "PASS" if row["failure"] is None else f"FAIL: {row['failure']}",
        ]
        for row in rows
        if row["case"].startswith("gradient") and "failure" in row
    ]
    return [*lines, *_grid(head, body)] if body else lines


def gradients(rows: Rows) -> list[str]:
    """Times, then memory by depth."""
    timed = [row for row in rows if "ms" in row]
    body = [
        [row["case"], _middle(row, "ms"), _middle(row, "ratio"),
         _short(row["temp bytes"], 2**-20), f"{row['compile, s']:.1f}"]
        for row in timed
    ]  # fmt: skip
    head = ["gradient", "ms", "× its parts", "temporary MiB", "compile, s"]
    lines = _grid(head, body)
    held = [row for row in rows if row["case"].startswith("memory")]
    depths = list(dict.fromkeys(n for row in held for n in row.get("temp bytes", {})))
    head = ["temporary MiB", *(f"{n} steps" for n in depths), "z per step"]
    body = [
        [row["case"], *(_short(row["temp bytes"].get(n), 2**-20) for n in depths),
         _short(row.get("copies of z per step"))]
        for row in held if "temp bytes" in row
    ]  # fmt: skip
    return [*lines, *_grid(head, body)]


def solvers(rows: Rows) -> list[str]:
    """A line for each solver and cell."""
    head = ["solver", "steps", "evaluations + products", "ms", "× the bare loop"]
    head += ["µs per step beyond it", "compile, s"]
    body = [
        [row["case"], str(row["steps"]), f"{row['evaluations']} + {row['products']}",
         _middle(row, "solver, ms"), _middle(row, "ratio"),
         _short(row["per step beyond the loop, µs"]), f"{row['compile, s']:.1f}"]
        for row in rows if "ratio" in row
    ]  # fmt: skip
    return _grid(head, body)


TABLES: dict[str, Callable[[Rows], list[str]]] = {
    "checks": checks,
    # Recorded with JAX_DEFAULT_MATMUL_PRECISION=highest.
    "checks-full-precision": checks,
    "training": training,
    "gradients": gradients,
    "solvers": solvers,
}


def _short(value: float | None, scale: float = 1.0) -> str:
    return "–" if value is None else f"{value * scale:.3g}"


def _middle(row: dict[str, Any], key: str) -> str:
    """A median, with half the distance of the quartiles."""
    if key not in row:
        return "–"
    low, high = row[key]["quartiles"]
    return f"{row[key]['median']:.3g} ± {(high - low) / 2:.1g}"


def report(results: dict[str, Any], failures: list[str]) -> str:
    """All sections, what failed, and what was left out."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items() if v)
    lines = ["# deqjax on " + results["device"], ""]
    lines += [f"{results['date']}, commit {results['commit']}, {versions}.", ""]
    for name, section in results["sections"].items():
        rows = section["rows"]
        lines += [f"## {name}", "", f"{section['status']}.", ""]
        lines += TABLES[name](rows)
        missing = [row for row in rows if "skipped" in row or "reason" in row]
        for row in missing:
            lines.append(f"- {row['case']}: {row.get('skipped') or row['reason']}")
        lines += [""] * bool(missing)
    lines += [f"- FAIL {line}" for line in failures] or ["No check failed."]
    return "\n".join(lines) + "\n"
