"""Numbers of NumPy are numbers, and what is none is refused by name."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import deqjax
from deqjax.linear import GMRES, Neumann

A = jnp.array([0.1, 0.2])


def solve(**given):
    f = lambda z, a: 0.5 * z + a
    given = {"solver": deqjax.Picard()} | given
    return deqjax.fixed_point(f, jnp.zeros(2), A, **given)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.array, jnp.array])
def test_whole_numbers(kind):
    three = kind(3)
    for given in [
        lambda n: GMRES(restart=n, max_steps=n),
        lambda n: Neumann(max_steps=n, num_terms=n),
        lambda n: deqjax.Anderson(history=n, min_steps=n),
        lambda n: deqjax.Broyden(history=n),
        lambda n: deqjax.NeumannAdjoint(n),
        lambda n: deqjax.PhantomAdjoint(n),
        lambda n: deqjax.UnrolledAdjoint(last=n),
    ]:
        assert given(three) == given(3)
        assert hash(given(three)) == hash(given(3))
    assert int(solve(max_steps=three).stats["num_steps"]) == 3


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array])
def test_real_numbers(kind):
    quarter = kind(0.25)
    for given in [
        lambda x: GMRES(x, x),
        lambda x: Neumann(x, x, beta=x),
        lambda x: deqjax.Picard(x, x, beta=x),
        lambda x: deqjax.Anderson(x, x, beta=x),
        lambda x: deqjax.Reversible(x, x, beta=x),
        lambda x: deqjax.PhantomAdjoint(3, x),
    ]:
        assert given(quarter) == given(0.25)
    tight, loose = (solve(solver=deqjax.Picard(kind(t), 0.0)) for t in (1e-6, 0.25))
    assert int(tight.stats["num_steps"]) > int(loose.stats["num_steps"])


def test_flags():
    sol = solve(options={"record": np.bool_(True)}, throw=np.bool_(False))
    assert "residual_history" in sol.stats
    assert "residual_history" not in solve(options={"record": np.bool_(False)}).stats
    with pytest.raises(RuntimeError):
        solve(max_steps=np.int64(1), throw=np.bool_(True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_steps": 10**12}, "`max_steps`.*int32.*1000000000000"),
        ({"max_steps": np.float32(3)}, "`max_steps`.*integer"),
        ({"max_steps": np.bool_(True)}, "`max_steps`.*integer"),
        ({"throw": "no"}, "`throw`.*True or False.*'no'"),
        ({"options": [1]}, "`options`.*dictionary.*\\[1\\]"),
        ({"tags": frozenset({"symmetric"})}, "`tags`.*lineax.*'symmetric'"),
        ({"tags": 3}, "`tags`.*lineax.*3"),
    ],
)
def test_what_is_none_is_refused_by_name(given, words):
    with pytest.raises((TypeError, ValueError), match=words):
        solve(**given)


def test_a_solver_is_no_place_for_flags():
    with pytest.raises(ValueError, match="`history`.*integer"):
        deqjax.Anderson(history=np.bool_(True))
    with pytest.raises(ValueError, match="`rtol`.*number"):
        deqjax.Picard(rtol=np.bool_(True))
    with pytest.raises(ValueError, match="`restart`.*integer"):
        GMRES(restart=np.float64(3.0))


def test_tags_of_lineax_are_taken():
    run = lambda a: jnp.sum(solve(tags=frozenset({lx.symmetric_tag})).value + a)
    assert jax.grad(run)(1.0) == 2
