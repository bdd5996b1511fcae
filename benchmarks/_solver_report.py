"""The measurements of `solvers.py` as Markdown and as a figure."""

import pathlib
from typing import Any

import matplotlib.pyplot as plt


def _rows(rows: list[dict[str, Any]], **chosen: Any) -> list[dict[str, Any]]:
    return [r for r in rows if all(r[k] == v for k, v in chosen.items())]


def _names(rows: list[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _grid(head: list[str], body: list[list[str]]) -> list[str]:
    line = lambda cells: f"| {' | '.join(cells)} |"
    return [line(head), "|" + "---|" * len(head), *map(line, body), ""]


def cell(row: dict[str, Any]) -> str:
    """Evaluations, and products where there are any; a dash for a failure."""
    if row["failed"]:
        return "–"
    products = f" + {row['products']}" if row["products"] else ""
    return f"{row['evaluations']}{products}"


def maps(results: dict[str, Any]) -> list[str]:
    """What the maps are like."""
    head = ["map", "", "shape", "spectral radius", "largest real part", "norm of J"]
    body = [
        [
            row["map"],
            row["note"],
            "×".join(map(str, row["shape"])),
            *(
                f"{row[k]:.3g}"
                for k in ("spectral radius", "largest real part", "norm")
            ),
        ]
        for row in results["maps"]
    ]
    return _grid(head, body)


def work(results: dict[str, Any], rtol: float) -> list[str]:
    """Solvers down, maps across."""
    rows = _rows(results["work"], rtol=rtol)
    names = _names(rows, "map")
    body = [
        [solver, *(cell(*_rows(rows, solver=solver, map=name)) for name in names)]
        for solver in _names(rows, "solver")
    ]
    return _grid([f"to {rtol:.0e}", *names], body)


def times(results: dict[str, Any], rtol: float) -> list[str]:
    """As `work`, in milliseconds."""
    rows = _rows(results["work"], rtol=rtol)
    names = _names(rows, "map")
    show = lambda row: "–" if row["failed"] else f"{row['milliseconds']:.2g}"
    body = [
        [solver, *(show(*_rows(rows, solver=solver, map=name)) for name in names)]
        for solver in _names(rows, "solver")
    ]
    return _grid([f"ms to {rtol:.0e}", *names], body)


def overhead(results: dict[str, Any]) -> list[str]:
    """Ratios to the bare loop; compile seconds; temporary memory."""
    rows = results["overhead"]
    names = _names(rows, "map")
    head = ["solver"]
    head += [f"{name}: time / loop" for name in names]
    head += [f"{name}: compile, s" for name in names]
    head += [f"{name}: extra memory, copies of z" for name in names]
    body = []
    for solver in _names(rows, "solver"):
        mine = [_rows(rows, solver=solver, map=name)[0] for name in names]
        body.append(
            [
                solver,
                *(f"{row['ratio']:.2f}" for row in mine),
                *(f"{row['compile, s']:.2f}" for row in mine),
                *(f"{row['extra copies']:.1f}" for row in mine),
            ]
        )
    return _grid(head, body)


def choices(results: dict[str, Any]) -> list[str]:
    """Evaluations by history and by β."""
    rows = results["choices"]
    names = _names(rows, "map")
    body = []
    for solver in _names(rows, "solver"):
        for choice in _names(_rows(rows, solver=solver), "choice"):
            mine = _rows(rows, solver=solver, choice=choice)
            for value in _names(mine, "value"):
                found = [_rows(mine, value=value, map=n)[0] for n in names]
                counts = [str(row["evaluations"] or "–") for row in found]
                symbol = "β" if choice == "beta" else choice
                body.append([f"{solver}, {symbol} = {value}", *counts])
    return _grid(["to 1e-06", *names], body)


def batches(results: dict[str, Any]) -> list[str]:
    """The evaluations of a batch, and the worst residual in it."""
    head = ["solver", "`batch_ndim`", "evaluations", "largest relative residual"]
    body = [
        [
            row["solver"],
            str(row["batch_ndim"]),
            str(row["evaluations"]),
            f"{max(row['relative residuals']):.1e}",
        ]
        for row in results["batches"]
    ]
    return _grid(head, body)


def sections(results: dict[str, Any]) -> dict[str, str]:
    """Every table by name, to be included one by one."""
    found = {
        "maps": maps(results),
        "work": work(results, 1e-3) + work(results, 1e-6),
        "times": times(results, 1e-6),
        "overhead": overhead(results),
        "choices": choices(results),
        "batches": batches(results),
        "measured": [footer(results)],
    }
    return {name: "\n".join(lines).rstrip() + "\n" for name, lines in found.items()}


def footer(results: dict[str, Any]) -> str:
    """On what it was measured."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items() if v)
    text = (
        f"Measured on {results['device']}, commit {results['commit']}, seed "
        f"{results['seed']}: {versions}."
    )
    parts = [part for part in results.values() if isinstance(part, list)]
    rows = [row for part in parts for row in part if isinstance(row, dict)]
    # Rows that were measured again alone say so.
    later = {row["commit"]: row for row in rows if "commit" in row}
    for commit, row in later.items():
        name = row.get("solver", row.get("gradient"))
        text += (
            f" `{name}` was measured again at commit {commit}, on a busier machine: "
            "its ratios and memory compare with the others', its seconds do not."
        )
    return text


def table(results: dict[str, Any]) -> str:
    """All sections, between the marks that the documentation includes them by."""
    parts = [
        f"<!-- --8<-- [start:{name}] -->\n{text}<!-- --8<-- [end:{name}] -->\n"
        for name, text in sections(results).items()
    ]
    return "\n".join(parts)


def figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Evaluations on the maps, and cost beside f."""
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.6), width_ratios=(3, 2), layout="constrained"
    )
    rows = _rows(results["work"], rtol=1e-6)
    names = _names(rows, "map")
    limit = 1.5 * max(
        r["evaluations"] + (r["products"] or 0) for r in rows if not r["failed"]
    )
    shown = {
        "Picard": "o",
        "Reversible, β = 0.5": "v",
        "Anderson(5)": "s",
        "Broyden(10)": "D",
        "NewtonKrylov": "^",
        "jaxopt Anderson(5)": "+",
        "banax Anderson(5)": "x",
        "banax Broyden(10)": "1",
    }
    for i, (solver, marker) in enumerate(shown.items()):
        mine = _rows(rows, solver=solver)
        cost = [
            limit if r["failed"] else r["evaluations"] + (r["products"] or 0)
            for r in mine
        ]
        at = [names.index(r["map"]) + 0.08 * (i - 3.5) for r in mine]
        left.semilogy(at, cost, marker, label=solver, color=f"C{i}", alpha=0.85)
    left.axhline(limit, color="0.7", lw=0.8, zorder=0)
    left.text(-0.4, limit * 1.08, "failed", color="0.4", fontsize=8)
    left.set_xticks(range(len(names)), names, rotation=35, ha="right")
    left.set_ylabel("evaluations of f (+ products with J)")
    left.set_title("to a relative residual of 1e-6")
    fig.legend(
        *left.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=8
    )
    left.grid(alpha=0.3)

    solvers = _names(results["overhead"], "solver")
    kinds = _names(results["overhead"], "map")
    for i, kind in enumerate(kinds):
        mine = _rows(results["overhead"], map=kind)
        at = [j + 0.38 * (i - 0.5) for j in range(len(mine))]
        right.barh(at, [row["ratio"] for row in mine], 0.36, label=kind)
    right.axvline(1, color="k", lw=0.8)
    right.set_yticks(range(len(solvers)), solvers, fontsize=7)
    right.invert_yaxis()
    right.set_xlabel("time / bare loop of as many evaluations")
    right.set_xlim(0, min(right.get_xlim()[1], 4))
    right.legend(fontsize=7)
    fig.savefig(path, dpi=130)
    plt.close(fig)
