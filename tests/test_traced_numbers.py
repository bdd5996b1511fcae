"""Another value of a tolerance or a weight is not another program."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import deqjax
from deqjax._fixed_point import PROGRAMS
from deqjax.linear import GMRES, Neumann
from tests import helpers

Anderson, Broyden, Picard = deqjax.Anderson, deqjax.Broyden, deqjax.Picard
Reversible, Newton = deqjax.Reversible, deqjax.NewtonKrylov

# By name, what `fixed_point` is given for a tolerance and a weight.
CASES = {
    "Picard": lambda t, w: {"solver": Picard(t, t, beta=w)},
    "Anderson": lambda t, w: {"solver": Anderson(t, t, beta=w, ridge=t)},
    "Broyden": lambda t, w: {"solver": Broyden(t, t)},
    "NewtonKrylov": lambda t, w: {"solver": Newton(t, t, linear_solver=GMRES(t, t))},
    "Reversible": lambda t, w: {
        "solver": Reversible(t, t, beta=w),
        "adjoint": deqjax.ReversibleAdjoint(drift_tol=t),
    },
    "Reversible, unrolled": lambda t, w: {
        "solver": Reversible(t, t, beta={"a": w, "b": 0.5}),
        "adjoint": deqjax.UnrolledAdjoint(),
    },
    "GMRES": lambda t, w: {"adjoint": deqjax.ImplicitAdjoint(GMRES(t, t))},
    "Neumann": lambda t, w: {"adjoint": deqjax.ImplicitAdjoint(Neumann(t, t, beta=w))},
    "lineax.GMRES": lambda t, w: {"adjoint": deqjax.ImplicitAdjoint(lx.GMRES(t, t))},
    "JFB": lambda t, w: {
        "solver": Picard(t, t, beta=w),
        "adjoint": deqjax.JFBAdjoint(),
    },
    "Phantom": lambda t, w: {"adjoint": deqjax.PhantomAdjoint(3, w)},
    "Neumann series": lambda t, w: {"adjoint": deqjax.NeumannAdjoint(3, w)},
    "SHINE": lambda t, w: {
        "solver": Broyden(t, t),
        "adjoint": deqjax.ShineAdjoint(1 + w),
    },
    "Picard, unrolled": lambda t, w: {
        "solver": Picard(None, None, beta=w),
        "adjoint": deqjax.UnrolledAdjoint(),
    },
    "optimistix": lambda t, w: {"solver": optx.FixedPointIteration(t, t)},
    "budget": lambda t, w: {"options": {"step_budget": int(10 * w)}},
}


def solve(a, given):
    f = lambda z, a: {"a": 0.5 * jnp.tanh(z["a"]) + a, "b": 0.3 * z["b"] + z["a"]}
    z0 = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    sol = deqjax.fixed_point(f, z0, a, max_steps=12, **given)
    return jnp.sum(sol.value["b"])


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_compiled_for_another_value(case):
    a = jnp.array([0.1, 0.2])
    # A number of NumPy has a dtype, which solvers of other packages keep.
    for kind in (float, np.float32, jnp.asarray):
        values = [(kind(1e-6 * (i + 1)), kind(0.4 + 0.05 * i)) for i in range(10)]
        made = [CASES[case](*numbers) for numbers in values]
        for run in (solve, jax.grad(solve)):
            jax.block_until_ready(run(a, made[0]))
            with helpers.compilations() as compiled:
                jax.block_until_ready([run(a, given) for given in made[1:]])
            assert not compiled


@pytest.mark.parametrize("rtol", [0, 1e-2, 1e-4, 1])
@pytest.mark.parametrize("atol", [0, 1e-3, 1e-5])
def test_tolerances_are_those_of_the_call(rtol, atol):
    """z = (z + 1) / 2 from 0: the residual of zₖ is 2⁻ᵏ⁻¹, and |f(zₖ)| = 1 − 2⁻ᵏ⁻¹."""
    f = lambda z, _: 0.5 * (z + 1)
    z0 = jnp.zeros(())
    sol = deqjax.fixed_point(f, z0, solver=Picard(rtol, atol), max_steps=20)
    passed = (k for k in range(20) if 0.5 ** (k + 1) * (1 + rtol) <= atol + rtol)
    assert int(sol.stats["num_steps"]) == next(passed, 19) + 1


@pytest.mark.parametrize("beta", [0.3, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("adjoint", [deqjax.PhantomAdjoint, deqjax.NeumannAdjoint])
def test_weights_are_those_of_the_call(adjoint, beta):
    """For z = z/2 + a both adjoints are β Σ (1 − β/2)ᵗ, of three terms."""

    def value(a):
        f = lambda z, a: 0.5 * z + a
        given = {"solver": Picard(1e-6, 0.0), "adjoint": adjoint(3, beta)}
        return deqjax.fixed_point(f, jnp.zeros(()), a, **given).value

    want = sum(beta * (1 - beta / 2) ** t for t in range(3))
    np.testing.assert_allclose(jax.grad(value)(1.0), want, rtol=1e-5)


def test_fallback_is_that_of_the_call():
    """B⁻¹ stretches by 2 for z = z/2 + a; above the fallback, it is replaced by 1."""

    def value(a, fallback):
        f = lambda z, a: 0.5 * z + a
        given = {"solver": Broyden(), "adjoint": deqjax.ShineAdjoint(fallback)}
        return deqjax.fixed_point(f, jnp.zeros(()), a, **given).value

    for fallback, want in [(1.5, 1.0), (1.9, 1.0), (2.5, 2.0), (jnp.array(3.0), 2.0)]:
        got = jax.grad(value)(1.0, fallback)
        np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("solver", [Anderson, Broyden, Newton, Picard, Reversible])
def test_no_number_changes_the_dtype(solver):
    f = lambda z, a: 0.5 * z + a
    weighs = {} if solver in (Broyden, Newton) else {"beta": 0.75}
    given = {"solver": solver(0.02, 0.01, **weighs)}
    value = lambda a: deqjax.fixed_point(f, jnp.zeros_like(a), a, **given).value
    for dtype in (jnp.bfloat16, jnp.float16):
        with jax.numpy_dtype_promotion("strict"):
            out, pull = jax.vjp(value, jnp.ones(2, dtype))
            assert out.dtype == pull(out)[0].dtype == dtype
        np.testing.assert_allclose(out.astype(jnp.float32), 2.0, rtol=0.05)


def test_tolerances_keep_their_digits(x64):
    f = lambda z, _: jnp.cos(z)
    z0 = jnp.ones((), jnp.float64)
    solver = Picard(1e-13, 0.0)
    sol = deqjax.fixed_point(f, z0, solver=solver, max_steps=200)
    assert 1e-14 < float(sol.stats["relative_residual"]) <= 1e-13


def test_an_undamped_solve_is_a_program_of_its_own(monkeypatch):
    monkeypatch.setattr(PROGRAMS, "most", 1000)
    f = lambda z, _: jnp.where(z > 100, 1.0, 2.0) * jnp.ones_like(z)
    z0 = jnp.full(2, jnp.inf)
    undamped = deqjax.fixed_point(
        f, z0, solver=Picard(None, None, beta=1.0), max_steps=3
    ).value
    np.testing.assert_array_equal(undamped, 2.0)
    before = len(PROGRAMS)
    for beta in (0.5, 0.6, 0.7):
        given = {"solver": Picard(None, None, beta=beta), "max_steps": 3}
        deqjax.fixed_point(f, jnp.zeros(2), **given)
    assert len(PROGRAMS) == before + 1


def test_no_tolerance_is_another_program_than_a_traced_one():
    """One map, by turns: what is no array in a result is that of its own program."""
    f = lambda z, _: 0.5 * z + 1
    for _ in range(2):
        tested = deqjax.fixed_point(f, jnp.zeros(2), solver=Picard(1e-4, 1e-4))
        static = deqjax.fixed_point(f, jnp.zeros(2), solver=Picard(None, None))
        assert int(tested.stats["num_evals"]) < int(static.stats["num_evals"]) == 64
        assert bool(tested.stats["converged"])
        assert not bool(static.stats["converged"])


class Counting(optx.FixedPointIteration):
    """A solver of a user, who looks at the value of a tolerance."""

    def step(self, *args, **kwargs):
        assert 0 < self.rtol < 1
        return super().step(*args, **kwargs)


def test_solvers_of_others_keep_their_numbers():
    f = lambda z, a: 0.5 * z + a
    sol = deqjax.fixed_point(f, jnp.zeros(2), 1.0, solver=Counting(1e-5, 1e-5))
    np.testing.assert_allclose(sol.value, 2.0, rtol=1e-4)


def test_lineax_may_be_told_to_test_nothing():
    """With tolerances of 0 all steps are taken and the solve counts as successful."""
    f = lambda z, a: jnp.array([[0.3, 0.1], [0.0, 0.2]]) @ z + a
    solver = lx.GMRES(0.0, 0.0, max_steps=2, restart=2, stagnation_iters=100)
    value = lambda a: jnp.sum(
        deqjax.fixed_point(
            f,
            jnp.zeros(2),
            a,
            adjoint=deqjax.ImplicitAdjoint(solver, on_failure="nan"),
        ).value
    )
    got = jax.grad(value)(jnp.ones(2))
    want = np.linalg.solve(np.array([[0.7, -0.1], [0.0, 0.8]]).T, np.ones(2))
    np.testing.assert_allclose(got, want, rtol=1e-3)
