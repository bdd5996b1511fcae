"""Anderson acceleration of the Picard iteration."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PyTree

from .. import _tree
from .._checks import real, whole
from .._types import Aux, Counts, Flags, Reals, Tolerance, Y
from ._accelerated import AbstractAccelerated
from ._base import check_beta, check_count

# A system of more residuals than this is solved in a loop on every platform.
_WRITTEN_OUT = 11


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
    r"""Anderson acceleration of the Picard iteration.

    $$ z_{k+1} = \sum_{i=k-m}^{k} \alpha_i \bigl( z_i + \beta r_i \bigr), \qquad
       \alpha = \operatorname*{argmin}_{\sum_i \alpha_i = 1}
       \left\lVert \sum_i \alpha_i r_i \right\rVert^2
       + \varrho \sum_i \alpha_i^2 \| r_i \|^2, \qquad r_i = f(z_i) - z_i $$

    | symbol | meaning |
    |---|---|
    | $z_k$, $r_k$ | iterate and its residual |
    | $m$ | `history`: the iterates mixed besides the current one, fewer at first |
    | $\alpha$ | mixing weights |
    | $\beta$ | weight on $f$; 1 is undamped |
    | $\varrho$ | `ridge`, relative to the size of the residuals |

    The whole pytree is mixed with one set of weights per problem. The Gram matrix of
    the residuals gains a row per step and is kept in at least float32, as is the small
    system, which is solved by elimination, without a library call.

    **Safeguards**, per problem: an iterate whose residual is not finite or 10⁴ times
    the smallest, or 10 m steps without a smaller one, empties the history; the solve
    goes back to within a quarter of the way from the best iterate, and on from there by
    steps that are a quarter as long, until they lead on. The best iterate is returned.

    **Cost:** one evaluation per step; f is traced once and compiled once. Beside it,
    about 2 m + 10 reads of a state. **Memory:** 2 m + 8 copies of z.

    **Converges** for contractions (locally, under mild conditions on α), and for many
    maps that are none; for linear f it is GMRES(m) in effect, if the residual falls at
    every step. **Fails** visibly otherwise: `nonlinear_max_steps_reached`, or
    `nonfinite` where f is not finite at the start or again and again.

    Stops when ‖f(z) − z‖ ≤ atol + rtol ‖f(z)‖. With `rtol=None, atol=None` exactly
    `max_steps` steps are taken.

    Args:
        rtol: tolerance relative to ‖f(z)‖, or None. "auto" goes by the coarsest dtype
            of the state: 1e-8 in float64, 1e-4 in float32, 5e-3 in float16, 2e-2 in
            bfloat16.
        atol: absolute tolerance, or None; "auto": a hundredth of the above.
        history: m ≥ 1.
        beta: weight on f, 0 < beta < 2.
        ridge: ϱ ≥ 0; None: ten times the rounding unit of the accumulation.
        min_steps: steps before which the test cannot pass.
        batch_ndim: number of leading axes that index independent problems.

    Raises:
        ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> f = lambda z, _: 0.99 * z + 1
        >>> sol = deqjax.fixed_point(f, jnp.zeros(()), solver=deqjax.Anderson())
        >>> round(float(sol.value), 2), int(sol.stats["num_evals"])
        (100.0, 4)

    References:
        D. G. Anderson (1965), Iterative procedures for nonlinear integral equations,
        doi:10.1145/321296.321305.

        H. F. Walker, P. Ni (2011), Anderson acceleration for fixed-point iterations,
        doi:10.1137/10078356X.
    """

    rtol: Tolerance = eqx.field(default="auto", converter=real)
    atol: Tolerance = eqx.field(default="auto", converter=real)
    history: int = eqx.field(default=5, kw_only=True, converter=whole)
    beta: float | Array = eqx.field(default=1.0, kw_only=True, converter=real)
    ridge: float | Array | None = eqx.field(default=None, kw_only=True, converter=real)
    min_steps: int = eqx.field(default=0, kw_only=True, converter=whole)
    batch_ndim: int = eqx.field(default=0, kw_only=True, converter=whole)

    def __check_init__(self):
        check_count("history", self.history, 1)
        check_beta(self.beta, below=2.0)
        if isinstance(self.ridge, float | int) and not 0 <= self.ridge < 1:
            raise ValueError(
                "`ridge` must satisfy 0 ≤ ridge < 1, or be None for one by dtype; got "
                f"{self.ridge!r}."
            )

    def init_past(self, y: Y) -> _Memory:
        k, length = self.batch_ndim, self.history + 1
        rows = _tree.ring(y, length, k)
        zero = jnp.zeros_like(_tree.norm(y, k))[..., None, None]
        gram = jnp.broadcast_to(zero, (*zero.shape[:k], length, length))
        return _Memory(rows, rows, gram)

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
        k, length = self.batch_ndim, self.history + 1
        slots, slot = jnp.arange(length, dtype=index.dtype), index % length
        here = slots == slot
        weight = self.beta * damping

        def target(y: Array, f: Array) -> Array:
            w = _tree.expand(weight, y).astype(f.dtype)
            return jnp.where(w == 1, f, y + w * (f - y))

        r = _tree.subtract(f, y)
        residuals = _tree.enter(past.residuals, r, slot, k)
        u = jtu.tree_map(target, y, f)
        targets = _tree.enter(past.targets, u, slot, k)
        new = _tree.dots(residuals, r, k)
        gram = jnp.where(here[:, None], new[..., None, :], past.gram)
        gram = jnp.where(here, new[..., :, None], gram)
        back = slot - slots
        back = jnp.where(back < 0, back + length, back)
        alpha = _weights(gram, back <= num_valid[..., None], self.ridge)
        mix = _tree.combine(alpha, targets, y, k)
        z = jtu.tree_map(lambda z, y: z.astype(y.dtype), mix, y)
        return z, _Memory(residuals, targets, gram)


def _weights(gram: Array, valid: Array, ridge: Array | float | None) -> Array:
    """The mixing weights α, 0 where not `valid`, from the Gram matrix G of residuals.

    Gauss–Jordan elimination of the bordered system

        | G + ϱ diag G   1 | | α |   | 0 |
        |      1ᵀ        0 | | μ | = | 1 |

    whose pivots need no exchange, G being positive semidefinite. On a CPU a loop, and
    one whose result is α itself: then XLA makes one pass of the mixing, and few kernels
    of this.
    """
    size = gram.shape[-1]
    if ridge is None:
        ridge = 10 * float(jnp.finfo(gram.dtype).eps)
    diagonal = jnp.eye(size, dtype=bool)
    square = jnp.sum(jnp.where(diagonal, gram, 0), -1)
    valid = valid & jnp.isfinite(square)
    largest = jnp.max(jnp.where(valid, square, 0), -1, keepdims=True)
    unit = jnp.where(largest > 0, 1 / jnp.where(largest > 0, largest, 1), 0)
    # A residual of exactly 0 still needs a pivot.
    tiny = float(jnp.finfo(gram.dtype).tiny) ** 0.5
    pivots = jnp.where(valid, (1 + ridge) * square * unit + tiny, 1)
    pairs = valid[..., :, None] & valid[..., None, :]
    a = jnp.where(pairs, gram * unit[..., None], 0)
    a = jnp.where(diagonal, pivots[..., None], a)
    border = valid.astype(gram.dtype)
    zero, one = jnp.zeros_like(border[..., :1]), jnp.ones_like(border[..., :1])
    columns = [a, border[..., None], jnp.zeros_like(border)[..., None]]
    last = jnp.concatenate([border, zero, one], -1)[..., None, :]
    a = jnp.concatenate([jnp.concatenate(columns, -1), last], -2)
    if size > _WRITTEN_OUT:
        return _eliminate_in_a_loop(a)
    return lax.platform_dependent(
        a, cpu=_eliminate_in_a_loop, default=_eliminate_written_out
    )


def _eliminate_in_a_loop(a: Array) -> Array:
    """x of [A | b] of n rows, without its last entry: few, small kernels on a CPU."""
    rows = a.shape[-2]

    def eliminate(i: Array | int, a: Array) -> Array:
        i = jnp.asarray(i)  # a Python integer under `jax.disable_jit`
        row = lax.dynamic_index_in_dim(a, i, -2)
        column = lax.dynamic_index_in_dim(a, i, -1)
        pivot = lax.dynamic_index_in_dim(column, i, -2)
        row = row / jnp.where(pivot == 0, 1, pivot)
        return jnp.where(
            (jnp.arange(rows, dtype=i.dtype) == i)[:, None], row, a - column * row
        )

    return lax.fori_loop(0, rows, eliminate, a)[..., :-1, -1]


def _eliminate_written_out(a: Array) -> Array:
    """The same entry by entry: one kernel, where every trip of a loop launches some."""
    n = a.shape[-2]
    part = lambda x, i: lax.index_in_dim(x, i, -1, keepdims=False)
    row = [lax.index_in_dim(a, i, -2, keepdims=False) for i in range(n)]
    entry = [[part(x, j) for j in range(n + 1)] for x in row]
    for i in range(n):
        pivot = jnp.where(entry[i][i] == 0, 1, entry[i][i])
        entry[i] = [x / pivot if j > i else x for j, x in enumerate(entry[i])]
        for k in range(n):
            if k != i:
                for j in range(i + 1, n + 1):
                    change = lax.mul(entry[k][i], entry[i][j])
                    entry[k][j] = lax.sub(entry[k][j], change)
    return jnp.stack([entry[i][n] for i in range(n - 1)], -1)
