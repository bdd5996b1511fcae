"""What all reports share: tables, as text and in notebooks, and lazy figures."""

import abc
import html
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import numpy as np


class Table(NamedTuple):
    """A title, the heads of the columns, rows of cells, and sentences below."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = ()


class AbstractReport(eqx.Module):
    """Numbers that print as a table."""

    @abc.abstractmethod
    def table(self) -> Table:
        """The table that `print` and notebooks show."""

    @abc.abstractmethod
    def plot(self, ax: Any = None) -> Any:
        """Draw the report into matplotlib axes, and return them."""

    def __str__(self):
        return as_text(self.table())

    def __repr__(self):
        return str(self)

    def _repr_html_(self) -> str:
        return _as_html(self.table())


def show(value: Any) -> str:
    """A cell: numbers with 4 digits, "–" for what is not known."""
    if isinstance(value, str):
        return value
    if value is None:
        return "–"
    value = np.asarray(value)[()]
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:d}"
    if isinstance(value, complex | np.complexfloating):
        if np.isnan(value):
            return "–"
        sign = "+" if value.imag >= 0 else "-"
        if value.imag == 0:
            return f"{value.real:.4g}"
        return f"{value.real:.4g} {sign} {abs(value.imag):.4g}i"
    return "–" if np.isnan(value) else f"{value:.4g}"


def seconds(value: Any) -> str:
    """A time with its unit."""
    value = float(value)
    if np.isnan(value):
        return "–"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def octets(value: Any) -> str:
    """An amount of memory with its unit."""
    value = float(value)
    if np.isnan(value):
        return "–"
    for unit, size in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def as_text(table: Table) -> str:
    cells = [list(map(show, row)) for row in (table.head, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join([table.title, *lines, *table.notes])


def _as_html(table: Table) -> str:
    row = lambda tag, cells: (
        "<tr>" + "".join(f"<{tag}>{html.escape(show(c))}</{tag}>" for c in cells)
    )
    body = "".join(row("td", cells) + "</tr>" for cells in table.rows)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in table.notes)
    return (
        f"<p><b>{html.escape(table.title)}</b></p><table><thead>"
        f"{row('th', table.head)}</tr></thead><tbody>{body}</tbody></table>{notes}"
    )


def problem_names(batch: tuple[int, ...]) -> list[str]:
    """What the problems of a batch are called in a table; "" for a single one."""
    return [",".join(map(str, i)) for i in np.ndindex(*batch)]


def axes(ax: Any, figsize: tuple[float, float] = (5.0, 3.5)) -> Any:
    """The axes given, or those of a new figure."""
    if ax is not None:
        return ax
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError(
            "Figures need matplotlib, which is not installed: "
            "`pip install deqjax[examples]`."
        ) from error
    return pyplot.subplots(figsize=figsize, layout="constrained")[1]


def bars(ax: Any, names: Sequence[str], values: Any, label: str) -> Any:
    """One horizontal bar per name on a logarithmic axis, labelled with its value."""
    ax = axes(ax)
    values = np.asarray(values, np.float64)
    shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    places = np.arange(len(names))
    ax.barh(places, np.nan_to_num(shown), color="tab:blue")
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.set_xlabel(label)
    if np.any(np.isfinite(shown)):
        low, high = np.nanmin(shown), np.nanmax(shown)
        ax.set_xscale("log")
        ax.set_xlim(low / 3, high * 8)
        for place, value in zip(places, shown, strict=True):
            if np.isfinite(value):
                ax.text(value * 1.1, place, f"{value:.2g}", va="center")
    return ax
