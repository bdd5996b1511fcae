"""The measurements of `gradients.py` as Markdown and as a figure."""

import pathlib
from typing import Any

import matplotlib.pyplot as plt

from ._solver_report import _grid, _names, _rows, footer

FOUND = 1e-6  # The relative error of z* at which a gradient there can be judged.


def cell(row: dict[str, Any]) -> str:
    """Angle and norm, or the error alone where both would say nothing.

    A dash where the forward solve did not find z*.
    """
    if not row["error of z"] < FOUND:
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
    head = ["gradient", "forward, ms", "time / forward"]
    head += ["memory of the forward, copies of z", "memory with gradient, copies of z"]
    head += ["compile, s"]
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
    """Error over the radius, time, and memory."""
    fig, (left, *bars) = plt.subplots(
        1, 3, figsize=(13, 4.8), width_ratios=(4, 3, 3), layout="constrained"
    )
    rows = _rows(results["bias"], spectrum="symmetric", library="deqjax")
    for i, name in enumerate(_names(rows, "gradient")):
        mine = _rows(rows, gradient=name)
        at = [str(row["radius"]) for row in mine]
        style = f"C{i % 10}" + ("o-" if i < 10 else "s--")
        left.semilogy(at, [row["error"] for row in mine], style, label=name)
    left.set_xlabel("spectral radius of a symmetric layer")
    left.set_title("relative error of the gradient")
    left.grid(alpha=0.3)
    fig.legend(
        *left.get_legend_handles_labels(), loc="outside lower left", ncols=6, fontsize=8
    )
    names = _names(results["cost"], "gradient")
    colours = ["C0" if r["library"] == "deqjax" else "0.6" for r in results["cost"]]
    titles = {"ratio": "time / forward solve", "copies": "memory, copies of z"}
    for axes, (key, title) in zip(bars, titles.items(), strict=True):
        lengths = [row[key] or 0 for row in results["cost"]]
        axes.barh(range(len(names)), lengths, color=colours)
        axes.set_yticks(
            range(len(names)), names if key == "ratio" else [""] * len(names)
        )
        axes.tick_params(axis="y", labelsize=7)
        axes.invert_yaxis()
        axes.set_title(title)
        axes.grid(alpha=0.3, axis="x")
    fig.savefig(path, dpi=130)
    plt.close(fig)
