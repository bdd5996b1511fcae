"""Broyden's good method with limited memory."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .. import _tree
from .._checks import real, whole
from .._types import Aux, Counts, Flags, Reals, Tolerance, Y
from ._accelerated import AbstractAccelerated
from ._base import check_count
from ._drive import State


class _Memory(eqx.Module):
    """The last m steps s = zₖ₊₁ − zₖ, in a ring, and the update formula multiplied out.

    Attributes:
        step: the step that led to the iterate.
        steps: the ring of steps.
        squares: ‖s‖² of its rows.
        chain: row t is the weight of step t in B⁻¹ v, as a function of ⟨sᵢ, v⟩ / ‖sᵢ‖²
            for the steps i of the ring.
        scale: σ of B₀ = I / σ.
    """

    step: PyTree
    steps: PyTree
    squares: Float[Array, "*batch m"]
    chain: Float[Array, "*batch m m"]
    scale: Reals


class Broyden(AbstractAccelerated[Y, Aux, _Memory]):
    r"""Broyden's good method, with limited memory, on $g(z) = z - f(z) = 0$.

    $$ z_{k+1} = z_k + s_k, \quad B_k s_k = f(z_k) - z_k, \qquad
       B_{k+1} = B_k + \frac{g(z_{k+1})\, s_k^\top}{\| s_k \|^2}, \quad B_0 = I $$

    | symbol | meaning |
    |---|---|
    | $z_k$, $s_k$ | iterate and step |
    | $B_k$ | estimate of I − J, updated along the last step |

    The inverse is a product of factors made of the steps alone,

    $$ B_{k+1}^{-1} = \Bigl( I + \frac{s_{k+1} s_k^\top}{\| s_k \|^2} \Bigr)
       B_k^{-1}, $$

    so that one ring of steps is all the history there is; what the factors come to is
    kept multiplied out in an m × m triangle that gains a row per step. After
    m = `history` steps the memory is emptied, which serves better than to let the
    oldest step drop out. One estimate per problem, for the whole pytree.

    **Safeguards**, per problem: as of `deqjax.Anderson`; and no update along a
    direction in which B is singular to rounding.

    **Cost:** one evaluation per step; f is traced once and compiled once. Beside it,
    about 3 m + 10 reads of a state. **Memory:** m + 9 copies of z.

    **Converges** superlinearly near a fixed point where I − J is nonsingular, if the
    memory lasts, whether or not f contracts. **Fails** visibly otherwise:
    `nonlinear_max_steps_reached`, or `nonfinite` where f is not finite at the start or
    again and again.

    Stops when ‖f(z) − z‖ ≤ atol + rtol ‖f(z)‖. With `rtol=None, atol=None` exactly
    `max_steps` steps are taken.

    Args:
        rtol: tolerance relative to ‖f(z)‖, or None. "auto" goes by the coarsest dtype
            of the state: 1e-8 in float64, 1e-4 in float32, 5e-3 in float16, 2e-2 in
            bfloat16.
        atol: absolute tolerance, or None; "auto": a hundredth of the above.
        history: m ≥ 1, the steps in memory.
        min_steps: steps before which the test cannot pass.
        batch_ndim: number of leading axes that index independent problems.

    Raises:
        ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> f = lambda z, _: 0.99 * z + 1
        >>> sol = deqjax.fixed_point(f, jnp.zeros(()), solver=deqjax.Broyden())
        >>> round(float(sol.value), 2), int(sol.stats["num_evals"])
        (100.0, 3)

    References:
        C. G. Broyden (1965), A class of methods for solving nonlinear simultaneous
        equations, doi:10.1090/S0025-5718-1965-0198670-6.

        C. T. Kelley (1995), Iterative methods for linear and nonlinear equations,
        section 7.3, doi:10.1137/1.9781611970944.
    """

    rtol: Tolerance = eqx.field(default="auto", converter=real)
    atol: Tolerance = eqx.field(default="auto", converter=real)
    history: int = eqx.field(default=10, kw_only=True, converter=whole)
    min_steps: int = eqx.field(default=0, kw_only=True, converter=whole)
    batch_ndim: int = eqx.field(default=0, kw_only=True, converter=whole)

    def __check_init__(self):
        check_count("history", self.history, 1)

    def init_past(self, y: Y) -> _Memory:
        k, m = self.batch_ndim, self.history
        zero = jnp.zeros_like(_tree.norm(y, k))
        full = lambda *shape: jnp.broadcast_to(
            zero.reshape(zero.shape + (1,) * len(shape)), (*zero.shape, *shape)
        )
        rows = _tree.ring(y, m, k)
        return _Memory(_tree.zeros_like(y), rows, full(m), full(m, m), zero + 1)

    def extrapolate(
        self,
        y: Y,
        f: Y,
        past: _Memory,
        index: Array,
        num_valid: Counts,
        damping: Reals,
        active: Flags,
    ) -> tuple[Y, _Memory]:
        k, m = self.batch_ndim, self.history
        slots, slot = jnp.arange(m, dtype=index.dtype), index % m
        here, next_ = slots == slot, slots == (slot + 1) % m
        age = jnp.where(num_valid > 0, num_valid % (m + 1), 0)
        back = slot - slots
        valid = jnp.where(back < 0, back + m, back) < age[..., None]
        sigma = jnp.where(age > 0, past.scale, damping)

        r = _tree.subtract(f, y)
        steps = _tree.enter(past.steps, past.step, slot, k, active)
        with_step = jnp.where(valid, _tree.dots(steps, past.step, k), 0)
        with_residual = jnp.where(valid, _tree.dots(steps, r, k), 0)
        square = jnp.sum(jnp.where(here, with_step, 0), -1, keepdims=True)
        squares = jnp.where(here, square, past.squares)

        # σ r goes through the factors, the oldest first. The weight of step t is what
        # factor t − 1 met: ⟨sₜ₋₁, ·⟩ / ‖sₜ₋₁‖² of what the older ones had made of it.
        # The newest step overwrites the oldest, and has no weight yet: its factor is
        # the one that makes the next step, which stands on both sides there.
        chain = jnp.where(next_[:, None] | here, 0, past.chain)
        ahead = (with_step * _inverse(square))[..., None] * chain
        newest = here.astype(chain.dtype) + jnp.sum(ahead, -2)
        newest = jnp.where((age > 0)[..., None] & jnp.isfinite(newest), newest, 0)
        b = sigma[..., None] * with_residual * _inverse(squares)
        weights = jnp.sum(chain * b[..., None, :], -1)
        gap = 1 - jnp.sum(newest * b, -1)
        gap = jnp.where(jnp.abs(gap) > 10 * float(jnp.finfo(gap.dtype).eps), gap, 1)

        def leaf(r: Array, older: Array, y: Array) -> Array:
            s = (_tree.expand(sigma, r) * r + older) / _tree.expand(gap, r)
            return jnp.where(jnp.isfinite(s), s, 0).astype(y.dtype)

        step = jtu.tree_map(leaf, r, _tree.combine(weights, steps, y, k), y)
        z = jtu.tree_map(jnp.add, y, step)
        chain = jnp.where(next_[:, None], newest[..., None, :], chain)
        # What has ended keeps its estimate; the ring has kept its steps.
        old = (past.step, past.squares, past.chain, past.scale)
        kept = _tree.where(active, (step, squares, chain, sigma), old)
        return z, _Memory(kept[0], steps, *kept[1:])

    @_tree.lenient
    def estimate(self, state: State, v: PyTree, transposed: bool) -> PyTree:
        """B⁻¹ v or B⁻ᵀ v, with the B ≈ I − J that a solve has ended with.

        `state` is that of the `optimistix.Solution`.
        """
        k, m = self.batch_ndim, self.history
        past, age = state.memory.past, state.memory.trail[..., 0] - 1
        age = jnp.where(age > 0, age % (m + 1), 0)[..., None]
        slots = jnp.arange(m, dtype=age.dtype)
        back = (state.record.num_steps - 1)[..., None] % m - slots
        back = jnp.where(back < 0, back + m, back)
        valid, next_ = back < age, back == m - 1

        inner = _tree.dots(past.steps, v, k)
        scale = past.scale[..., None] * _inverse(past.squares)
        # The step made last is in no slot yet; the next one is to be its own.
        if transposed:
            newest = _tree.dot(past.step, v, k)[..., None]
            inner = jnp.where(next_, newest, inner)
            weights = jnp.sum(past.chain * inner[..., :, None], -2)
            weights, last = jnp.where(valid, scale * weights, 0), None
        else:
            b = jnp.where(valid, scale * inner, 0)
            weights = jnp.sum(past.chain * b[..., None, :], -1)
            last = jnp.sum(jnp.where(next_, weights, 0), -1)
            weights = jnp.where(next_, 0, weights)

        def leaf(v: Array, rest: Array, step: Array) -> Array:
            out = _tree.expand(past.scale, rest) * v.astype(rest.dtype) + rest
            if last is not None:
                out = out + _tree.expand(last, rest) * step.astype(rest.dtype)
            return out.astype(v.dtype)

        rest = _tree.combine(weights, past.steps, v, k)
        return jtu.tree_map(leaf, v, rest, past.step)


def _inverse(x: Array) -> Array:
    """1/x, and 0 where x is."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)
