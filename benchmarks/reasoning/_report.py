"""What a run has found: results.json, the table, and the figure."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import deqjax
from benchmarks.common import training

from ._config import TITLES, WAYS, Config, cost_of_update

_NAMES = {
    "chains": "Chains of {length} nodes",
    "prefix": "Prefix sums, trained on {length} bits",
    "groups": "Products in {group}, trained on words of {length}",
    "sudoku": "Sudokus of 4 × 4",
}
# Okabe and Ito's colours, which are told apart without red and green.
_STYLES: dict[str, dict[str, Any]] = {
    "one-step": {"color": "#D55E00"},
    "last-k": {"color": "#E69F00", "ls": "--"},
    "exact": {"color": "#0072B2"},
    "stack": {"color": "#777777", "ls": ":"},
}


def name_of(config: Config) -> str:
    """The task in words."""
    return _NAMES[config.task].format(length=config.length, group=config.group)


def make_results(config: Config, trainings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything that was found, with what it was found on."""
    ways = {t["way"] for t in trainings}
    return {
        "task": config.task,
        "name": name_of(config),
        "config": config.to_json(),
        "evaluations_per_update": {
            way: cost_of_update(config, way) for way in WAYS if way in ways
        },
        "trainings": list(trainings),
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "deqjax": deqjax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write them as JSON; what is not finite becomes null."""
    text = json.dumps(_plain(results), indent=1, ensure_ascii=False, allow_nan=False)
    training.write_atomically(path, text + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


# --- the table ------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """A Markdown table: a row per way, with means over seeds.

    Where seeds differ, the smallest and the largest stand in parentheses.
    """
    config = results["config"]
    lengths = [config["length"], *config["test_lengths"]]
    head = ["way", "updates", "loss"]
    for length in lengths:
        at = f" at {length}" if len(lengths) > 1 else ""
        head.append(f"solved{at}, residual")
    head += ["settled", "CPU s / update", "evaluations / update", "MiB"]
    rows = [_row(results, way) for way in WAYS if _of(results, way)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _of(results: dict[str, Any], way: str) -> list[dict[str, Any]]:
    return [t for t in results["trainings"] if t["way"] == way]


def _row(results: dict[str, Any], way: str) -> list[str]:
    mine = _of(results, way)
    mean = lambda values: float(np.mean([np.nan if v is None else v for v in values]))
    row = [TITLES[way], str(mine[0]["updates"])]
    row.append(f"{mean([t['loss'] for t in mine]):.2g}")
    for tests in zip(*(t["tests"] for t in mine), strict=True):
        solved = [100 * t["exact_match"] for t in tests]
        least, most = (f"{f(solved):.1f}" for f in (min, max))
        spread = f" ({least} to {most})" if least != most else ""
        looped = "residual" in tests[0]
        residual = f"{mean([t['residual'] for t in tests]):.0e}" if looped else "–"
        row.append(f"{mean(solved):.1f} %{spread}, {residual}")
    last = [t["tests"][-1] for t in mine]
    if "verdicts" in last[0]:
        settled = [t["verdicts"]["settles"] / t["examples"] for t in last]
        row.append(f"{100 * mean(settled):.0f} %")
    else:
        row.append("–")
    row.append(f"{mean([t['cpu_seconds_per_update'] for t in mine]):.3f}")
    row.append(str(results["evaluations_per_update"][way]))
    memory = mine[0]["temporary_bytes"]
    row.append("–" if memory is None else f"{memory / 2**20:.1f}")
    return row


# --- the figure -----------------------------------------------------------------------


def draw(results: dict[str, Any], logs: dict[str, list[dict]], path: Path) -> None:
    """Loss over updates and over CPU time; answers and residual over depth.

    Args:
        results: from `make_results`.
        logs: the log of one training of each way.
        path: of the PNG to write.
    """
    from matplotlib.figure import Figure

    with training.use_style():
        figure = Figure(figsize=(11, 7.5), dpi=110, layout="constrained")
        axes: Any = figure.subplots(2, 2)
        (by_update, by_time), (answers, residuals) = axes
        for way, rows in logs.items():
            _draw_losses(by_update, by_time, way, rows)
        for way in WAYS:
            for number, trained in enumerate(_of(results, way)):
                label = TITLES[way] if number == 0 else None
                _draw_depths(answers, residuals, way, trained["tests"][-1], label)
        length = results["trainings"][0]["tests"][-1]["length"]
        sequences = results["task"] != "sudoku"
        at = f" at length {length}" if sequences else ""
        by_update.set(xlabel="update", ylabel="training loss (nats)", yscale="log")
        by_update.set_title("The same number of updates")
        by_time.set(xlabel="CPU time of the updates (s)", yscale="log")
        by_time.set(ylabel="training loss (nats)", title="The same time")
        answers.set(xlabel="steps at test time", ylabel="solved (%)", ylim=(-4, 104))
        answers.set_title(f"Examples solved{at}")
        residuals.set(xlabel="steps at test time", yscale="log")
        residuals.set(ylabel="relative residual, median", title=f"Residual{at}")
        by_update.legend()
        answers.legend()
        figure.suptitle(results["name"], fontsize=12, fontweight="bold")
        figure.savefig(path)


def _draw_losses(by_update: Any, by_time: Any, way: str, rows: list[dict]) -> None:
    losses = np.array([np.nan if r["loss"] is None else r["loss"] for r in rows])
    spent = np.cumsum([r["cpu_seconds"] for r in rows])
    window = max(1, len(rows) // 40)
    kernel = np.ones(window) / window
    smooth = np.convolve(losses, kernel, mode="valid")
    style = {**_STYLES[way], "label": TITLES[way], "lw": 1.5}
    by_update.plot(np.arange(window, len(rows) + 1), smooth, **style)
    by_time.plot(spent[window - 1 :], smooth, **style)


def _draw_depths(
    answers: Any, residuals: Any, way: str, found: dict[str, Any], label: str | None
) -> None:
    style = {**_STYLES[way], "label": label, "lw": 1.5, "alpha": 0.8}
    if "depths" not in found:
        answers.axhline(100 * found["exact_match"], **style)
        return
    solved = 100 * np.array(found["exact_match_at"])
    answers.plot(found["depths"], solved, marker="o", ms=4, **style)
    residual = np.array(found["residual_at"], float)
    residual = np.where(residual > 0, residual, np.nan)
    residuals.plot(found["depths"], residual, marker="o", ms=4, **style)
