"""Checkpoints by orbax: asynchronous, atomic, the latest ones and the best one kept."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from ._state import TrainState

_manager = ocp.checkpoint_managers


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message says which and why."""


class Checkpoints:
    """The checkpoints of a run in one directory.

    Writing goes on in the background while the run continues. A checkpoint gets its
    name only once it is complete, so one that was cut short is never found.

    Args:
        directory: where they are kept.
        keep: how many of the latest are kept, besides the best one by `valid_loss`.
    """

    def __init__(self, directory: Path | str, *, keep: int = 2):
        self.directory = Path(directory).absolute()
        for name in ("absl", "asyncio"):  # errors are raised besides being logged
            logging.getLogger(name).setLevel(logging.CRITICAL)
        policy = _manager.AnyPreservationPolicy(
            [
                _manager.LatestN(keep),
                _manager.BestN(
                    get_metric_fn=lambda metrics: metrics["valid_loss"],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        try:
            self._orbax = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policy, cleanup_tmp_directories=True
                ),
            )
        except OSError as error:
            raise CheckpointError(
                f"cannot use {self.directory} for checkpoints: {error}"
            ) from error

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(self._orbax.all_steps())

    def save(self, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Begin to write a checkpoint of `state`, unless this step has one.

        Raises:
            CheckpointError: if this one, or the one before, could not be written.
        """
        step = int(state.step)
        if step in self._orbax.all_steps():
            return
        # The next step may reuse the memory of `state` before it is written.
        leaves = jtu.tree_map(jnp.copy, _named_leaves(state))
        try:
            self._orbax.save(
                step, args=ocp.args.StandardSave(leaves), metrics=metrics, force=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritten(error) from error

    def restore(self, like: TrainState) -> TrainState | None:
        """The latest checkpoint that can be read, or None if there is none.

        Args:
            like: a state of the same shapes, dtypes and shardings.

        Raises:
            CheckpointError: if checkpoints exist and none can be read.
        """
        shapes = jtu.tree_map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            _named_leaves(like),
        )
        error: Exception | None = None
        for step in reversed(self.steps):
            try:
                found = self._orbax.restore(step, args=ocp.args.StandardRestore(shapes))
            except Exception as problem:  # orbax and tensorstore raise many types
                error = problem
                continue
            return _from_named(dict(found), like)
        if error is not None:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} fits this run or can be "
                f"read ({reason})"
            ) from error
        return None

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            CheckpointError: if it could not be.
        """
        try:
            self._orbax.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Wait, and let go of the directory."""
        self.wait()
        self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self.close()

    def _unwritten(self, error: Exception) -> CheckpointError:
        reason = " ".join(str(error).split())[:300]
        return CheckpointError(
            f"a checkpoint could not be written to {self.directory} ({reason}); those "
            "written before are still there, and --resume continues from the latest"
        )


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _named_leaves(state: TrainState) -> dict[str, jax.Array]:
    """The arrays by their paths: names that survive a change of the classes' order."""
    pairs = jtu.tree_leaves_with_path(state)
    data = lambda x: jax.random.key_data(x) if _is_key(x) else x
    return {
        jtu.keystr(path, simple=True, separator="."): data(leaf)
        for path, leaf in pairs
        if leaf.size  # orbax refuses empty arrays, which hold nothing to save
    }


def _from_named(found: dict[str, jax.Array], like: TrainState) -> TrainState:
    def fill(path: Any, leaf: jax.Array) -> PyTree:
        if not leaf.size:
            return leaf
        value = found[jtu.keystr(path, simple=True, separator=".")]
        if _is_key(leaf):
            return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        return value

    return jtu.tree_map_with_path(fill, like)
