"""What `train_images.py` leaves behind: a table, a figure, a directory of files."""

import contextlib
import datetime as dt
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from rich import box
from rich.table import Table

from benchmarks._images_config import Config, UsageError
from benchmarks._images_training import Run
from benchmarks.common.training import use_style
from benchmarks.data.images import ImageData

RESULTS, FIGURE = "results.json", "figure.png"
_PACKAGES = ("deqjax", "jax", "jaxlib", "equinox", "optimistix", "lineax", "optax")


# --- the table ------------------------------------------------------------------------


def _bytes(count: int | None) -> str:
    return "not known" if count is None else f"{count / 2**20:.1f} MiB"


def _residual(value: float) -> str:
    return f"{value:.1e}" if np.isfinite(value) else "–"


def make_table(runs: Sequence[Run]) -> Table:
    """The runs side by side."""
    rows = {
        "test accuracy": lambda run: f"{run.test['accuracy']:.2%}",
        "test loss": lambda run: f"{run.test['loss']:.4f}",
        "parameters": lambda run: f"{run.parameters:,}",
        "evaluations of cells per image": lambda run: f"{run.test['evaluations']:.1f}",
        "relative residual (test mean)": lambda run: _residual(run.test["residual"]),
        "training": lambda run: f"{run.train_seconds:.1f} s",
        "compiling": lambda run: f"{run.compile_seconds:.1f} s",
        "gradient's temporary memory": lambda run: _bytes(run.temp_bytes),
    }
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for run in runs:
        table.add_column(run.title, justify="right")
    for name, show in rows.items():
        table.add_row(name, *map(show, runs))
    return table


# --- the figure -----------------------------------------------------------------------

_COLOURS = {"revdeq": "#1f5fa8", "deq": "#1f5fa8", "explicit": "#d9822b"}
_GREY, _RED = "#555555", "#c0262d"
_IMAGES, _MISTAKES = 12, 4


def draw_figure(
    runs: Sequence[Run], config: Config, data: ImageData, path: Path
) -> None:
    """Loss, accuracy, residuals, and test images with what the first run says of them.

    Args:
        runs: The model first, then the explicit network if it was trained.
        config: What the runs were made with.
        data: Where the test images come from.
        path: Of the PNG to write.
    """
    from matplotlib.figure import Figure

    with use_style():
        figure = Figure(figsize=(12, 6.4), dpi=150, layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(3.4, 1.3))
        upper, lower = parts
        has_residuals = bool(runs[0].residuals)
        axes = upper.subplots(1, 3 if has_residuals else 2)
        _draw_loss(axes[0], runs)
        _draw_accuracy(axes[1], runs)
        if has_residuals:
            _draw_residuals(axes[2], runs[0], config)
        _draw_images(lower, runs[0], data)
        figure.suptitle(_headline(runs, data), fontsize=12.5, fontweight="bold")
        figure.savefig(path)


def _headline(runs: Sequence[Run], data: ImageData) -> str:
    parts = [f"{run.title} {run.test['accuracy']:.2%}" for run in runs]
    each = " each" if len(runs) > 1 else ""
    return (
        f"{data.title}, test accuracy: {', '.join(parts)} "
        f"({runs[0].parameters:,} parameters{each})"
    )


def _epochs(run: Run) -> np.ndarray:
    return np.arange(1, len(run.history) + 1)


def _markers(run: Run) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(run.history) < 5 else {}


def _draw_loss(axes: Any, runs: Sequence[Run]) -> None:
    for run in runs:
        colour, extra = _COLOURS[run.name], _markers(run)
        test = [row["test_loss"] for row in run.history]
        training = [row["loss"] for row in run.history]
        axes.plot(_epochs(run), test, color=colour, label=f"{run.title}, test", **extra)
        axes.plot(
            _epochs(run),
            training,
            color=colour,
            alpha=0.55,
            linestyle=":",
            label=f"{run.title}, training",
            **extra,
        )
    axes.set(title="Loss (cross entropy)", xlabel="epoch", yscale="log")
    axes.legend()


def _draw_accuracy(axes: Any, runs: Sequence[Run]) -> None:
    errors = []
    for run in runs:
        error = [100 * (1 - row["test_accuracy"]) for row in run.history]
        errors += error
        axes.plot(
            _epochs(run),
            [100 - e for e in error],
            color=_COLOURS[run.name],
            label=f"{run.title}: {100 - error[-1]:.2f} % in the end",
            **_markers(run),
        )
    # The first epochs are far below: the room belongs to where the curves end.
    low = 100 - max(min(100.0, 6 * float(np.median(errors))), 2.0)
    axes.set(title="Test accuracy (%)", xlabel="epoch", ylim=(low, 100.4))
    axes.set_ylim(low, 100 + 0.02 * (100 - low))
    axes.legend(loc="lower right")


def _draw_residuals(axes: Any, run: Run, config: Config) -> None:
    after, before = run.residuals["after"], run.residuals["before"]
    scales, steps, _ = after.shape
    x = np.arange(1, steps + 1)
    for scale in range(scales):
        colour = _shade(_COLOURS[run.name], scale, scales)
        where = f", scale {scale + 1}" if scales > 1 else ""
        low, middle, high = np.quantile(after[scale], (0.1, 0.5, 0.9), axis=1)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.semilogy(x, middle, color=colour, label=f"after training{where}")
        middle = np.median(before[scale], axis=1)
        axes.semilogy(x, middle, "--", color=colour, alpha=0.6, linewidth=1.2)
    axes.plot([], [], "--", color=_GREY, linewidth=1.2, label="before training")
    limit = "steps taken" if config.rtol is None else "steps at most"
    axes.axvline(config.steps, color=_GREY, linewidth=1, linestyle=":")
    axes.text(
        config.steps,
        0.02,
        f" {limit}: {config.steps}",
        transform=axes.get_xaxis_transform(),
        color=_GREY,
        fontsize=9,
    )
    axes.set(title="Relative residual ‖f(z) − z‖ / ‖z‖", xlabel="step of the solver")
    axes.set_xlim(1, steps)
    axes.legend(loc="upper right", title="median, and 10 to 90 % of images")
    axes.get_legend().get_title().set_fontsize(9)


def _shade(colour: str, index: int, count: int) -> Any:
    from matplotlib.colors import to_rgb

    lightness = 0.6 * index / max(count - 1, 1)
    return tuple((1 - lightness) * c + lightness for c in to_rgb(colour))


def _draw_images(figure: Any, run: Run, data: ImageData) -> None:
    labels, predicted = data.test_labels, run.predictions
    mistakes = np.flatnonzero(labels != predicted)
    right = np.flatnonzero(labels == predicted)
    count = min(_IMAGES, len(labels))
    shown = mistakes[: max(_MISTAKES, count - len(right))]
    chosen = np.concatenate([shown, right])[:count]
    figure.suptitle(
        f"Test images and what the {run.title} says of them: {len(shown)} of its "
        f"{len(mistakes)} mistakes, then images it gets right",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    for axes, index in zip(
        figure.subplots(1, count, squeeze=False)[0], chosen, strict=True
    ):
        image = np.moveaxis(data.test_images[index], 0, -1) / data.white
        if image.shape[-1] == 1:
            axes.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1)
        else:
            axes.imshow(image)
        wrong = labels[index] != predicted[index]
        text = data.classes[predicted[index]]
        if wrong:
            text = f"✗ {text}\n(is {data.classes[labels[index]]})"
        axes.set_xlabel(text, color=_RED if wrong else "black", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        axes.spines[:].set_visible(True)
        axes.spines[:].set_color(_RED if wrong else "#cccccc")
        axes.spines[:].set_linewidth(2.0 if wrong else 0.8)


# --- the files ------------------------------------------------------------------------


def _names(runs: Sequence[str]) -> set[str]:
    return {RESULTS, FIGURE, *(f"{name}.eqx" for name in runs)}


def check_output(config: Config) -> None:
    """Refuse, before anything is computed, a place where the results cannot go.

    Raises:
        UsageError: naming `--output` and what to do.
    """
    path = config.output
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(
            f"--output: {path} exists and is not a directory; choose another"
        )
    inside = {item.name for item in path.iterdir()} if path.is_dir() else set()
    foreign = sorted(inside - _names(("revdeq", "deq", "explicit")))
    if foreign:
        raise UsageError(
            f"--output: {path} holds other things than a run's results "
            f"(`{foreign[0]}`), which are never overwritten; choose another directory"
        )
    if inside and not config.overwrite:
        raise UsageError(
            f"--output: {path} holds the results of an earlier run; choose another "
            "directory, or add --overwrite to replace them"
        )
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"--output: {path} cannot be made, {above} is not writable")


def _finite(value: Any) -> Any:
    """The same, with None where JSON has no number."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def summarise(runs: Sequence[Run], config: Config, data: ImageData) -> dict[str, Any]:
    """Everything of the runs that is worth keeping as JSON."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    device = jax.devices()[0]
    results = {
        run.name: {
            "title": run.title,
            "test_accuracy": run.test["accuracy"],
            "test_loss": run.test["loss"],
            "parameters": run.parameters,
            "evaluations_per_image": run.test["evaluations"],
            "relative_residual": run.test["residual"],
            "train_seconds": run.train_seconds,
            "compile_seconds": run.compile_seconds,
            "gradient_temp_bytes": run.temp_bytes,
            "history": run.history,
            "median_residuals": {
                when: np.median(curves, axis=2).tolist()
                for when, curves in run.residuals.items()
            },
        }
        for run in runs
    }
    images = {
        "train": len(data.train_images),
        "test": len(data.test_images),
        "shape": list(data.train_images.shape[1:]),
    }
    return _finite(
        {
            "config": config.to_json(),
            "images": images,
            "runs": results,
            "device": {"platform": device.platform, "kind": device.device_kind},
            "versions": {"python": platform.python_version(), **versions},
            "finished": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        }
    )


def write_results(runs: Sequence[Run], config: Config, data: ImageData) -> Path:
    """Make the output directory with everything in it, or leave all as it was."""
    path = config.output.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        (draft / "new").mkdir()
        summary = summarise(runs, config, data)
        text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
        (draft / "new" / RESULTS).write_text(text + "\n", encoding="utf-8")
        draw_figure(runs, config, data, draft / "new" / FIGURE)
        for run in runs:
            eqx.tree_serialise_leaves(draft / "new" / f"{run.name}.eqx", run.model)
        check_output(config)  # much may have happened since the first time
        if path.exists():
            path.rename(draft / "old")
        (draft / "new").rename(path)
    finally:
        if (draft / "old").exists() and not path.exists():
            (draft / "old").rename(path)
        shutil.rmtree(draft)
    return path
