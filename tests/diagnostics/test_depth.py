"""Iterations whose fate is known."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax.diagnostics import depth_report


def turn(z, angle):
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([c * z[0] - s * z[1], s * z[0] + c * z[1]])


def logistic(z, r):
    return r * z * (1 - z)


START = jnp.array([1.0, 0.5])


@pytest.mark.parametrize(
    ("fn", "args", "z0", "sentence"),
    [
        (lambda z, a: a * z + 1, 0.5, START, "settles"),
        (lambda z, a: a * z + 1, 0.98, START, "settles"),
        (turn, 2 * np.pi / 5, START, "cycles with a period of 5 steps"),
        (logistic, 3.2, jnp.array([0.3]), "cycles with a period of 2 steps"),
        (logistic, 3.5, jnp.array([0.3]), "cycles with a period of 4 steps"),
        (lambda z, a: z + a, 0.1, START, "drifts: neither settles nor returns"),
        (lambda z, a: a * z, 1.1, START, "drifts: neither settles nor returns"),
        (lambda z, a: a * z**2, 2.0, START, "diverges: the states are not finite"),
    ],
)
def test_verdicts_of_planted_maps(fn, args, z0, sentence):
    assert depth_report(fn, z0, args, max_steps=80).verdicts == [sentence]


def test_a_batch_has_a_verdict_for_each():
    # A rotation that shrinks, one that does not, and a shift.
    def fn(z, args):
        rate, push = args
        return rate[:, None] * jnp.stack([-z[:, 1], z[:, 0]], 1) + push[:, None]

    args = jnp.array([0.5, 1.0, 0.5]), jnp.array([0.0, 0.0, 1.0])
    solver = deqjax.Picard(batch_ndim=1)
    report = depth_report(fn, jnp.ones((3, 2)), args, solver=solver)
    assert [v.split()[0] for v in report.verdicts] == ["settles", "cycles", "settles"]
    assert report.period.tolist() == [0, 4, 0]
    assert "Of 3 problems: 2 settles, 1 cycles." in str(report)
    assert "Periods of the cycles: 4." in str(report)


@pytest.mark.parametrize(
    "solver", [deqjax.Picard(beta=0.7), deqjax.Reversible(beta=0.7)]
)
def test_one_solve_gives_what_a_solve_per_depth_gives(solver):
    fn = lambda z, a: jnp.tanh(a @ z + 1)
    a = 0.6 * jr.normal(jr.key(0), (5, 5))
    report = depth_report(
        fn, jnp.zeros(5), a, read_out=jnp.sum, solver=solver, depths=(0, 1, 7, 30)
    )
    assert report.depths.tolist() == [0, 1, 7, 30, 64]
    static = type(solver)(None, None, beta=0.7)
    for i, depth in enumerate((1, 7, 30, 64), 1):
        z = deqjax.fixed_point(fn, jnp.zeros(5), a, solver=static, max_steps=depth)
        z = z.value
        np.testing.assert_allclose(report.score[i], jnp.sum(z), rtol=1e-5)
        f = fn(z, a)
        want = jnp.linalg.norm(f - z) / jnp.linalg.norm(f)
        np.testing.assert_allclose(report.residual[i], want, rtol=1e-2, atol=1e-6)
    assert float(report.residual[0]) == 1.0


def test_steps_are_numbered_through():
    """Only a step that is told its number in the whole solve gives this sum."""
    fn = lambda z, a, step: z + step.astype(z.dtype)
    report = depth_report(
        fn, jnp.zeros(1), read_out=jnp.sum, max_steps=20, depths=(3, 11), has_step=True
    )
    assert report.score.tolist() == [3.0, 55.0, 190.0]


def test_paths_that_lead_to_one_state_and_paths_that_do_not():
    fn = lambda z, a: jnp.tanh(a[:, None] * z)  # two attractors where a > 1
    report = depth_report(
        fn,
        jnp.full((2, 1), 0.5),
        jnp.array([0.5, 3.0]),
        read_out=lambda z: (z[:, 0] > 0).astype(float),
        solver=deqjax.Picard(batch_ndim=1),
        num_starts=6,
        start_scale=2.0,
        max_steps=256,
    )
    # The first problem ends in 0, to which distances cannot be relative.
    assert not bool(report.path_independent[1])
    far = np.asarray(report.start_distance[:, 1])
    assert set(np.round(far).tolist()) == {0.0, 2.0}
    contraction = depth_report(
        lambda z, a: 0.5 * z + 1, jnp.zeros(3), num_starts=3, start_scale=5.0
    )
    assert bool(contraction.path_independent)
    assert "1 of 1 problems end in the same state" in str(contraction)


def test_the_best_start_is_the_one_that_converged():
    # |z| > 1 contracts to ±2, |z| ≤ 1 turns for ever: only other starts converge.
    def fn(z, a):
        return jnp.where(jnp.abs(z) > 1, jnp.sign(z) + 0.5 * z, -z)

    report = depth_report(
        fn,
        jnp.array([0.5]),
        read_out=lambda z: jnp.abs(z[0]),
        num_starts=5,
        start_scale=3.0,
    )
    assert report.verdicts == ["cycles with a period of 2 steps"]
    assert int(report.best_start) > 0
    np.testing.assert_allclose(report.best_score, 2.0, rtol=1e-6)
    assert float(report.score[-1]) == 0.5


def test_an_answer_that_is_its_start_raises_an_alarm():
    fn = lambda z, x: z + 1e-4 * (x - z)
    z0 = jnp.ones((3, 2))
    x = jnp.array([1.2, 100.0, 1.1])[:, None] * z0
    report = depth_report(fn, z0, x, solver=deqjax.Picard(batch_ndim=1))
    assert report.hardly_moved.tolist() == [True, False, True]
    assert "the answers of 2 problems (0, 2) differ from their start" in str(report)
    assert "Alarm" not in str(depth_report(lambda z, a: 0.5 * z + 1, jnp.zeros(2)))


def test_bad_arguments():
    fn = lambda z, a: 0.5 * z
    z = jnp.ones((2, 3))
    for name, wrong in {
        "solver": deqjax.Anderson(),
        "max_steps": 3,
        "depths": (4, 2),
        "num_starts": -1,
        "start_scale": 0.0,
        "tolerance": -1.0,
        "read_out": lambda z: z,
    }.items():
        with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
            depth_report(fn, z, **{"max_steps": 8, name: wrong})
    with pytest.raises(TypeError, match="being traced"):
        jax.jit(lambda z: depth_report(fn, z).residual)(z)
