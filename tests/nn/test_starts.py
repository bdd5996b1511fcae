"""Where solves start."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax.nn import DEQ, LearnedStart, NoisyStart, RevDEQ, solve_stream
from deqjax.regularise import start_penalty
from tests import helpers
from tests.helpers import error

W = helpers.weights(jr.key(0), 4)
X = jnp.linspace(-1, 1, 8).reshape(2, 4)


class Cell(eqx.Module):
    w: jax.Array

    def __call__(self, z, x, *, key=None):
        return jnp.tanh(z @ self.w + x)


ONCE = {"solver": deqjax.Picard(None, None), "max_steps": 1}


def test_a_start_is_used_unless_one_is_given():
    start = LearnedStart((4,), batch_ndim=1)
    start = eqx.tree_at(lambda s: s.value, start, jnp.arange(4.0))
    deq = DEQ(Cell(W), start=start, **ONCE)
    assert error(deq(X), jnp.tanh(jnp.arange(4.0) @ W + X)) <= 1e-6
    assert error(deq(X, z0=jnp.ones((2, 4))), jnp.tanh(jnp.ones(4) @ W + X)) <= 1e-6


def test_a_learned_start_is_trained_through_the_steps_but_not_through_equilibria():
    loss = lambda deq: helpers.weigh(deq(X))
    start = LearnedStart((4,), batch_ndim=1)
    reversible = RevDEQ(Cell(W), num_steps=2, start=start)
    got = eqx.filter_jit(eqx.filter_grad(loss))(reversible).start.value

    def plain(value):
        fn = lambda z, a: jnp.tanh(z @ W + X)
        z0 = jnp.broadcast_to(value, (2, 4))
        return helpers.weigh(helpers.reversible(fn, z0, None, 2, 0.5))

    assert error(got, jax.jit(jax.grad(plain))(jnp.zeros(4))) <= 1e-5
    implicit = DEQ(Cell(W), start=start, solver=deqjax.Picard())
    got = eqx.filter_jit(eqx.filter_grad(loss))(implicit).start.value
    np.testing.assert_array_equal(got, 0)


def test_a_penalty_trains_a_start_without_changing_the_equilibrium():
    solver = deqjax.Picard(1e-6, 1e-6, batch_ndim=1)
    deq = DEQ(Cell(W), start=LearnedStart((4,), batch_ndim=1), solver=solver)

    def loss(deq):
        sol = deq.solve(X)
        z0 = deq.initial_state(X)
        return jnp.sum(start_penalty(z0, sol.value, batch_ndim=1))

    gradient = eqx.filter_jit(eqx.filter_grad(loss))(deq)
    np.testing.assert_array_equal(gradient.cell.w, 0)
    want = -2 / 4 * jnp.sum(deq(X), axis=0)
    assert error(gradient.start.value, want) <= 1e-4


def test_noise_is_that_of_the_key_and_of_the_scale():
    x = jnp.zeros((40, 50))
    start = NoisyStart(lambda x: x + 3, scale=0.2)
    noise = np.asarray(start(x, key=jr.key(0)) - 3)
    assert abs(noise.std() / 0.2 - 1) < 0.05
    assert abs(noise.mean()) < 4 * 0.2 / 2000**0.5
    assert error(start(x, key=jr.key(1)), start(x, key=jr.key(0))) > 1e-2
    np.testing.assert_array_equal(start(x), x + 3)
    quiet = eqx.nn.inference_mode(start)
    np.testing.assert_array_equal(quiet(x, key=jr.key(0)), x + 3)
    deq = DEQ(Cell(W), start=NoisyStart(scale=0.2), solver=deqjax.Picard(1e-6, 1e-6))
    assert error(deq(X, key=jr.key(0)), deq(X, key=jr.key(1))) <= 1e-5


def frames():
    """A slowly moving input."""
    t = jnp.arange(4.0)[:, None]
    return jnp.sin(0.05 * t + jnp.arange(4.0))


def test_streams_are_solved_frame_by_frame_from_the_one_before():
    deq = DEQ(Cell(W), solver=deqjax.Picard(1e-5, 1e-6))
    values, stats = jax.jit(lambda x: solve_stream(deq, x))(frames())
    for x, z in zip(frames(), values, strict=True):
        assert error(deq(x), z) <= 1e-4
    cold = [int(deq.solve(x).stats["num_steps"]) for x in frames()]
    steps = stats["num_steps"].tolist()
    assert steps[0] == cold[0]
    assert all(a < b for a, b in zip(steps[1:], cold[1:], strict=True))
    warm, _ = solve_stream(deq, frames()[:1], z0=values[0])
    assert error(warm[0], values[0]) <= 1e-4


@pytest.mark.parametrize("carry", [False, True], ids=["stopped", "carried"])
def test_gradients_of_streams_stop_between_frames_or_do_not(carry):
    deq = RevDEQ(Cell(W), num_steps=1)

    def loss(x):
        values, _ = solve_stream(deq, x, carry_gradient=carry)
        return helpers.weigh(values[1])

    def plain(x):
        step = lambda z, x: helpers.reversible(
            lambda z, a: jnp.tanh(z @ W + a), z, x, 1, 0.5
        )
        z = step(jnp.zeros(4), x[0])
        return helpers.weigh(step(z if carry else jax.lax.stop_gradient(z), x[1]))

    x = frames()[:2]
    got, want = jax.jit(jax.grad(loss))(x), jax.jit(jax.grad(plain))(x)
    assert error(got[1], want[1]) <= 1e-5
    if carry:
        assert error(got[0], want[0]) <= 1e-5
    else:
        np.testing.assert_array_equal(got[0], 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DEQ(Cell(W), start=X), "`start` must be callable"),
        (lambda: LearnedStart((4,), batch_ndim=-1), "`batch_ndim`.*-1"),
        (lambda: LearnedStart((4, -1)), "`shape`.*-1"),
        (lambda: solve_stream(DEQ(Cell(W)), X[:0]), "at least one frame"),
        (lambda: NoisyStart(scale=-1.0), "`scale`.*-1"),
        (
            lambda: solve_stream(DEQ(Cell(W)), {"a": X, "b": X[:1]}),
            r"one length.*\(1,\), \(2,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()
