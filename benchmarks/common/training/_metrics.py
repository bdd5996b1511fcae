"""Metrics as JSON lines: one line per step, and one per evaluation."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ._errors import TrainingError


class MetricsLog:
    """A file of JSON lines that a resumed run continues.

    Lines have a `step`. Those of evaluations have `kind` `"valid"`, those of steps
    `"train"`. A value that is not finite is written as null.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        resume_at: int | None = None,
        events: Path | str | None = None,
        is_writer: bool = True,
    ):
        """Open the file.

        Args:
            path: of the file; it must not exist unless the run is resumed.
            resume_at: the step of the checkpoint from which the run continues. Lines of
                later steps, and a line that was cut short, are removed.
            events: a directory for TensorBoard's event files, which take the library
                tensorboardX; None: there are none.
            is_writer: False in the processes that leave writing to another one.
        """
        self.path = Path(path)
        self._file = self._events = None
        if not is_writer:
            return
        if events is not None:
            from tensorboardX import SummaryWriter

            # TensorBoard hides what an interrupted run wrote from this step on.
            purge = None if resume_at is None else resume_at + 1
            self._events = SummaryWriter(str(events), purge_step=purge)
        if resume_at is not None and self.path.exists():
            keep = [r for r in read_metrics(self.path) if r["step"] <= resume_at]
            write_atomically(self.path, "".join(map(_line, keep)))
        mode = "x" if resume_at is None else "a"
        self._file = self.path.open(mode, encoding="utf-8")

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Add a line; `flush` brings it to the disk.

        Raises:
            TrainingError: if it cannot be written.
        """
        if self._file is not None:
            with self._reported():
                self._file.write(_line({"kind": kind, "step": step, **values}))
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Hand everything to the operating system.

        Raises:
            TrainingError: if it cannot be written.
        """
        if self._file is not None:
            with self._reported():
                self._file.flush()
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flush and close.

        Raises:
            TrainingError: if the rest cannot be written.
        """
        if self._file is not None:
            with self._reported():
                self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        # A file that could not be written cannot be flushed either.
        with contextlib.suppress(*([TrainingError] if kind is not None else [])):
            self.close()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self.path} cannot be written ({error.strerror}); make room, then "
                "--resume continues from the latest checkpoint"
            ) from error


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a file; a last one that was cut short is left out.

    Raises:
        ValueError: if a line before the last one is not JSON.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
    return rows


def _line(row: dict[str, Any]) -> str:
    def plain(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        finite = not isinstance(value, float) or math.isfinite(value)
        return value if finite else None

    row = {name: plain(value) for name, value in row.items()}
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
