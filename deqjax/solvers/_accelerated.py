"""Shared by Anderson and Broyden: accept or reject an evaluation, and recover.

An accelerated method proposes its next iterate from a memory of past steps. This file
makes that safe: where an evaluation has gone astray the problem forgets its memory,
returns towards its best iterate, and takes a shorter step from there.
"""

import abc
from typing import Generic, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int

from .. import _tree
from .._types import Aux, Counts, Flags, Options, Reals, Y
from ._base import AbstractSolver, Trial
from ._record import Record

Memory = TypeVar("Memory")

# A residual this many times the smallest one seen is a step gone astray, …
GROWTH = 1e4
# … and so are this many steps times the history without a new smallest one.
PATIENCE = 10
# After a setback the iterate is at this part of the way from the best to the stray one,
# and the steps from there are shorter by the same factor.
RETREAT = 0.25
# Setbacks in a row after which a problem whose map is not finite is given up.
SETBACKS = 12


class Guarded(eqx.Module, Generic[Memory]):
    """The memory of an accelerated method, and how far it can be relied on.

    Attributes:
        past: what the method keeps of past steps.
        trail: per problem, valid evaluations in a row before the next one, and
            setbacks not yet made good.
    """

    past: Memory
    trail: Int[Array, "*batch 2"]


class AbstractAccelerated(AbstractSolver[Y, Aux], Generic[Y, Aux, Memory]):
    """A solver that proposes its iterates from a memory of `history` past steps."""

    history: eqx.AbstractVar[int]

    freezes_memory = True

    @abc.abstractmethod
    def init_past(self, y: Y) -> Memory:
        """An empty memory."""

    @abc.abstractmethod
    def extrapolate(
        self,
        y: Y,
        f: Y,
        past: Memory,
        index: Array,
        num_valid: Counts,
        damping: Reals,
        active: Flags,
    ) -> tuple[Y, Memory]:
        """The next iterate from f = fn(y), and the memory with this evaluation in it.

        `num_valid` valid evaluations in a row came before this one; where it is
        negative this one is not valid, and must not be remembered. Problems that are
        not active have ended before; what is made of theirs does not matter.
        """

    def init_memory(self, z: Y, options: Options) -> Guarded[Memory]:
        zero = jnp.zeros_like(_tree.norm(z, self.batch_ndim)).astype(jnp.int32)
        return Guarded(self.init_past(z), jnp.stack([zero, zero], -1))

    def recovers(self, record: Record, memory: Guarded[Memory]) -> Flags:
        return (record.num_steps > 0) & (memory.trail[..., 1] < SETBACKS)

    def update(
        self, z: Y, f: Y, memory: Guarded[Memory], trial: Trial
    ) -> tuple[Y, Guarded[Memory]]:
        assert trial.before is not None  # solves that keep the best iterate record
        num_valid, num_rejected = memory.trail[..., 0], memory.trail[..., 1]
        record, active = trial.record, trial.before
        damping = RETREAT ** num_rejected.astype(record.sizes.dtype)
        valid = self._is_valid(record)
        num_valid = jnp.where(valid, num_valid, -1)
        proposal, past = _tree.lenient(self.extrapolate)(
            z, f, memory.past, trial.index, num_valid, damping, active
        )
        best, _ = record.value
        new = jtu.tree_map(
            lambda new, old, best: _accept(valid, new, old, best), proposal, z, best
        )
        # A new best iterate makes good one setback.
        improved = record.best_step == record.num_steps - 1
        made_good = jnp.maximum(num_rejected - improved.astype(jnp.int32), 0)
        num_rejected = jnp.where(valid, made_good, num_rejected + 1)
        trail = jnp.stack([num_valid + 1, num_rejected], -1)
        return new, Guarded(past, _tree.where(active, trail, memory.trail))

    def _is_valid(self, record: Record) -> Flags:
        """Whether the evaluation entered last is one to go on from."""
        idle = record.num_steps - 1 - record.best_step
        patience = PATIENCE * self.history
        return (record.last_residual <= GROWTH * record.residual) & (
            (idle == 0) | (idle % patience != 0)
        )


def _accept(valid: Flags, new: Array, old: Array, best: Array) -> Array:
    """The proposal where it is valid, else a point on the way back to the best."""
    back = best + RETREAT * (old - best)
    back = jnp.where(jnp.isfinite(back), back, best)
    return jnp.where(_tree.expand(valid, new), new, back)
