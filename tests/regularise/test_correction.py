"""Intermediate iterates in the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from deqjax.regularise import correction_points, fixed_point_correction
from tests import helpers
from tests.helpers import error, weigh

P = helpers.problem("tanh")
GAMMA = 0.7


def loss(p, args, **kwargs):
    points, sol = correction_points(p.fn, p.z0, args, at=(1, 3), **kwargs)
    return fixed_point_correction([weigh(z) for z in (*points, sol.value)], GAMMA)


def weighted(states):
    return GAMMA**2 * weigh(states[0]) + GAMMA * weigh(states[1]) + weigh(states[2])


def unrolled(p, args):
    z, states = p.z0, []
    for k in range(1, 6):
        z = p.fn(z, args)
        if k in (1, 3, 5):
            states.append(z)
    return weighted(states)


def reversible(p, args):
    # The companion is carried from point to point.
    return weighted(
        [helpers.reversible(p.fn, p.z0, args, steps, 0.5) for steps in (1, 3, 5)]
    )


@pytest.mark.parametrize("kind", ["unrolled", "reversible", "reversible by default"])
def test_values_and_gradients_are_exact_where_the_adjoint_is(kind, x64):
    p = helpers.problem("tanh")
    if kind == "unrolled":
        want_of, solver, adjoint = unrolled, deqjax.Picard, deqjax.UnrolledAdjoint()
    else:
        want_of, solver = reversible, deqjax.Reversible
        adjoint = deqjax.ReversibleAdjoint() if kind == "reversible" else None
    run = lambda a: loss(p, a, max_steps=5, solver=solver(None, None), adjoint=adjoint)
    got = jax.jit(jax.value_and_grad(run))(p.args)
    want = jax.jit(jax.value_and_grad(lambda a: want_of(p, a)))(p.args)
    assert error(got, want) <= 1e-8


@pytest.mark.parametrize(
    "adjoint", [deqjax.ImplicitAdjoint(deqjax.linear.GMRES(1e-12)), deqjax.JFBAdjoint()]
)
def test_under_other_adjoints_points_have_the_gradient_of_one_evaluation(adjoint, x64):
    """The stated rule, and the adjoint's own gradient for the solution."""
    p = helpers.problem("tanh")
    tight = deqjax.Picard(1e-13, 1e-13)
    run = lambda a: loss(p, a, max_steps=300, solver=tight, adjoint=adjoint)
    value, gradient = jax.jit(jax.value_and_grad(run))(p.args)

    iterates = helpers.picard(p, 3)
    z = helpers.settle(p)

    def points(args):
        # z_k, with the gradient of f(z_k).
        held = [p.fn(iterates[k], args) for k in (1, 3)]
        first, second = (
            weigh(iterates[k] + f - jax.lax.stop_gradient(f))
            for k, f in zip((1, 3), held, strict=True)
        )
        return GAMMA**2 * first + GAMMA * second

    dense = helpers.dense(p)
    own = dense.jfb if isinstance(adjoint, deqjax.JFBAdjoint) else dense.gradient
    want = jax.tree.map(jnp.add, jax.jit(jax.grad(points))(p.args), own)
    assert error(value, points(p.args) + weigh(z)) <= 1e-10
    assert error(gradient, want) <= 1e-9


SOLVERS = {
    "picard": (deqjax.Picard(None, None), deqjax.Picard(None, None)),
    "damped, tested": (deqjax.Picard(beta=0.7), deqjax.Picard(None, None, beta=0.7)),
    "reversible, tested": (deqjax.Reversible(), deqjax.Reversible(None, None)),
    "anderson": (deqjax.Anderson(), deqjax.Anderson(None, None)),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(m, marks=pytest.mark.slow) if m == "anderson" else m
        for m in SOLVERS
    ],
)
def test_points_are_the_iterates_of_the_solve_and_leave_it_as_it_is(name):
    solver, untested = SOLVERS[name]
    cell = lambda z, x, key=None: jnp.tanh(-1.5 * z + x)
    x = jnp.linspace(-1, 1, 3)
    points, sol = deqjax.nn.DEQ(cell, solver=solver, max_steps=6).iterates(x, at=(1, 4))
    plain = deqjax.nn.DEQ(cell, solver=solver, max_steps=6).solve(x)
    steps = deqjax.nn.DEQ(cell, solver=untested)
    want = tuple(steps(x, max_steps=k) for k in (1, 4))
    assert error((points, sol.value), (want, plain.value)) <= 1e-6
    for statistic in ("num_steps", "num_evals", "max_steps"):
        assert int(sol.stats[statistic]) == int(plain.stats[statistic])


@pytest.mark.parametrize(
    ("at", "solver"),
    [
        (range(1, 16), deqjax.Reversible(None, None)),
        ((1, 2, 4, 7, 11), deqjax.Reversible(None, None)),
        (range(1, 16), deqjax.Picard(None, None)),
    ],
    ids=["equally spaced", "unequally spaced", "picard"],
)
def test_losses_on_iterates_cost_what_a_loss_on_the_last_one_costs(at, solver):
    counter = helpers.Counter()
    fn = counter.wrap(P.fn)
    adjoint = deqjax.UnrolledAdjoint() if isinstance(solver, deqjax.Picard) else None
    given = {"solver": solver, "adjoint": adjoint, "max_steps": 16}

    def on_all(args):
        points, sol = correction_points(fn, P.z0, args, at=tuple(at), **given)
        return sum(weigh(z) for z in (*points, sol.value))

    def on_the_last(args):
        return weigh(deqjax.fixed_point(fn, P.z0, args, **given).value)

    counts = []
    for run in (on_all, on_the_last):
        gradient = jax.jit(jax.grad(run))
        gradient(P.args)
        counter.reset()
        gradient(P.args)
        counts.append(counter.evaluations)
    assert counts[0] <= counts[1]


def test_many_points_of_a_reversible_solve_have_the_gradient_of_the_steps(x64):
    p = helpers.problem("tanh")
    at = (1, 2, 3, 5, 7, 8)

    def ours(args):
        points, sol = correction_points(
            p.fn, p.z0, args, at=at, max_steps=9, solver=deqjax.Reversible(None, None)
        )
        return sum(weigh(z) * (k + 1) for k, z in enumerate((*points, sol.value)))

    def textbook(args):
        y = z = p.z0
        states = []
        for _ in range(9):
            y = helpers.mix(0.5, y, p.fn(z, args))
            z = helpers.mix(0.5, z, p.fn(y, args))
            states.append(z)
        return sum(weigh(states[m - 1]) * (k + 1) for k, m in enumerate((*at, 9)))

    got, want = (jax.jit(jax.value_and_grad(f))(p.args) for f in (ours, textbook))
    assert error(got, want) <= 1e-13


def test_a_layer_gives_its_iterates():
    w, x = P.args
    cell = lambda z, x, key=None: P.fn(z, (w, x))
    solver = deqjax.Picard(None, None)
    deq = deqjax.nn.DEQ(
        cell, solver=solver, adjoint=deqjax.UnrolledAdjoint(), max_steps=4
    )
    points, sol = deq.iterates(x, at=(1, 2))
    want = helpers.picard(P, 4)
    assert error((points, sol.value), ((want[1], want[2]), want[4])) <= 1e-6


def test_weights_fall_with_the_distance_from_the_end():
    losses = [jnp.array(float(10**k)) for k in range(4)]
    got = fixed_point_correction(losses, 0.8)
    want = sum(0.8 ** (4 - k - 1) * 10.0**k for k in range(4))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert float(fixed_point_correction(losses, 0)) == 1000


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: loss(P, P.args, max_steps=3), "`at` must grow.*= 3.*1, 3"),
        (
            lambda: correction_points(P.fn, P.z0, P.args, at=(0,)),
            "`at` must be an integer ≥ 1; got 0",
        ),
        (
            lambda: loss(P, P.args, max_steps=5, options={"step_budget": 2}),
            "single solve",
        ),
        (lambda: fixed_point_correction([]), "at least one"),
        (lambda: fixed_point_correction([jnp.ones(())], 1.5), "`gamma`.*1.5"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()
