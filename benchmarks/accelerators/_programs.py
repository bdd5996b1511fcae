"""Compile many programs at once, and time some of them in turns."""

import concurrent.futures as cf
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ._session import OutOfTime, Section

SHORT = 2e-3  # Seconds: shorter calls are timed several at once.


def at_once(
    jobs: Mapping[str, Callable[[], Any]], workers: int, seconds: float
) -> Iterator[tuple[str, Any]]:
    """Run the jobs in threads, and hand out each as it is done, or its exception.

    Compiling releases Python's lock, so that several programs take little more time
    than the slowest. What is not begun when the time is over never is.
    """
    pool = cf.ThreadPoolExecutor(max(1, workers))
    names = {pool.submit(job): name for name, job in jobs.items()}
    try:
        for future in cf.as_completed(list(names), timeout=seconds):
            error = future.exception()
            yield names.pop(future), future.result() if error is None else error
    except cf.TimeoutError:
        for name in names.values():
            yield name, OutOfTime("there was no time left to compile it")
    finally:
        # Those that are being compiled would disturb what is timed next.
        pool.shutdown(wait=True, cancel_futures=True)


def compile_all(
    jobs: Mapping[str, Callable[[], Any]], workers: int, section: Section
) -> dict[str, Any]:
    """The compiled programs by name; what failed is recorded and left out.

    A part of the section's time is kept for the measurements.
    """
    done = {}
    for name, result in at_once(jobs, workers, 0.7 * section.left()):
        if isinstance(result, BaseException):
            section.give_up(name, result)
        else:
            done[name] = result
    return {name: done[name] for name in jobs if name in done}


def in_turns(
    runs: Mapping[str, Callable[[], Any]], seconds: float, least: int, most: int
) -> dict[str, np.ndarray]:
    """Seconds per call of each, in samples that were taken in turns.

    Each is called twice before. Calls that take less than 2 ms are made several at a
    time: a device runs them one after the other, and the host's share is hidden, as it
    is in training.

    Args:
        runs: what to time; returns arrays that are waited for.
        seconds: about so long for all of them.
        least: samples of each, whatever they take.
        most: samples of each, however little they take.
    """
    calls = {}
    for name, run in runs.items():
        jax.block_until_ready(run())
        once = min(_sample(run, 1), _sample(run, 1))
        calls[name] = max(1, min(50, round(SHORT / max(once, 1e-7))))
    found: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for i in range(most):
        if i >= least and time.perf_counter() > end:
            break
        for name, run in runs.items():
            found[name].append(_sample(run, calls[name]))
    return {name: np.array(samples) for name, samples in found.items()}


def _sample(run: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls - 1):
        run()
    jax.block_until_ready(run())
    return (time.perf_counter() - began) / calls


def summary(samples: np.ndarray, scale: float = 1e3) -> dict[str, Any]:
    """Median, quartiles and number of samples; milliseconds by default."""
    return {
        "median": float(np.median(samples)) * scale,
        "quartiles": [float(q) * scale for q in np.percentile(samples, (25, 75))],
        "samples": len(samples),
    }
