"""What a compiled program costs."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax


class Cost(NamedTuple):
    """Seconds to trace and compile, median seconds of a run, bytes of temporaries."""

    compile_seconds: float
    seconds: float
    memory: float


def measure(fn: Callable, *args: Any, repeats: int) -> tuple[Any, Cost]:
    """Compile and run a function of arrays: its output and its cost."""
    start = time.perf_counter()
    compiled = jax.jit(fn).lower(*args).compile()
    compile_seconds = time.perf_counter() - start
    out = jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    # Not every backend tells.
    analysis = compiled.memory_analysis()
    memory = getattr(analysis, "temp_size_in_bytes", float("nan"))
    return out, Cost(compile_seconds, statistics.median(times), float(memory))


def named(name: str, given: Any, defaults: Callable[[], dict[str, Any]]) -> dict:
    """Candidates by name: as given, by class for a sequence, or the defaults."""
    if given is None:
        return defaults()
    if isinstance(given, Mapping):
        out = {str(k): v for k, v in given.items()}
    elif isinstance(given, Sequence) and not isinstance(given, str):
        out = {}
        for value in given:
            label = base = type(value).__name__
            count = 2
            while label in out:
                label, count = f"{base} {count}", count + 1
            out[label] = value
    else:
        raise TypeError(
            f"`{name}` must be a dictionary by name or a sequence; got "
            f"{type(given).__name__}."
        )
    if not out:
        raise ValueError(f"`{name}` must not be empty; leave it out for the defaults.")
    return out
