"""What `train_images.py` shows while it runs: a bar, lines, or nothing."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_REFRESH = 0.25  # seconds between two looks at the device, each of which waits for it


def describe(row: dict[str, float]) -> str:
    """Loss, accuracy, evaluations and residual in one line."""
    parts = [f"loss {row['loss']:.4f}", f"train {row['train_accuracy']:6.2%}"]
    if "test_accuracy" in row:
        parts.append(f"test {row['test_accuracy']:6.2%}")
    parts.append(f"{row['evaluations']:.1f} evals/image")
    if np.isfinite(row["residual"]):
        parts.append(f"residual {row['residual']:.1e}")
    return "  ".join(parts)


class _Bar(Progress):
    """A bar with a line of figures below it, which fits on narrow terminals."""

    figures = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.figures:
            yield Text(f"  {self.figures}", overflow="ellipsis", no_wrap=True)


class Monitor:
    """Shows the progress of one training after the other on standard error."""

    def __init__(self, kind: str):
        """Show a `"bar"`, `"lines"` (one per epoch) or nothing (`"off"`)."""
        self._kind = kind
        self._console = Console(stderr=True, highlight=False)
        self._bar: _Bar | None = None
        self._task: Any = None
        self._title, self._epochs, self._steps = "", 0, 0
        self._last_look = 0.0

    @contextlib.contextmanager
    def training(self, title: str, epochs: int, steps: int) -> Iterator[None]:
        """Follow a training of `epochs` times `steps` steps."""
        self._title, self._epochs, self._steps = title, epochs, steps
        if self._kind != "bar":
            yield
            return
        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with _Bar(*columns, console=self._console) as self._bar:
            self._task = self._bar.add_task(
                title, total=epochs * steps, status="compiling"
            )
            yield

    def note(self, text: str) -> None:
        """Say what is being done outside of the steps."""
        if self._kind == "lines":
            self._console.print(f"{self._title:<16}  {text}", soft_wrap=True)
        elif self._kind == "bar" and self._bar is not None:
            self._bar.update(self._task, status=text)

    def step(self, epoch: int, step: int, look: Callable[[], dict[str, float]]) -> None:
        """A step has been sent off; `look` waits for it and says how it stands."""
        if self._kind != "bar" or self._bar is None:
            return
        now = time.perf_counter()
        if now - self._last_look < _REFRESH:
            return
        self._last_look = now
        done = epoch * self._steps + step + 1
        self._bar.figures = describe(look())
        status = f"epoch {epoch + 1}/{self._epochs}"
        self._bar.update(self._task, completed=done, status=status)

    def epoch(self, epoch: int, row: dict[str, float]) -> None:
        """An epoch is over, with these averages."""
        text = f"epoch {epoch + 1:{len(str(self._epochs))}}/{self._epochs}"
        if self._kind == "lines":
            seconds = f"{row['seconds']:.1f} s"
            text = f"{self._title:<16}  {text}  {describe(row)}  {seconds}"
            self._console.print(text, soft_wrap=True)
        elif self._kind == "bar" and self._bar is not None:
            self._bar.figures = describe(row)
            done = (epoch + 1) * self._steps
            self._bar.update(self._task, completed=done, status=text)
