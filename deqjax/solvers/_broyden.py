"""Broyden's good method with limited memory."""

from dataclasses import field

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .. import _tree
from .._types import Aux, Counts, Reals, Tolerance, Y
from ._accelerated import AbstractAccelerated, turn
from ._base import check_count


class _Memory(eqx.Module):
    """The last m steps s = zₖ₊₁ − zₖ, in a ring.

    Attributes:
        step: the step that led to the iterate.
        steps: the ring of steps.
        squares: ‖s‖² of its rows.
        chain: row t gives the coefficient of step t, as a function of the inner
            products of the steps with a vector: the update formula, multiplied out.
        scale: σ of B₀ = −I / σ.
    """

    step: PyTree
    steps: PyTree
    squares: Float[Array, "*batch m"]
    chain: Float[Array, "*batch m m"]
    scale: Reals


class Broyden(AbstractAccelerated[Y, Aux, _Memory]):
    """Broyden."""

    rtol: Tolerance = 1e-4
    atol: Tolerance = 1e-6
    history: int = field(default=10, kw_only=True)
    min_steps: int = field(default=0, kw_only=True)
    batch_ndim: int = field(default=0, kw_only=True)

    def __check_init__(self):
        check_count("history", self.history, 1)

    def remember(self, y: Y) -> _Memory:
        k, m = self.batch_ndim, self.history
        zero = jnp.zeros_like(_tree.norm(y, k))
        full = lambda *shape: jnp.broadcast_to(
            zero.reshape(zero.shape + (1,) * len(shape)), (*zero.shape, *shape)
        )
        rows = _tree.ring(y, m, k)
        return _Memory(_tree.zeros_like(y), rows, full(m), full(m, m), zero + 1)

    def propose(
        self,
        y: Y,
        f: Y,
        memory: _Memory,
        index: Array,
        age: Counts,
        damping: Reals,
    ) -> tuple[Y, _Memory]:
        k, m = self.batch_ndim, self.history
        slots = jnp.arange(m)
        new = index % m
        here, next_ = slots == new, slots == (new + 1) % m
        back = new - slots
        # A full memory is emptied: better than to let the oldest step drop out.
        age = jnp.where(age > 0, age % (m + 1), 0)
        valid = jnp.where(back < 0, back + m, back) < age[..., None]
        sigma = jnp.where(age > 0, memory.scale, damping)
        r = _tree.subtract(f, y)
        steps = _tree.enter(memory.steps, memory.step, new, k)
        with_step = jnp.where(valid, _tree.dots(steps, memory.step, k), 0)
        with_residual = jnp.where(valid, _tree.dots(steps, r, k), 0)

        square = jnp.sum(jnp.where(here, with_step, 0), -1, keepdims=True)
        squares = jnp.where(here, square, memory.squares)
        inverse = lambda x: jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)
        chain = jnp.where(next_[:, None] | here, 0, memory.chain)
        ahead = (with_step * inverse(square))[..., :, None]
        row = here + jnp.sum(ahead * chain, -2)
        row = jnp.where((age > 0)[..., None] & jnp.isfinite(row), row, 0)
        b = sigma[..., None] * with_residual * inverse(squares)
        weights = jnp.sum(chain * b[..., None, :], -1)
        gap = 1 - jnp.sum(row * b, -1)
        # A direction along which I − J is singular to rounding: no update.
        eps = float(jnp.finfo(gap.dtype).eps)
        gap = jnp.where(jnp.abs(gap) > 10 * eps, gap, 1)

        def leaf(r: Array, c: Array, y: Array) -> Array:
            s = (_tree.expand(sigma, r) * r + c) / _tree.expand(gap, r)
            return jnp.where(jnp.isfinite(s), s, 0).astype(y.dtype)

        step = jtu.tree_map(leaf, r, _tree.combine(weights, steps, y, k), y)
        chain = jnp.where(next_[:, None], row[..., None, :], chain)
        memory = _Memory(step, steps, squares, chain, sigma)
        return jtu.tree_map(jnp.add, y, step), memory
