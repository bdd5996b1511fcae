"""What a linear solve is given beside its operator: used, or refused by name."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from deqjax.linear import GMRES, Neumann
from tests.linear.systems import residual, solve, system

SOLVERS = pytest.mark.parametrize("kind", [GMRES, Neumann])


@SOLVERS
def test_batches_that_the_system_does_not_have_are_refused(kind):
    with pytest.raises(ValueError, match=r"`batch_ndim=2`.*lower `batch_ndim`"):
        solve(jnp.eye(3), jnp.ones(3), kind(batch_ndim=2))
    b = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}
    operator = lx.FunctionLinearOperator(lambda v: v, jax.eval_shape(lambda: b))
    with pytest.raises(ValueError, match=r"`batch_ndim=1`.*\['b'\]"):
        solve(operator, b, kind(batch_ndim=1))


@SOLVERS
@pytest.mark.parametrize(
    "start", [1.0, jnp.ones(2), (jnp.ones(3),), jnp.ones(3, bool), jnp.ones(3, complex)]
)
def test_a_start_that_is_no_vector_of_the_system_is_refused(kind, start):
    with pytest.raises(ValueError, match=r'`options\["y0"\]`'):
        lx.linear_solve(
            lx.MatrixLinearOperator(jnp.eye(3)),
            jnp.ones(3),
            kind(),
            options={"y0": start},
        )


def test_a_start_may_be_numbers_or_numpy():
    one = lx.FunctionLinearOperator(
        lambda v: 2 * v, jax.eval_shape(lambda: jnp.ones(()))
    )
    sol = solve(one, jnp.ones(()), GMRES(), y0=0.5)
    assert float(sol.value) == 0.5
    assert int(sol.stats["num_products"]) == 1
    sol = solve(2 * jnp.eye(2), jnp.ones(2), GMRES(), y0=np.full(2, 0.5))
    assert int(sol.stats["num_products"]) == 1


@SOLVERS
def test_a_preconditioner_has_to_be_an_operator_on_the_vectors(kind):
    with pytest.raises(TypeError, match=r'"preconditioner"\]`.*function'):
        solve(jnp.eye(3), jnp.ones(3), kind(), preconditioner=lambda v: v)
    wrong = lx.MatrixLinearOperator(jnp.eye(2))
    with pytest.raises(ValueError, match=r'"preconditioner"\]`.*map vectors'):
        solve(jnp.eye(3), jnp.ones(3), kind(), preconditioner=wrong)


@SOLVERS
def test_tolerances_are_one_or_one_per_system(kind, x64):
    for name in ("rtol", "atol"):
        with pytest.raises(ValueError, match=rf"`{name}` must be one number.*\(2,\)"):
            solve(jnp.eye(3), jnp.ones(3), kind(**{name: jnp.ones(2)}))
    matrix, b = system(6, spread=0.7)
    rows = jnp.stack([b, b])
    operator = lx.FunctionLinearOperator(
        lambda v: v @ matrix.T, jax.eval_shape(lambda: rows)
    )
    # In another dtype than b, too.
    loose = jnp.array([1e-1, 1e-8], jnp.float32)
    sol = solve(operator, rows, kind(loose, batch_ndim=1))
    first, second = (residual(matrix, x, b) for x in sol.value)
    assert 1e-6 < first <= 1e-1
    assert second <= 1.01e-8


def test_damping_is_one_number():
    with pytest.raises(ValueError, match=r"`beta` must be one number.*\(2,\)"):
        Neumann(beta=jnp.ones(2))


def test_images_have_to_be_like_arguments():
    like = jax.eval_shape(lambda: jnp.ones((2, 3)))
    operator = lx.FunctionLinearOperator(lambda v: v.reshape(6), like)
    with pytest.raises(ValueError, match=r"`GMRES`.*shapes of its arguments"):
        solve(operator, jnp.ones(6), GMRES())
