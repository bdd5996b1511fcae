"""The time that a run may take, and the record that it leaves behind."""

import dataclasses
import json
import math
import pathlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np


def tidy(value: Any) -> Any:
    """As JSON has it: None for what is not a finite number."""
    if isinstance(value, dict):
        return {str(key): tidy(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [tidy(entry) for entry in value]
    if isinstance(value, np.generic):
        return tidy(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:400]


class OutOfTime(Exception):
    """A measurement was not made because its section's time was over."""


class Record:
    """The results, written to a file whenever they have grown.

    Args:
        path: the JSON file, replaced as a whole each time, so that it is always valid.
        head: what is known before anything is measured.
    """

    def __init__(self, path: pathlib.Path, head: dict[str, Any]):
        self.path = path
        self.results: dict[str, Any] = {**head, "sections": {}}
        self._lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        """Replace the file."""
        with self._lock:
            text = json.dumps(tidy(self.results), indent=1, ensure_ascii=False)
            draft = self.path.with_suffix(".partial")
            draft.write_text(text + "\n", encoding="utf-8")
            draft.replace(self.path)

    @property
    def failures(self) -> list[str]:
        """A line for each check that failed."""
        with self._lock:
            return [
                f"{row['case']}: {row['failure']}"
                for section in self.results["sections"].values()
                for row in section["rows"]
                if row.get("failure") is not None
            ]


@dataclasses.dataclass
class Section:
    """A part of a run: its rows, and the time until which it may measure.

    A row with the entry `failure` is a check, failed unless that is None; `reason`
    says why something could not be measured, and `skipped` why it was not tried.
    """

    name: str
    record: Record
    began: float
    deadline: float
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def left(self) -> float:
        """Seconds, not below 0."""
        return max(0.0, self.deadline - time.monotonic())

    def say(self, text: str) -> None:
        """A line of progress."""
        elapsed = time.monotonic() - self.began
        print(f"[{self.name} {elapsed:5.1f} s] {text}", flush=True)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, and write."""
        self.rows.append(row)
        self.record.write()

    def give_up(self, case: str, error: BaseException) -> None:
        """Keep the reason why something was not measured."""
        key = "skipped" if isinstance(error, OutOfTime) else "reason"
        text = str(error) if key == "skipped" else reason(error)
        self.say(f"{case}: {key}: {text}")
        self.add({"case": case, key: text})


@dataclasses.dataclass(frozen=True)
class Session:
    """What all sections of a run share.

    Attributes:
        record: where results go.
        platform: "cpu", "gpu" or "tpu".
        quick: measure the least.
        end: when the last section has to be over, on the monotonic clock.
        workers: programs that are compiled at the same time.
        cases: measure only cases whose names contain one of these; all if empty.
    """

    record: Record
    platform: str
    quick: bool
    end: float
    workers: int
    cases: tuple[str, ...] = ()

    @property
    def small(self) -> bool:
        """Whether sizes are those of a CPU."""
        return self.quick or self.platform == "cpu"

    def wants(self, case: str) -> bool:
        """Whether a case was asked for."""
        return not self.cases or any(text in case for text in self.cases)

    def run(self, name: str, share: float, measure: Callable) -> None:
        """Run one section in its share of the time that is left.

        An exception that the section does not catch ends the section, not the run.
        """
        began = time.monotonic()
        deadline = began + share * max(0.0, self.end - began)
        section = Section(name, self.record, began, deadline)
        kept: dict[str, Any] = {"status": "running", "rows": section.rows}
        self.record.results["sections"][name] = kept
        section.say(f"begins, for {deadline - began:.0f} s at most")
        try:
            measure(self, section)
            kept["status"] = "done"
        except OutOfTime as error:
            kept["status"] = f"cut short: {error}"
        except Exception as error:  # The other sections do not depend on it.
            kept["status"] = reason(error)
        kept["seconds"] = round(time.monotonic() - began, 1)
        section.say(kept["status"])
        self.record.write()


def shares(names: Iterable[str], weights: dict[str, float]) -> dict[str, float]:
    """The part of the time that is left that each section may take, in their order."""
    chosen = [name for name in weights if name in set(names)]
    return {
        name: weights[name] / sum(weights[n] for n in chosen[i:])
        for i, name in enumerate(chosen)
    }
