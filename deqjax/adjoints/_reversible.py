"""The gradient of the reversible iteration, by running it backwards."""

import functools as ft
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .. import _tree
from .._checks import refuse_retired
from .._problem import Problem, Solved
from .._steps import at_step
from .._upstream import unvmap_any
from ..solvers._drive import drive
from ..solvers._reversible import Reversible
from ._base import AbstractAdjoint
from ._cotangents import materialise, none_like
from ._detach import detach
from ._stats import BackwardStats, check_probe
from ._sweeps import Tape, Trace, add, last_evaluated, replay, reverse_sweep


class ReversibleAdjoint(AbstractAdjoint):
    r"""The exact gradient of the steps taken, by undoing them one after the other.

    Backwards from (y_N, z_N), with z̄ the cotangent of the answer and ȳ that of its
    companion (0 unless another solve goes on from it), twice per
    step (a, b being the two states, exchanged at each half step):

    $$ a = \frac{b' - \beta f(a')}{1-\beta}, \quad b = a', \qquad
       \bar a = (1-\beta)\, \bar b', \quad
       \bar b = \bar a' + (\partial_z f(b))^\top \beta \bar b', \quad
       \bar\theta \mathrel{+}= (\partial_\theta f(b))^\top \beta \bar b', \quad
       \bar\beta \mathrel{+}= \langle \bar b', f(b) - a \rangle $$

    The evaluation that rebuilds a state is the one that is pulled back. The gradient
    for z₀ is ȳ₀ + z̄₀.

    Rebuilt by this formula alone, a would be off by the rounding of a', and by as much
    as the second evaluation of f differs from the first, divided by 1 − β; this error
    would grow by 1 / (1 − β) at every half step. The forward pass therefore records a
    few low bits of every state that it overwrites. From these the reverse pass finds
    the state itself, as long as the formula is off by less than their *capacity*. So f
    need not be evaluated to the same bits twice.

    **Exact** to the rounding of one backpropagation wherever the drift is 0: the
    reconstruction ends at the known start, and the largest difference from it is the
    drift, which every backward pass measures. A repair beyond the capacity leaves an
    error that grows up to the start. A drift never passes silently.

    **Cost:** two evaluations with pull-back per step; one more for the gradient through
    `aux`. **Memory:** 6 copies of z, one pull-back of f and one gradient of the
    parameters, whatever the number of steps, and `record_bits` bits per entry of z and
    evaluation.

    Reverse mode. Second derivatives, reverse or forward over this one, are exact too;
    they differentiate the plain loop of `max_steps` steps and keep two states per step.

    Args:
        record_bits: bits to record per entry of z and evaluation, 4, 8 or 16. States
            are rebuilt to a unit that follows the typical size of their row, and that
            is the coarser the fewer the bits, the larger β and the less precise the
            numbers in f. With 8 bits, evaluations of a float32 f may differ by about
            4e-6 of the typical size at β up to 0.9. 16 tolerate and resolve more: for
            an f whose noise is far above its rounding, or β near 1. 4 are for β up to
            0.5.
        on_drift: what the gradient is if the drift of any problem exceeds the
            tolerance: `"nan"`, `"raise"` an error, or `"recompute"` by backpropagation
            through the steps, which keeps two states per step.
        drift_tol: the drift to accept, relative to the largest entry of the states.
        probe: a `BackwardStats` whose gradient is the record of the backward pass; the
            entries that apply are `drift` and `repair`.

    Raises:
        ValueError, TypeError: if the solver is not `deqjax.Reversible`, or an argument
            is not valid.

    Example:
        >>> import deqjax, jax, jax.numpy as jnp
        >>> f = lambda z, a: 0.5 * z + a
        >>> solver = deqjax.Reversible(rtol=None, atol=None, beta=0.5)
        >>> solve = lambda a: deqjax.fixed_point(f, jnp.zeros(()), a, solver=solver,
        ...     max_steps=1).value
        >>> float(jax.grad(solve)(3.0))  # z₁ = a/2 + (a/2)/4
        0.625

    References:
        S. McCallum, K. Arora, J. Foster (2025), Reversible deep equilibrium models,
        doi:10.48550/arXiv.2509.12917.

        D. Maclaurin, D. Duvenaud, R. P. Adams (2015), Gradient-based hyperparameter
        optimization through reversible learning, doi:10.48550/arXiv.1502.03492.
    """

    record_bits: int = eqx.field(default=8, kw_only=True, static=True)
    on_drift: Literal["nan", "raise", "recompute"] = eqx.field(
        default="nan", kw_only=True, static=True
    )
    drift_tol: float | Array = eqx.field(default=0.0, kw_only=True)
    probe: BackwardStats | None = eqx.field(default=None, kw_only=True)

    def __init__(
        self,
        *,
        record_bits: int = 8,
        on_drift: Literal["nan", "raise", "recompute"] = "nan",
        drift_tol: Any = None,
        probe: BackwardStats | None = None,
        **retired: Any,
    ):
        refuse_retired(retired, _RETIRED)
        if record_bits not in (4, 8, 16):
            raise ValueError(f"`record_bits` must be 4, 8 or 16; got {record_bits!r}.")
        if on_drift not in ("nan", "raise", "recompute"):
            raise ValueError(
                f'`on_drift` must be "nan", "raise" or "recompute"; got {on_drift!r}.'
            )
        drift_tol = 0.0 if drift_tol is None else drift_tol
        if not drift_tol >= 0:
            raise ValueError(f"`drift_tol` must be a number ≥ 0; got {drift_tol!r}.")
        check_probe(probe)
        self.record_bits, self.on_drift = int(record_bits), on_drift
        self.drift_tol, self.probe = float(drift_tol), probe

    def solve(self, problem: Problem) -> Solved:
        solver = problem.solver
        if not isinstance(solver, Reversible):
            raise ValueError(
                "`ReversibleAdjoint` undoes the steps of `deqjax.Reversible` and so "
                f"needs it as the solver; got {type(solver).__name__}. Use "
                "`solver=deqjax.Reversible()`, or `deqjax.ImplicitAdjoint()`."
            )
        if problem.max_steps is None:
            raise ValueError(
                "`ReversibleAdjoint` needs a finite `max_steps`; got None."
            )
        start = problem.options.get("companion"), problem.y0
        theta = _Theta(problem.fn, start, problem.args, solver.beta)
        options = {
            name: option
            for name, option in problem.options.items()
            if name not in ("beta", "companion")
        }
        solver = eqx.tree_at(lambda s: s.beta, solver, None)
        rest = problem._replace(
            fn=None, y0=None, args=None, solver=solver, options=options
        )
        plan = _Plan(self.record_bits, self.on_drift, self.drift_tol)
        return detach(_reversible((theta, self.probe), rest, plan), exact=True)


class _Theta(eqx.Module):
    """All that the answer is differentiated by.

    The start is (y₀, z₀), y₀ being None where it is z₀.
    """

    fn: Any
    start: PyTree
    args: PyTree
    betas: PyTree

    def problem(self, rest: Problem) -> Problem:
        """The problem, from which all of this has been taken out."""
        solver = eqx.tree_at(
            lambda s: s.beta, rest.solver, self.betas, is_leaf=lambda x: x is None
        )
        companion, y0 = self.start
        options = dict(rest.options)
        if companion is not None:
            options["companion"] = companion
        return rest._replace(
            fn=self.fn, y0=y0, args=self.args, solver=solver, options=options
        )


class _Plan(eqx.Module):
    """How much is recorded, and what a backward pass does about drift."""

    record_bits: int = eqx.field(static=True)
    on_drift: str = eqx.field(static=True)
    drift_tol: float | Array


@eqx.filter_custom_vjp
def _reversible(
    active: tuple[_Theta, BackwardStats | None], rest: Problem, plan: _Plan
) -> Solved:
    return drive(active[0].problem(rest))


@_reversible.def_fwd
def _reversible_fwd(perturbed, active, rest, plan):
    return _forward(active[0], rest, plan)


@_reversible.def_bwd
def _reversible_bwd(trace, cotangents, perturbed, active, rest, plan):
    ct_pair = cotangents.companion, cotangents.value
    cts = ct_pair, eqx.filter(cotangents.aux, eqx.is_inexact_array)
    theta, probe = active
    p_theta, p_probe = perturbed
    gradient, drift, repair = _backward(theta, cts, trace, p_theta, rest, plan)
    g_probe = none_like(probe)
    if any(jtu.tree_leaves(p_probe)):
        g_probe = probe.record(drift=drift, repair=repair)
    return gradient, g_probe


# For second derivatives of the solve both passes have derivatives of their own, those
# of the plain loop: the arithmetic on remainders has none.


@eqx.filter_custom_jvp
def _forward(theta: _Theta, rest: Problem, plan: _Plan) -> tuple[Solved, Trace]:
    """The solve, and what going back needs."""
    problem = theta.problem(rest)
    solved = drive(problem, tape=Tape.empty(problem, plan.record_bits))
    record = solved.state.record
    steps = record.best_step if rest.solver.keeps_best else record.num_steps
    pair = solved.companion, solved.value
    return solved._replace(tape=None), Trace(pair, steps, solved.tape)


@_forward.def_jvp
def _forward_jvp(primals, tangents):
    theta, rest, _ = primals
    solved, trace = _forward(*primals)
    moving, fixed = _split(theta, tangents[0])
    run = lambda moving: _replay(eqx.combine(moving, fixed), rest, trace)
    _, (t_pair, t_aux) = jax.jvp(run, (moving,), (tangents[0],))
    t_solved = none_like(solved)._replace(aux=t_aux)
    t_solved = t_solved._replace(companion=t_pair[0], value=t_pair[1])
    return (solved, trace), (t_solved, none_like(trace))


@eqx.filter_custom_jvp
def _backward(
    theta: _Theta,
    cts: PyTree,
    trace: Trace,
    perturbed: PyTree,
    rest: Problem,
    plan: _Plan,
) -> PyTree:
    """The gradient where it is asked for, the drift, and the largest repair."""
    moving, fixed = eqx.partition(theta, perturbed)
    solver: Reversible = rest.solver
    _, z0 = theta.start
    moving = eqx.tree_at(lambda m: m.start, moving, None)

    def evaluate(z: PyTree, moving: PyTree, steps: Array) -> tuple[PyTree, PyTree]:
        whole = eqx.combine(moving, fixed)
        f, aux = whole.fn(z, at_step(whole.args, steps))
        return f, eqx.filter(aux, eqx.is_inexact_array)

    def with_weights(moving: PyTree) -> Reversible:
        return eqx.combine(moving, fixed).problem(rest).solver

    (y, z), (ct_pair, ct_aux) = trace.pair, cts
    ct_y, ct_z = (materialise(ct, z0) for ct in ct_pair)
    g_aux = None
    if jtu.tree_leaves(ct_aux):
        # aux came from the last evaluation, or from that which tested the answer.
        point = y if solver.static else z
        at = last_evaluated(trace.steps, solver.static)
        (_, aux), pull = jax.vjp(ft.partial(evaluate, steps=at), point, moving)
        g_z, g_aux = pull((_tree.zeros_like(z0), materialise(ct_aux, aux)))
        ct_y, ct_z = (add(ct_y, g_z), ct_z) if solver.static else (ct_y, add(ct_z, g_z))

    same = solver.static and "step_budget" not in rest.options
    found = reverse_sweep(
        lambda *at: evaluate(*at)[0],
        with_weights,
        moving,
        (ct_y, ct_z),
        theta.start,
        trace,
        rest.max_steps if same else None,
    )
    total = found.moving if g_aux is None else add(found.moving, g_aux)
    g_moving = jtu.tree_map(lambda g, p: g.astype(p.dtype), total, moving)
    with_start = lambda g, start: eqx.tree_at(
        lambda m: m.start, g, start, is_leaf=lambda x: x is None
    )
    gradient = with_start(g_moving, found.start)
    k = solver.batch_ndim
    # One maximum over both: XLA would take that of a constant z₀ while it compiles,
    # which lasts for seconds where z is large.
    larger = lambda a, b: jnp.maximum(jnp.abs(a), jnp.abs(b))
    size = _tree.max_abs(jtu.tree_map(larger, z0, z), k)
    bad = ~(found.drift <= plan.drift_tol * size)
    if plan.on_drift == "recompute":
        again = lambda: _recompute(theta, cts, trace, perturbed, rest)
        found_now = eqx.filter(gradient, perturbed)
        gradient = lax.cond(unvmap_any(jnp.any(bad)), again, lambda: found_now)
    elif plan.on_drift == "nan":
        spoil = lambda t: jnp.where(jnp.any(bad), jnp.nan, t)
        nan = jtu.tree_map(lambda t: jnp.full_like(t, jnp.nan), found.start)
        start = _tree.where(bad, nan, found.start)
        gradient = with_start(jtu.tree_map(spoil, g_moving), start)
    else:
        gradient = eqx.error_if(gradient, jnp.any(bad), _DRIFTED)
    return eqx.filter(gradient, perturbed), found.drift, found.repair


@_backward.def_jvp
def _backward_jvp(primals, tangents):
    theta, cts, trace, perturbed, rest, _ = primals
    out = _backward(*primals)
    moving, fixed = _split((theta, cts), tangents[:2])

    def run(moving: PyTree) -> PyTree:
        theta, cts = eqx.combine(moving, fixed)
        return _recompute(theta, cts, trace, perturbed, rest)

    _, t_gradient = jax.jvp(run, (moving,), (tangents[:2],))
    return out, (t_gradient, None, None)


def _recompute(
    theta: _Theta, cts: PyTree, trace: Trace, perturbed: PyTree, rest: Problem
) -> PyTree:
    """The gradient by backpropagation through the plain loop."""
    moving, fixed = eqx.partition(theta, perturbed)
    run = lambda moving: _replay(eqx.combine(moving, fixed), rest, trace)
    out, pull = jax.vjp(run, moving)
    return pull(materialise(cts, out))[0]


def _replay(theta: _Theta, rest: Problem, trace: Trace) -> PyTree:
    pair, aux = replay(
        theta.fn,
        theta.start,
        theta.args,
        theta.betas,
        steps=lax.stop_gradient(trace.steps),
        max_steps=rest.max_steps,
        static=rest.solver.static,
    )
    return pair, eqx.filter(aux, eqx.is_inexact_array)


def _split(primal: PyTree, tangent: PyTree) -> tuple[PyTree, PyTree]:
    """What has a tangent, and the rest."""
    is_none = lambda t: t is None
    moves = jtu.tree_map(lambda t: not is_none(t), tangent, is_leaf=is_none)
    return eqx.partition(primal, moves)


_RETIRED = {
    "anchors": "states are found again from recorded bits; leave it out, and raise "
    "`record_bits` if evaluations of `fn` differ by more than they repair",
}

_DRIFTED = (
    "The reversible iteration was not undone exactly: the reconstructed start differs "
    "from the known one by more than `drift_tol`, so that the gradient is not that of "
    "the steps taken. Evaluations of `fn` at the same input differ by more than the "
    "recorded bits repair (randomness that no key fixes, or noise far above the "
    "rounding of the states): use `ReversibleAdjoint(record_bits=16)`, or "
    '`on_drift="recompute"`.'
)
