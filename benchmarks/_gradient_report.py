"""The measurements of `gradients.py` as Markdown and as a figure."""

import pathlib
from typing import Any

import matplotlib.pyplot as plt

from ._solver_report import _grid, _names, _rows, footer


def cell(row: dict[str, Any]) -> str:
    """Angle and norm, or the error alone where both would say nothing."""
    if not row["error"] < float("inf"):
        return "–"
    if row["error"] < 1e-3:
        return f"{row['error']:.0e}"
    return f"{row['angle']:.0f}°, ×{row['norm']:.2g}"


def bias(results: dict[str, Any], spectrum: str) -> list[str]:
    """Gradients down; their bias and then their pull-backs across, by radius."""
    rows = _rows(results["bias"], spectrum=spectrum)
    radii = _names(rows, "radius")
    head = [spectrum, *(f"radius {r}" for r in radii)]
    head += [f"pull-backs, {r}" for r in radii]
    body = []
    for name in _names(rows, "gradient"):
        mine = [_rows(rows, gradient=name, radius=r)[0] for r in radii]
        pulls = ["–" if m["pull-backs"] is None else str(m["pull-backs"]) for m in mine]
        body.append([name, *map(cell, mine), *pulls])
    return _grid(head, body)


def cost(results: dict[str, Any]) -> list[str]:
    """Time, memory and compile time."""
    head = [
        "gradient",
        "forward, ms",
        "time / forward",
        "memory of the forward, copies of z",
    ]
    head += ["memory with gradient, copies of z", "compile, s"]
    body = []
    for row in results["cost"]:
        copies = [row["forward copies"], row["copies"]]
        shown = ["–" if c is None else f"{c:.0f}" for c in copies]
        times = [f"{row['forward, ms']:.0f}", f"{row['ratio']:.1f}"]
        ends = [*times, *shown, f"{row['compile, s']:.1f}"]
        body.append([row["gradient"], *ends])
    return _grid(head, body)


def table(results: dict[str, Any]) -> str:
    """All sections, between the marks that the documentation includes them by."""
    found = {name: bias(results, name) for name in _names(results["bias"], "spectrum")}
    found |= {"cost": cost(results), "measured": [footer(results)]}
    parts = [
        f"<!-- --8<-- [start:{name}] -->\n{text}\n<!-- --8<-- [end:{name}] -->\n"
        for name, lines in found.items()
        for text in ["\n".join(lines).rstrip()]
    ]
    return "\n".join(parts)


def figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Error over the radius, and time and memory."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    rows = _rows(results["bias"], spectrum="symmetric", library="deqjax")
    for i, name in enumerate(_names(rows, "gradient")):
        mine = _rows(rows, gradient=name)
        at = [str(row["radius"]) for row in mine]
        style = f"C{i % 10}" + ("o-" if i < 10 else "s--")
        left.semilogy(at, [row["error"] for row in mine], style, label=name)
    left.set_xlabel("spectral radius of a symmetric layer")
    left.set_ylabel("relative error of the gradient")
    left.grid(alpha=0.3)
    left.legend(fontsize=7)
    for row in results["cost"]:
        own = row["library"] == "deqjax"
        at = (row["ratio"], row["copies"] or 0)
        right.plot(*at, "o" if own else "x", color="C0" if own else "0.5")
        beside = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 6}
        right.annotate(row["gradient"], at, **beside)
    right.set_xscale("log")
    right.set_xlabel("time of value and gradient / forward solve")
    right.set_ylabel("temporary memory, copies of z")
    right.grid(alpha=0.3)
    fig.savefig(path, dpi=130)
    plt.close(fig)
