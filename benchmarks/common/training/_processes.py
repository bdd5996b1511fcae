"""Several processes that train one model together."""

import atexit
import time

import jax
import numpy as np
from jax._src import distributed  # noqa: PLC2701, TID251 (no public name)
from jax.experimental import multihost_utils


class ProcessError(ValueError):
    """Processes that cannot find one another; the message says why."""


def join_processes(text: str) -> None:
    """Join the processes of a run, before anything else is asked of JAX.

    Args:
        text: `"auto"` where JAX finds the others by itself (Slurm, TPU pods, MPI), or
            `"HOST:PORT,INDEX/COUNT"`: the address of the first process, the number of
            this one from 0, and how many there are.

    Raises:
        ProcessError: if the text is not of this form.
    """
    if text == "auto":
        jax.distributed.initialize()
        atexit.register(_leave)
        return
    address, _, place = text.partition(",")
    index, _, count = place.partition("/")
    port = address.rpartition(":")[2]
    if not (port.isdigit() and index.isdigit() and count.isdigit()):
        raise ProcessError(
            f"got {text!r}, but it must be `auto` or `HOST:PORT,INDEX/COUNT`, for "
            "example localhost:9876,0/2"
        )
    if int(index) >= int(count):
        raise ProcessError(
            f"got {text!r}, but of {count} processes the last one is number "
            f"{int(count) - 1}"
        )
    jax.distributed.initialize(address, int(count), int(index))
    atexit.register(_leave)


def _leave() -> None:
    """Leave together, the process with the coordinator's server last.

    JAX destroys that server as soon as all have said goodbye. If it still answers one
    of them then, gRPC aborts the process ("Check failed: queue.Pop() == nullptr"), with
    an exit status that looks like a failed run.
    """
    state = distributed.global_state
    service, state.service = state.service, None
    jax.distributed.shutdown()
    if service is not None:
        time.sleep(1)
        service.shutdown()


def is_main() -> bool:
    """Whether this is the process that writes what only one may write."""
    return jax.process_index() == 0


def agree(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them have to ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))
