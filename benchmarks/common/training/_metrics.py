"""Metrics as JSON lines: one line per step, and one per evaluation."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any


class MetricsLog:
    """A file of JSON lines that a resumed run continues.

    Lines have a `step`. Those of evaluations have `kind` `"valid"`, those of steps
    `"train"`. A value that is not finite is written as null.
    """

    def __init__(self, path: Path | str, *, resume_at: int | None = None):
        """Open the file.

        Args:
            path: of the file; it must not exist unless the run is resumed.
            resume_at: the step of the checkpoint from which the run continues. Lines of
                later steps, and a line that was cut short, are removed.
        """
        self.path = Path(path)
        if resume_at is not None and self.path.exists():
            keep = [r for r in read_metrics(self.path) if r["step"] <= resume_at]
            write_atomically(self.path, "".join(map(_line, keep)))
        mode = "x" if resume_at is None else "a"
        self._file = self.path.open(mode, encoding="utf-8")

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Add a line; `flush` brings it to the disk."""
        self._file.write(_line({"kind": kind, "step": step, **values}))

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
