"""The record of a solve: the best iterate of each problem, and how that stands."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Float, Int, PyTree

from .. import _tree
from .._types import Counts, Flags, Options, Reals


class Record(eqx.Module):
    """The best evaluated iterate of each problem, and how its solve stands.

    What is a number per problem is kept in two arrays, so that bringing it up to date
    takes two small kernels, and not one for each number.

    Attributes:
        value: the best iterate seen (smallest residual), or the converged one, and what
            the solver keeps beside it; None in a solve that records its end alone.
        aux: what the map returned beside its value there.
        sizes: `residual`, `norm` and `last_residual`.
        counts: `num_steps`, `best_step`, and 0 or 1 for `converged` and `failed`.
    """

    value: PyTree
    aux: PyTree
    sizes: Float[Array, "*batch 3"]
    counts: Int[Array, "*batch 4"]

    @staticmethod
    def start(value: PyTree, z: PyTree, aux_struct: PyTree, batch_ndim: int):
        """The record before the first evaluation; `z` gives batch and dtype."""
        shape = _tree.batch_shape(z, batch_ndim)
        if batch_ndim > 0 and _tree.batch_shape(aux_struct, batch_ndim) not in (
            (),
            shape,
        ):
            raise ValueError(
                f"With `batch_ndim={batch_ndim}` every leaf of `aux` needs the leading "
                f"axes {shape} of the iterate, since the best iterates of different "
                "problems belong to different evaluations."
            )
        # Made from the norm of z, not from its shape: on a mesh with explicit axes
        # this gives the record the sharding of the batch.
        zero = jnp.zeros_like(_tree.norm(z, batch_ndim))
        nan, count = jnp.full_like(zero, jnp.nan), zero.astype(jnp.int32)
        aux = _tree.zeros_like(aux_struct)
        sizes, counts = jnp.stack([nan] * 3, -1), jnp.stack([count] * 4, -1)
        return Record(value, aux, sizes, counts)

    @property
    def residual(self) -> Reals:
        """‖f(value) − value‖₂."""
        return self.sizes[..., 0]

    @property
    def norm(self) -> Reals:
        """‖f(value)‖₂."""
        return self.sizes[..., 1]

    @property
    def last_residual(self) -> Reals:
        """The residual of the iterate evaluated last."""
        return self.sizes[..., 2]

    @property
    def num_steps(self) -> Counts:
        """Steps taken while the problem was active."""
        return self.counts[..., 0]

    @property
    def best_step(self) -> Counts:
        """Steps that lead from the start to `value`."""
        return self.counts[..., 1]

    @property
    def converged(self) -> Flags:
        """The stopping rule holds at `value`."""
        return self.counts[..., 2] > 0

    @property
    def failed(self) -> Flags:
        """The iteration met a residual that is not finite and cannot go on."""
        return self.counts[..., 3] > 0

    def active(self, options: Options) -> Flags:
        """Which problems may take another step."""
        active = ~(self.converged | self.failed)
        if "step_budget" in options:
            # A solve of no steps evaluates f once, for what it reports.
            least = jnp.maximum(options["step_budget"], 1)
            active = active & (self.num_steps < least)
        return active

    def enter(
        self,
        active: Flags,
        residual: Reals,
        norm: Reals,
        converged: Flags,
        recovers: bool | Flags,
        value: PyTree,
        aux: PyTree,
    ) -> "Record":
        """The record with an evaluation of the active problems.

        Args:
            active: the problems that it counts for.
            residual: ‖f(z) − z‖₂.
            norm: ‖f(z)‖₂.
            converged: whether the stopping rule holds.
            recovers: whether the solver can go on from a residual that is not finite.
            value: what to keep should z be the best iterate.
            aux: what the map returned beside its value.
        """
        finite = jnp.isfinite(residual) & jnp.isfinite(norm)
        first = self.num_steps == 0
        improved = first | (finite & ~(self.residual <= residual)) | converged
        take = active & improved
        failed = active & ~finite & ~jnp.asarray(recovers)
        sizes = jnp.stack(
            [
                jnp.where(take, residual, self.residual),
                jnp.where(take, norm, self.norm),
                jnp.where(active, residual, self.last_residual),
            ],
            -1,
        )
        counts = jnp.stack(
            [
                self.num_steps + active.astype(jnp.int32),
                jnp.where(take, self.num_steps, self.best_step),
                (self.converged | (active & converged)).astype(jnp.int32),
                (self.failed | failed).astype(jnp.int32),
            ],
            -1,
        )
        value = _tree.where(take, value, self.value)
        return Record(value, _tree.where(take, aux, self.aux), sizes, counts)

    def with_steps(self, num_steps: Counts) -> "Record":
        """The record with another number of steps."""
        counts = self.counts.at[..., 0].set(num_steps)
        return eqx.tree_at(lambda record: record.counts, self, counts)

    def status(self) -> tuple[Array, optx.RESULTS]:
        """Whether all problems are done, and with what result."""
        done = jnp.all(self.converged | self.failed)
        failed = done & jnp.any(self.failed)
        results = optx.RESULTS
        return done, results.where(failed, results.nonfinite, results.successful)


def statistics(
    residual: Reals,
    norm: Reals,
    converged: Flags,
    num_steps: Counts | None,
    num_evals: Array | None,
) -> dict[str, Any]:
    """The statistics of a solve; see `deqjax.fixed_point`."""
    tiny = jnp.finfo(norm.dtype).tiny
    return {
        "num_steps": num_steps,
        "num_evals": num_evals,
        "residual": residual,
        "relative_residual": residual / jnp.maximum(norm, tiny),
        "converged": converged,
    }
