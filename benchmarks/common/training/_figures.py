"""Curves of training as a figure."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


class Curve(NamedTuple):
    """Values over steps.

    Attributes:
        label: for the legend.
        steps: one per value.
        values: one per step.
        faint: whether it is smoothed and drawn in the background.
    """

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    faint: bool = False


@contextlib.contextmanager
def use_style() -> Iterator[None]:
    """The style of all figures of training."""
    from matplotlib import rc_context

    style: Any = _STYLE
    with rc_context(style):
        yield


def draw_curves(
    panels: Mapping[str, Sequence[Curve]], title: str, path: Path | str
) -> None:
    """Write a PNG with one panel of curves beside the other.

    Args:
        panels: curves by the title of their panel.
        title: of the figure.
        path: of the file to write.
    """
    from matplotlib.figure import Figure

    with use_style():
        figure = Figure(figsize=(5.5 * len(panels), 4), dpi=150, layout="constrained")
        axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (name, curves) in zip(axes, panels.items(), strict=True):
            for curve in curves:
                steps, values = np.array(curve.steps), np.array(curve.values, float)
                if curve.faint:
                    values = _smooth(values)
                style = {"alpha": 0.5, "linewidth": 1} if curve.faint else {}
                marker = "o" if not curve.faint and len(steps) < 40 else None
                ax.plot(steps, values, label=curve.label, marker=marker, ms=3, **style)
            ax.set(title=name, xlabel="step")
            ax.legend()
        figure.suptitle(title, fontsize=12, fontweight="bold")
        figure.savefig(path)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a fiftieth of the curve, shorter at its start."""
    width = max(len(values) // 50, 1)
    total = np.cumsum(np.insert(np.nan_to_num(values), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - width, 0)
    return (total[ends] - total[begins]) / (ends - begins)
