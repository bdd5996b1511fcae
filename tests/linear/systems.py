"""Linear systems for the tests, and dense references for them."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np


def solve(matrix, b, solver, **options):
    """Solve by plain lineax; `matrix` is an array or an operator."""
    if not isinstance(matrix, lx.AbstractLinearOperator):
        matrix = lx.MatrixLinearOperator(matrix)
    return _run(matrix, b, solver, options)


@eqx.filter_jit
def _run(matrix, b, solver, options):
    return lx.linear_solve(matrix, b, solver, options=options, throw=False)


def system(n=20, seed=0, spread=0.9, dtype=None):
    """I − J with ‖J‖ = `spread`, and a right-hand side."""
    k1, k2 = jr.split(jr.key(seed))
    j = jr.normal(k1, (n, n), dtype)
    j = spread * j / jnp.linalg.norm(j, 2)
    return jnp.eye(n, dtype=dtype) - j, jr.normal(k2, (n,), dtype)


def optimum(matrix, b, rtol):
    """The fewest products with min ‖b − A x‖ ≤ rtol ‖b‖ over the Krylov space."""
    matrix, b = np.asarray(matrix, np.float64), np.asarray(b, np.float64)
    basis = b[:, None] / np.linalg.norm(b)
    for k in range(1, len(b) + 1):
        images = matrix @ basis
        y = np.linalg.lstsq(images, b, rcond=None)[0]
        if np.linalg.norm(b - images @ y) <= rtol * np.linalg.norm(b):
            return k
        # Twice: the reference must not lose orthogonality.
        new = images[:, -1]
        for _ in range(2):
            new = new - basis @ (basis.T @ new)
        basis = np.column_stack([basis, new / np.linalg.norm(new)])
    raise AssertionError("not reached")


def residual(matrix, x, b):
    matrix, x, b = (np.asarray(a, np.float64) for a in (matrix, x, b))
    return np.linalg.norm(b - matrix @ x) / np.linalg.norm(b)
