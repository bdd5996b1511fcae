"""What Anderson and Broyden share: the evaluation, the judgement of it, the way back.

An accelerated method proposes its next iterate from a memory of past steps. This file
makes that safe: each evaluation is entered into the record, and where one has gone
astray the problem forgets its memory, returns towards its best iterate, and takes a
shorter step from there.
"""

import abc
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Int, PyTree

from .. import _tree
from .._types import Args, Aux, Counts, Flags, Map, Options, Reals, Y
from ._base import AbstractSolver, Progress, statistics

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


class AcceleratedState(eqx.Module, Generic[Memory]):
    """The state of an accelerated solve.

    Attributes:
        progress: the record.
        memory: what the method keeps of past steps.
        index: evaluations so far, the same for all problems.
        trail: per problem, sound evaluations in a row before the next one, and
            setbacks not yet made good.
    """

    progress: Progress
    memory: Memory
    index: Int[Array, ""]
    trail: Int[Array, "*batch 2"]


class AbstractAccelerated(
    AbstractSolver[Y, Aux, AcceleratedState[Memory]], Generic[Y, Aux, Memory]
):
    """A solver that proposes its iterates from a memory of `history` past steps."""

    history: eqx.AbstractVar[int]

    @abc.abstractmethod
    def remember(self, y: Y) -> Memory:
        """An empty memory."""

    @abc.abstractmethod
    def propose(
        self,
        y: Y,
        f: Y,
        memory: Memory,
        index: Array,
        age: Counts,
        damping: Reals,
        active: Flags,
    ) -> tuple[Y, Memory]:
        """The next iterate from f = fn(y), and the memory with this evaluation in it.

        `age` sound evaluations in a row came before this one; where it is negative
        this one is not sound, and must not be remembered. Problems that are not active
        have ended before; what is made of theirs does not matter.
        """

    @property
    def returns_best(self) -> bool:
        """True, without a test as well."""
        return True

    def init(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: frozenset[object],
    ) -> AcceleratedState[Memory]:
        progress = Progress.start(y, y, aux_struct, self.batch_ndim)
        start = progress.counts[..., :2]
        return AcceleratedState(
            progress, self.remember(y), jnp.array(0, jnp.int32), start
        )

    def step(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        state: AcceleratedState[Memory],
        tags: frozenset[object],
    ) -> tuple[Y, AcceleratedState[Memory], Aux]:
        f, aux = fn(y, args)
        age, setbacks = state.trail[..., 0], state.trail[..., 1]
        before = state.progress.active(options)
        recovers = (state.progress.num_steps > 0) & (setbacks < SETBACKS)
        damping = RETREAT ** setbacks.astype(state.progress.sizes.dtype)
        progress = self.observe(state.progress, before, y, y, f, aux, recovers=recovers)
        sound = self._sound(progress)
        age = jnp.where(sound, age, -1)
        proposal, memory = _tree.lenient(self.propose)(
            y, f, state.memory, state.index, age, damping, before
        )
        y = self._choose(progress.active(options), sound, proposal, y, progress.value)
        # A new best iterate makes good one setback.
        improved = progress.best_step == progress.num_steps - 1
        made_good = jnp.maximum(setbacks - improved.astype(jnp.int32), 0)
        trail = jnp.stack([age + 1, jnp.where(sound, made_good, setbacks + 1)], -1)
        trail = _tree.where(before, trail, state.trail)
        return y, AcceleratedState(progress, memory, state.index + 1, trail), aux

    def _sound(self, progress: Progress) -> Flags:
        """Whether the evaluation entered last is one to go on from."""
        idle = progress.num_steps - 1 - progress.best_step
        patience = PATIENCE * self.history
        return (progress.last_residual <= GROWTH * progress.residual) & (
            (idle == 0) | (idle % patience != 0)
        )

    def _choose(self, active: Flags, sound: Flags, proposal: Y, y: Y, best: Y) -> Y:
        def leaf(new: Array, old: Array, best: Array) -> Array:
            back = best + RETREAT * (old - best)
            back = jnp.where(jnp.isfinite(back), back, best)
            new = jnp.where(_tree.expand(sound, new), new, back)
            return jnp.where(_tree.expand(active, new), new, old)

        return jtu.tree_map(leaf, proposal, y, best)

    def terminate(
        self,
        fn: Map,
        y: Y,
        args: Args,
        options: Options,
        state: AcceleratedState[Memory],
        tags: frozenset[object],
    ) -> tuple[Array, optx.RESULTS]:
        if self.static:
            return jnp.array(False), optx.RESULTS.successful
        return self.verdict(state.progress)

    def outcome(self, y: Y, state: AcceleratedState[Memory]) -> optx.RESULTS:
        finite = jnp.all(jnp.isfinite(state.progress.residual))
        return optx.RESULTS.where(
            finite, optx.RESULTS.successful, optx.RESULTS.nonfinite
        )

    def postprocess(
        self,
        fn: Map,
        y: Y,
        aux: Aux,
        args: Args,
        options: Options,
        state: AcceleratedState[Memory],
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[Y, Aux, dict[str, Any]]:
        best = state.progress
        stats = statistics(
            best.residual,
            best.norm,
            best.converged,
            best.num_steps,
            jnp.max(best.num_steps, initial=0),
        )
        return best.value, best.aux, stats

    def last_residual(self, y: Y, state: AcceleratedState[Memory]) -> Reals:
        return state.progress.last_residual

    def steps_taken(self, state: AcceleratedState[Memory]) -> Counts:
        return state.progress.num_steps
