"""Anderson acceleration of the Picard iteration."""

from dataclasses import field

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PyTree

from .. import _tree
from .._types import Aux, Counts, Reals, Tolerance, Y
from ._accelerated import AbstractAccelerated, turn
from ._base import check_beta, check_count


class _Memory(eqx.Module):
    """The last m + 1 evaluations, in rings.

    Attributes:
        residuals: rows r = f(z) − z.
        targets: rows u = z + β r.
        gram: inner products of the residuals.
    """

    residuals: PyTree
    targets: PyTree
    gram: Float[Array, "*batch rows rows"]


class Anderson(AbstractAccelerated[Y, Aux, _Memory]):
    """Anderson."""

    rtol: Tolerance = 1e-4
    atol: Tolerance = 1e-6
    history: int = field(default=5, kw_only=True)
    beta: float | Array = field(default=1.0, kw_only=True)
    ridge: float | Array | None = field(default=None, kw_only=True)
    min_steps: int = field(default=0, kw_only=True)
    batch_ndim: int = field(default=0, kw_only=True)

    def __check_init__(self):
        check_count("history", self.history, 1)
        check_beta(self.beta, below=2.0)

    def remember(self, y: Y) -> _Memory:
        k, length = self.batch_ndim, self.history + 1
        rows = _tree.ring(y, length, k)
        zero = jnp.zeros_like(_tree.norm(y, k))[..., None, None]
        gram = jnp.broadcast_to(zero, (*zero.shape[:k], length, length))
        return _Memory(rows, rows, gram)

    def propose(
        self,
        y: Y,
        f: Y,
        memory: _Memory,
        index: Array,
        age: Counts,
        damping: Reals,
    ) -> tuple[Y, _Memory]:
        k, length = self.batch_ndim, self.history + 1
        slots, slot = jnp.arange(length), index % length
        here = slots == slot
        weight = self.beta * damping

        def target(y: Array, f: Array) -> Array:
            w = _tree.expand(weight, y).astype(f.dtype)
            return jnp.where(w == 1, f, y + w * (f - y))

        r = _tree.subtract(f, y)
        residuals = _tree.enter(memory.residuals, r, slot, k)
        u = jtu.tree_map(target, y, f)
        targets = _tree.enter(memory.targets, u, slot, k)
        new = _tree.dots(residuals, r, k)
        gram = jnp.where(here[:, None], new[..., None, :], memory.gram)
        gram = jnp.where(here, new[..., :, None], gram)
        back = slot - slots
        back = jnp.where(back < 0, back + length, back)
        alpha = _weights(gram, back <= age[..., None], self.ridge)
        mix = _tree.combine(alpha, targets, y, k)
        z = jtu.tree_map(lambda z, y: z.astype(y.dtype), mix, y)
        return z, _Memory(residuals, targets, gram)


def _weights(gram: Array, valid: Array, ridge: Array | float | None) -> Array:
    """α that minimises ‖Σ αᵢ rᵢ‖² + ridge Σ αᵢ² ‖rᵢ‖² with Σ αᵢ = 1.

    Gauss–Jordan elimination of the bordered system

        | G + ridge diag G   1 | | α |   | 0 |
        |        1ᵀ          0 | | μ | = | 1 |

    whose pivots need no exchange: G is positive semidefinite. A loop, not a library
    call; its result is α itself, so that the mixing of iterates is one pass.
    """
    size = gram.shape[-1]
    if ridge is None:
        ridge = 10 * float(jnp.finfo(gram.dtype).eps)
    square = jnp.sum(jnp.where(jnp.eye(size, dtype=bool), gram, 0), -1)
    largest = jnp.max(jnp.where(valid, square, 0), -1)[..., None, None]
    unit = 1 / jnp.where(largest > 0, largest, 1)
    both = valid[..., :, None] & valid[..., None, :]
    border = valid.astype(gram.dtype)
    a = jnp.where(both, gram, 0) * unit
    damped = jnp.where(valid, (1 + ridge) * square, 1)
    a = jnp.where(jnp.eye(size, dtype=bool), damped[..., None] * unit, a)
    a = jnp.concatenate([a, border[..., None], 0 * border[..., None]], -1)
    last = jnp.concatenate([border, jnp.zeros_like(border[..., :1]), 1 + 0*border[..., :1]], -1)
    a = jnp.concatenate([a, last[..., None, :]], -2)

    def eliminate(i: Array, a: Array) -> Array:
        row = lax.dynamic_index_in_dim(a, i, -2)
        column = lax.dynamic_index_in_dim(a, i, -1)
        pivot = lax.dynamic_index_in_dim(column, i, -2)
        row = row / jnp.where(pivot == 0, 1, pivot)
        return jnp.where((jnp.arange(size + 1) == i)[:, None], row, a - column * row)

    return lax.fori_loop(0, size + 1, eliminate, a)[..., :-1, -1]
