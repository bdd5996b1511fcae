"""Phantom gradients: a few damped steps at the answer, differentiated."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._checks import check_beta, check_count, real, whole
from .._problem import Problem, Solved
from .._types import Flags, Map
from .._upstream import UNROLL
from ..solvers._base import relax
from ..solvers._drive import drive
from ._base import AbstractAdjoint
from ._cotangents import constant, floating, materialise, none_like
from ._detach import detach
from ._inverse import measured
from ._shield import report, safe_point, silence, silence_aux
from ._stats import BackwardStats, check_probe


class PhantomAdjoint(AbstractAdjoint):
    r"""A biased gradient: that of k damped steps taken from the answer.

    $$ \bar\theta = \Big(\frac{\partial u_k}{\partial \theta}\Big)^\top \bar z, \qquad
       u_{t+1} = (1-\beta)\, u_t + \beta f(u_t, \theta), \qquad u_0 = z^* $$

    | symbol | meaning |
    |---|---|
    | $u_0$ | the answer, taken as a constant |
    | $k$ | `num_steps` |
    | $\beta$ | weight on f, as everywhere |

    The value of the solve stays z*: the steps are there for the gradient alone. At a
    fixed point they stay there too, and the gradient is that of `NeumannAdjoint` with
    the same k and β, with its bias −((1 − β) I + βJᵀ)ᵏ λ*.

    **Cost:** k evaluations of f with pull-back, and one more if `aux` has a gradient or
    a probe is given.
    **Memory:** the activations of k steps.

    Reverse mode only. A gradient of the gradient takes z* in it for phantom again.
    The gradient of `aux` goes through z* likewise.

    **Not converged:** the steps move on from the z* that was returned, and their
    gradient is exact for them (`forward_residual` of the probe says how far z* was
    from a fixed point). A problem whose z* is not finite takes no part.

    Args:
        num_steps: steps to differentiate.
        beta: weight on f, 0 < beta < 2.
        probe: a `BackwardStats` whose gradient is the record of the backward pass: the
            residual that λ, the cotangent of a zero added to f, leaves in the adjoint
            system at z*, for one more product.

    Raises:
        ValueError, TypeError: if an argument is not valid, or the problem not a
            fixed-point problem.

    Example:
        >>> import deqjax, jax, jax.numpy as jnp
        >>> f = lambda z, a: 0.5 * z + a
        >>> adjoint = deqjax.PhantomAdjoint(num_steps=3, beta=1.0)
        >>> solve = lambda a: deqjax.fixed_point(
        ...     f, jnp.zeros(()), a, solver=deqjax.Picard(), adjoint=adjoint).value
        >>> float(jax.grad(solve)(3.0))  # 1 + 1/2 + 1/4; exact: 2
        1.75

    References:
        Z. Geng, X.-Y. Zhang, S. Bai, Y. Wang, Z. Lin (2021), On training implicit
        models, doi:10.48550/arXiv.2111.05177.
    """

    num_steps: int = eqx.field(default=5, static=True, converter=whole)
    beta: float | Array = eqx.field(default=0.5, converter=real)
    probe: BackwardStats | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        check_count("num_steps", self.num_steps, 1)
        check_beta(self.beta, below=2.0)
        check_probe(self.probe)

    def solve(self, problem: Problem) -> Solved:
        self.check_fixed_point(problem)
        theta = (problem.fn, problem.args, self.probe)
        rest, beta = constant((problem._replace(fn=None, args=None), self.beta))
        return detach(_phantom(theta, rest, self.num_steps, beta))


@eqx.filter_custom_vjp
def _phantom(
    theta: PyTree, rest: Problem, num_steps: int, beta: float | Array
) -> Solved:
    fn, args, _ = theta
    return drive(rest._replace(fn=fn, args=args))


@_phantom.def_fwd
def _phantom_fwd(perturbed, theta, rest, num_steps, beta):
    # Itself, for the gradient of the gradient.
    solved = _phantom(theta, rest, num_steps, beta)
    return solved, (solved.value, floating(solved.aux))


@_phantom.def_bwd
def _phantom_bwd(residuals, cotangents, perturbed, theta, rest, num_steps, beta):
    value, seen = residuals
    fn, args, probe = theta
    p_fn, p_args, p_probe = perturbed
    moving, fixed = eqx.partition((fn, args), (p_fn, p_args))
    k = rest.batch_ndim
    live = _tree.all_finite(value, k)
    start = safe_point(value, rest.y0, live)

    def evaluate(z: PyTree, moving: PyTree) -> tuple[PyTree, PyTree]:
        fn, args = eqx.combine(moving, fixed)
        f, aux = fn(z, args)
        return f, floating(aux)

    ct_value, ct_aux = cotangents.value, floating(cotangents.aux)
    has_aux = bool(jtu.tree_leaves(ct_aux))
    no_aux = _tree.zeros_like(jax.eval_shape(evaluate, start, moving)[1])
    ct_value, ct_aux = materialise((ct_value, ct_aux), (start, no_aux))

    zero = _tree.zeros_like(start)
    run = lambda moving, shift: _steps(
        lambda z, m: evaluate(z, m)[0], start, moving, shift, num_steps, beta, k
    )
    _, pull_steps, kept = jax.vjp(run, moving, zero, has_aux=True)
    live = live & kept
    ct_value, ct_aux = silence(live, ct_value), silence_aux(live, ct_aux, seen)

    probing = any(jtu.tree_leaves(p_probe))
    gradient, f, pull = jtu.tree_map(jnp.zeros_like, moving), start, None
    if has_aux or probing:
        (f, _), pull = jax.vjp(evaluate, start, moving)
        g_z, gradient = pull((zero, ct_aux))
        ct_value = jtu.tree_map(jnp.add, ct_value, silence(live, g_z))
    through, adjoint = pull_steps(ct_value)
    gradient = jtu.tree_map(jnp.add, gradient, through)

    g_probe = none_like(probe)
    if pull is not None and probing:
        transposed = lambda x: jtu.tree_map(
            jnp.subtract, x, pull((x, _tree.zeros_like(no_aux)))[0]
        )
        entries: dict[str, Any] = {
            **measured(transposed, adjoint, ct_value, k),
            "num_products": jnp.array(num_steps - 1),
            "forward_residual": _tree.norm(_tree.subtract(f, start), k),
        }
        g_probe = probe.record(**report(live, entries))
    g_fn, g_args = gradient
    return g_fn, g_args, g_probe


def _steps(
    fn: Map,
    z: PyTree,
    moving: PyTree,
    shift: PyTree,
    count: int,
    beta: float | Array,
    batch_ndim: int,
) -> tuple[PyTree, Flags]:
    """`count` damped steps of fn + shift from z, and which problems took them all.

    The others stay at the last finite z, so that none makes NaN on the way back.
    """

    def step(val: tuple[PyTree, Flags], _: None) -> tuple[tuple[PyTree, Flags], None]:
        z, kept = val
        shifted = jtu.tree_map(jnp.add, fn(z, moving), shift)
        new = relax(z, shifted, beta)
        kept = kept & _tree.all_finite(new, batch_ndim)
        return (_tree.where(kept, new, z), kept), None

    val = z, _tree.all_finite(z, batch_ndim)
    if count > UNROLL:
        return lax.scan(step, val, None, length=count)[0]
    for _ in range(count):
        val, _ = step(val, None)
    return val
