"""The loop: steps, evaluations, checkpoints, and a clean stop."""

import collections
import dataclasses
import math
import signal
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jaxtyping import PyTree

from ._checkpoints import Checkpoints
from ._errors import TrainingError
from ._interrupts import Interrupts
from ._mesh import Placement
from ._metrics import MetricsLog
from ._processes import agree
from ._progress import ProgressDisplay
from ._state import TrainState

# So many steps may be on their way to the device before the loop waits for the first.
_AHEAD = 4
_MAX_SKIPPED_IN_ROW = 25
_AGREE_EVERY = 10  # steps after which several processes ask one another


class Batches(Protocol):
    """Batches by the number of their step, a `grain.MapDataset` for example."""

    def __getitem__(self, index: int, /) -> Any:
        """The batch of step `index`."""
        ...


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
        state: after the last step.
        metrics: of the last evaluation; empty if there was none.
        seconds: spent on steps and evaluations in this process, after the first step.
        cpu_seconds: of all cores, spent in `seconds`.
        compile_seconds: spent on the first step, which compiles.
        steps: taken in this process.
        stopped_by: the signal that ended it early, or None.
    """

    state: TrainState
    metrics: dict[str, float]
    seconds: float
    cpu_seconds: float
    compile_seconds: float
    steps: int
    stopped_by: signal.Signals | None


def fit(
    state: TrainState,
    step: Callable[[TrainState, PyTree], tuple[TrainState, dict[str, Any]]],
    batches: Batches,
    *,
    steps: int,
    log: MetricsLog,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    eval_every: int = 0,
    checkpoints: Checkpoints | None = None,
    save_every: int = 0,
    display: ProgressDisplay | None = None,
    placement: Placement | None = None,
    title: str = "training",
) -> FitResult:
    """Train until `steps` steps have been taken, counted from the very first.

    SIGTERM and Ctrl-C end the run after the step that is under way, with a checkpoint.

    Args:
        state: where to begin, from `init_state` or a checkpoint. Its arrays are reused.
        step: from `make_step`.
        batches: the batch of step i is `batches[i]`.
        steps: length of the run.
        log: receives the metrics of every step and evaluation.
        evaluate: returns validation metrics, `valid_loss` among them.
        eval_every: steps between evaluations; the last step is always evaluated.
        checkpoints: where states are saved; None: nowhere.
        save_every: steps between checkpoints besides those at evaluations; 0: none.
        display: shows progress.
        placement: spreads batches over devices.
        title: what the display calls the run.

    Raises:
        TrainingError: if gradients are not finite for many steps in a row.
        CheckpointError: if a checkpoint cannot be written.
    """
    display = ProgressDisplay("off") if display is None else display
    pending: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
    latest: dict[str, float] = {}
    first = done = int(state.step)
    begin = time.perf_counter()
    start: tuple[float, float] | None = None

    def settle(limit: int) -> None:
        """Wait until at most `limit` steps are on their way."""
        while len(pending) > limit:
            number, metrics = pending.popleft()
            row = {name: value.item() for name, value in _host(metrics).items()}
            log.write("train", number, row)
            display.step(number, row)
            if row["skipped_in_row"] >= _MAX_SKIPPED_IN_ROW:
                raise TrainingError(
                    f"gradients were not finite in {row['skipped_in_row']} steps in a "
                    f"row, up to step {number}; try a lower learning rate (--lr)"
                )

    def save(metrics: dict[str, float] | None) -> None:
        # The log first: it must never lack steps that a checkpoint has behind it.
        settle(0)
        log.flush()
        if checkpoints is not None:
            checkpoints.save(state, metrics)

    interrupts = Interrupts()
    is_alone = jax.process_count() == 1

    def should_stop() -> bool:
        """Whether to stop now, at a step on which all processes agree."""
        if is_alone:
            return bool(interrupts)
        return done % _AGREE_EVERY == 0 and agree(bool(interrupts))

    with interrupts.listening(), display.training(title, steps, done):
        display.note("compiling")
        while done < steps and not should_stop():
            batch = batches[done]
            if placement is not None:
                batch = placement.put_batch(batch)
            state, metrics = step(state, batch)
            done += 1
            pending.append((done, metrics))
            if start is None:
                jax.block_until_ready(metrics)
                start = _clocks()
            settle(_AHEAD)
            is_last = done == steps
            if evaluate is not None and (
                is_last or (eval_every and done % eval_every == 0)
            ):
                settle(0)
                latest = evaluate(state)
                log.write("valid", done, latest)
                display.evaluated(done, latest)
                save(latest)
                if not math.isfinite(latest["valid_loss"]):
                    raise TrainingError(
                        f"the validation loss after step {done} is not finite; try a "
                        "lower learning rate (--lr)"
                    )
            elif is_last or (save_every and done % save_every == 0):
                save(None)
        save(None)
        if checkpoints is not None:
            checkpoints.wait()
    end = _clocks()
    start = end if start is None else start
    stopped_by = None
    if done < steps:  # by a signal to this process or to another one
        stopped_by = interrupts.received or signal.SIGTERM
    return FitResult(
        state,
        latest,
        seconds=end[0] - start[0],
        cpu_seconds=end[1] - start[1],
        compile_seconds=start[0] - begin,
        steps=done - first,
        stopped_by=stopped_by,
    )


def _clocks() -> tuple[float, float]:
    """Seconds of wall time and of all cores."""
    return time.perf_counter(), time.process_time()


def _host(metrics: dict[str, Any]) -> dict[str, Any]:
    return jax.device_get(metrics)
