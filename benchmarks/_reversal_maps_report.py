"""The measurements of `reversal_maps.py` as Markdown."""

from typing import Any

from ._solver_report import _grid, _names, _rows, footer


def number(value: float | None) -> str:
    """Short, a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.1e}" if value and not 0.01 <= value < 10 else f"{value:.2g}"


def largest(rows: list[dict[str, Any]], key: str) -> float | None:
    """Of all rows that have been measured."""
    found = [row[key] for row in rows if row.get(key) is not None]
    return max(found, default=None)


def wide(row: dict[str, Any]) -> bool:
    """Whether a state is of 32 bits at least, and so is what f computes."""
    narrow = {"bfloat16", "float16"} & set(row["dtypes"])
    return not narrow and row["kind"] != "narrow"


def maps(results: dict[str, Any]) -> list[str]:
    """A line for each kind of map."""
    head = ["map", "solves", "failed", "largest drift", "largest repair"]
    head += ["gradient error", "of backpropagation", "16 bits", "of backpropagation"]
    body = []
    for kind in [*_names(results["maps"], "kind"), "all"]:
        rows = results["maps"]
        mine = rows if kind == "all" else _rows(rows, kind=kind)
        failed = sum(row["failure"] is not None for row in mine)
        ends = [number(largest(mine, key)) for key in ("drift", "repair")]
        for chosen in (True, False):
            some = [row for row in mine if wide(row) == chosen]
            ends += [number(largest(some, k)) for k in ("error", "backpropagation")]
        body.append([kind, str(len(mine)), str(failed), *ends])
    return _grid(head, body)


def mixed(results: dict[str, Any]) -> list[str]:
    """Kinds of scales down, proportions across."""
    rows = results["mixed"]
    scales = _names(rows, "s")
    head = ["map", "where", "β", *(f"{s:.0e} : 1" for s in scales)]
    head += ["of backpropagation", "largest drift", "largest repair"]
    body = []
    for row in rows:
        if row["s"] != scales[0]:
            continue
        mine = _rows(rows, **{k: row[k] for k in ("map", "where", "β")})
        ends = [number(r.get("error")) for r in mine]
        ends += [
            number(largest(mine, k)) for k in ("backpropagation", "drift", "repair")
        ]
        body.append([row["map"], row["where"], str(row["β"]), *ends])
    return _grid(head, body)


def noise(results: dict[str, Any]) -> list[str]:
    """A line for each map and dtype, largest repair and error by size of the noise."""
    rows = results["noise"]
    sizes = [(r, u) for r in _names(rows, "relative") for u in _names(rows, "ulps")]
    head = ["map", "dtype", "β"]
    head += [f"{u} ulp of the {r}: drift, repair, error" for r, u in sizes]
    body = []
    for row in rows:
        if (row["relative"], row["ulps"]) != sizes[0]:
            continue
        name = {k: row[k] for k in ("map", "dtype", "beta")}
        cells = []
        for relative, ulps in sizes:
            (one,) = _rows(rows, **name, relative=relative, ulps=ulps)
            keys = ("drift", "repair", "error")
            cells.append(", ".join(number(one.get(key)) for key in keys))
        body.append([*map(str, name.values()), *cells])
    return _grid(head, body)


def table(results: dict[str, Any]) -> str:
    """All parts measured, between the marks that the documentation includes them by."""
    parts = {"maps": maps, "mixed": mixed, "noise": noise}
    found = {name: make(results) for name, make in parts.items() if name in results}
    found["measured"] = [footer(results)]
    return "\n".join(
        f"<!-- --8<-- [start:{name}] -->\n{text}\n<!-- --8<-- [end:{name}] -->\n"
        for name, lines in found.items()
        for text in ["\n".join(lines).rstrip()]
    )
