"""What is shown while a model is trained: a bar, lines, or nothing."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

_LINES = 10  # of a training, where there is no bar


class Monitor:
    """Shows one training after the other on standard error."""

    def __init__(self, kind: str):
        """Show a `"bar"`, `"lines"` or nothing (`"off"`)."""
        self._kind = kind
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._title, self._total, self._began = "", 0, 0.0

    def title(self, text: str) -> None:
        """Name the training that comes next."""
        self._title = text

    @contextlib.contextmanager
    def training(self, total: int, done: int) -> Iterator[None]:
        """Follow a training of `total` updates, of which some are done."""
        self._total, self._began = total, time.perf_counter()
        if self._kind != "bar":
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as self._bar:
            self._task = self._bar.add_task(
                self._title, total=total, completed=done, figures=""
            )
            yield

    def update(self, done: int, loss: float) -> None:
        """So many updates are done."""
        if self._kind == "bar" and self._bar is not None:
            self._bar.update(self._task, completed=done, figures=f"loss {loss:.4f}")
        elif self._kind == "lines" and done % max(1, self._total // _LINES) == 0:
            seconds = time.perf_counter() - self._began
            self.note(f"{done:6}/{self._total}  loss {loss:.4f}  {seconds:.0f} s")

    def note(self, text: str) -> None:
        """Say something outside of a bar."""
        if self._kind != "off":
            self._console.print(f"{self._title}  {text}", soft_wrap=True)
