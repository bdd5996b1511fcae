"""What a run shows while it trains: a bar, lines, or nothing."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_REFRESH = 0.25  # seconds between two updates of the bar


def describe_metrics(values: Mapping[str, float]) -> str:
    """The metrics in one line, those that are counts as whole numbers."""
    show = lambda v: f"{v:d}" if isinstance(v, int) else f"{v:.4g}"
    return "  ".join(f"{name} {show(value)}" for name, value in values.items())


class _Bar(Progress):
    """A bar with a line of figures below it, which fits on narrow terminals."""

    figures = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.figures:
            yield Text(f"  {self.figures}", overflow="ellipsis", no_wrap=True)


class ProgressDisplay:
    """The progress of one run after the other, on standard error.

    Args:
        kind: `"bar"`, `"lines"` (one per evaluation), `"off"`, or `"auto"`: a bar on a
            terminal, lines elsewhere.
        describe: turns metrics into a line; None: all of them.
        unit: of progress, as lines and bar name it.
    """

    def __init__(
        self,
        kind: str = "auto",
        describe: Callable[[Mapping[str, float]], str] | None = None,
        unit: str = "step",
    ):
        if kind == "auto":
            kind = "bar" if sys.stderr.isatty() else "lines"
        self._kind = kind
        self._describe = describe or describe_metrics
        self._console = Console(stderr=True, highlight=False)
        self._bar: _Bar | None = None
        self._task: Any = None
        self._unit, self._per_unit = unit, 1
        self._title, self._steps = "", 0
        self._last_update = 0.0

    @contextlib.contextmanager
    def training(
        self, title: str, steps: int, done: int = 0, *, per_unit: int = 1
    ) -> Iterator[None]:
        """Follow a run of `steps` steps, of which `done` are behind it.

        Args:
            title: of the run.
            steps: its length.
            done: steps that were taken before.
            per_unit: steps in a unit of progress, an epoch for example.
        """
        self._title, self._steps, self._per_unit = title, steps, per_unit
        if self._kind != "bar":
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with _Bar(*columns, console=self._console) as self._bar:
            self._task = self._bar.add_task(
                title, total=steps, completed=done, status=self._place(done)
            )
            yield
        self._bar = None

    def note(self, text: str) -> None:
        """Say what is being done outside of the steps."""
        if self._bar is not None:
            self._bar.update(self._task, status=text)
        elif self._kind == "lines":
            self._console.print(f"{self._title}  {text}", soft_wrap=True)

    def step(
        self,
        done: int,
        metrics: Mapping[str, float] | Callable[[], Mapping[str, float]],
    ) -> None:
        """Steps up to `done` are behind; `metrics` are those of the last one.

        A function that returns them is called only when they are shown: it may have to
        wait for the device.
        """
        now = time.perf_counter()
        if self._bar is None or now - self._last_update < _REFRESH:
            return
        self._last_update = now
        self._bar.figures = self._describe(metrics() if callable(metrics) else metrics)
        self._bar.update(self._task, completed=done, status=self._place(done - 1, 1))

    def evaluated(self, done: int, metrics: Mapping[str, float]) -> None:
        """The model after `done` steps was evaluated."""
        text = self._describe(metrics)
        if self._bar is not None:
            self._bar.figures = text
            self._bar.update(self._task, completed=done, status=self._place(done))
        elif self._kind == "lines":
            self._console.print(
                f"{self._title}  {self._place(done)}  {text}", soft_wrap=True
            )

    def _place(self, done: int, more: int = 0) -> str:
        """The unit that is over, or with `more` the one that is under way."""
        total = self._steps // self._per_unit
        number = done // self._per_unit + more
        return f"{self._unit} {number:{len(str(total))}}/{total}"
