"""Contraction, Lipschitz constants and coupled examples of maps that are known."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deqjax
from deqjax.diagnostics import contraction_report, coupling_report, lipschitz


def shear(z, a):
    """Spectral radius |a₀|, norm above it by the shear a₁."""
    matrix = jnp.array([[0.0, 1.0], [0.0, 0.0]])
    return z * a[..., :1] + a[..., 1:] * jnp.einsum("ij,...j->...i", matrix, z)


def test_rates_norms_and_verdicts_of_a_batch():
    a = jnp.array([[0.5, 0.0], [0.5, 3.0], [1.2, 0.0], [0.0, 0.0]])
    got = contraction_report(shear, jnp.ones((4, 2)), a, batch_ndim=1)
    matrices = [[[x, y], [0, x]] for x, y in np.asarray(a)]
    np.testing.assert_allclose(
        got.norm, np.linalg.norm(matrices, 2, axis=(1, 2)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(got.lipschitz, got.norm, rtol=1e-5)  # linear
    # The second one is defective: errors of its eigenvalue are roots of rounding.
    np.testing.assert_allclose(got.spectral_radius, a[:, 0], atol=2e-3)
    assert got.steps.tolist()[::2] == [14, np.inf]
    assert got.steps_bound.tolist() == [14, np.inf, np.inf, 1]
    assert [v.split()[0] for v in got.verdicts] == [
        "contracts",
        "converges",
        "plain",
        "contracts",
    ]
    assert "grow at first" in str(got)


def test_the_steps_are_those_that_picard_takes():
    a = jnp.array([0.9, -0.8, 0.3])
    f = lambda z, a: a * z + 1
    z = 1 / (1 - a)
    got = contraction_report(f, z, a, reduction=1e-3)
    errors, x = [], z + jnp.array([1.0, 1.0, 1.0])
    for _ in range(100):
        errors.append(float(jnp.linalg.norm(x - z)))
        x = f(x, a)
    taken = int(np.argmax(np.array(errors) <= 1e-3 * errors[0]))
    # The part along the slow eigenvector is less than the whole error.
    assert taken <= int(got.steps) <= taken + 7
    assert float(got.residual) < 1e-5


def test_contraction_at_a_point_is_not_contraction_in_a_ball():
    f = lambda z, a: 0.5 * z + z**3
    near = contraction_report(f, jnp.zeros(2), radius=0.1)
    wide = contraction_report(f, jnp.zeros(2), radius=2.0, num_samples=16)
    assert float(near.lipschitz) < 1 < float(wide.lipschitz)
    assert near.verdicts[0] != wide.verdicts[0]
    alone = contraction_report(f, jnp.zeros(2), num_samples=0)
    np.testing.assert_allclose(alone.lipschitz, alone.norm)


def test_lipschitz_constants_come_from_below():
    a = jr.normal(jr.key(0), (3, 3))
    f = lambda z, a: jnp.sin(a @ z)
    samples = jr.normal(jr.key(1), (6, 3))
    got = lipschitz(f, samples, a)
    dense = jax.vmap(jax.jacobian(lambda z: f(z, a)))(samples)
    want = np.linalg.norm(np.asarray(dense), 2, axis=(1, 2))
    np.testing.assert_allclose(got.norms, want, rtol=1e-5)
    x, y = np.asarray(samples), np.asarray(jnp.sin(samples @ a.T))
    quotient = max(
        np.linalg.norm(y[i] - y[j]) / np.linalg.norm(x[i] - x[j])
        for i in range(6)
        for j in range(i)
    )
    np.testing.assert_allclose(got.quotient, quotient, rtol=1e-5)
    assert float(got.constant) == max(float(got.norms.max()), float(got.quotient))
    assert float(got.constant) <= np.linalg.norm(np.asarray(a), 2)


def row_wise(z, a):
    return jnp.tanh(z @ a)


def leaking(z, a):
    """Example 2 reaches example 0, by a derivative."""
    return jnp.tanh(z @ a).at[0].add(1e-3 * z[2])


def ranked(z, a):
    """Rounded: no derivative, but another value."""
    return row_wise(z, a).at[1].add(jnp.round(10 * z[3]))


def masked(z, a):
    """0 × NaN is NaN: only what is not a number gets across."""
    mask = jnp.eye(len(z))
    return jnp.tanh((mask @ z) @ a)


@pytest.mark.parametrize(
    ("fn", "pairs", "poisoned"),
    [
        (row_wise, [], []),
        (leaking, [(2, 0)], [(2, 0)]),
        (ranked, [(3, 1)], [(3, 1)]),
        (masked, [], [(i, j) for i in range(4) for j in range(4) if i != j]),
    ],
)
def test_pairs_are_named(fn, pairs, poisoned):
    z, a = jr.normal(jr.key(0), (4, 5)), jr.normal(jr.key(1), (5, 5))
    got = coupling_report(fn, z, a)
    assert got.pairs == pairs
    assert got.poisoned_pairs == poisoned
    assert got.independent == (not poisoned)
    assert ("2 → 0" in str(got)) == ((2, 0) in poisoned)
    assert bool(jnp.all(jnp.diagonal(got.changed)))


def test_trees_and_several_axes():
    def fn(z, args):
        a, b = z
        return a - jnp.mean(a, axis=0), 0.5 * b + a[..., None]

    z = (jnp.ones((2, 2), jnp.bfloat16), jnp.ones((2, 2, 3), jnp.bfloat16))
    got = coupling_report(fn, z, batch_ndim=2)
    assert got.pairs == [(0, 2), (1, 3), (2, 0), (3, 1)]


def test_bad_arguments():
    f = lambda z, a: 0.5 * z
    with pytest.raises(ValueError, match="`batch_ndim`"):
        coupling_report(f, jnp.ones((2, 2)), batch_ndim=0)
    for wrong in ({"reduction": 2.0}, {"radius": -1.0}, {"num_samples": -1}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            contraction_report(f, jnp.ones(2), **wrong)
    assert deqjax.diagnostics.contraction_report is contraction_report
