"""Monotone operator equilibrium networks."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import deqjax
from deqjax.models import MonotoneClassifier
from deqjax.nn import (
    ForwardBackward,
    MonotoneConv,
    MonotoneDense,
    MonotoneDEQ,
    PeacemanRachford,
)
from deqjax.nn._monotone_deq import _measured, _split
from tests.helpers import OK, error
from tests.nn.images import cross_entropy, data, fill, repeated
from tests.nn.training import QUICK, train

SHAPES = {"dense": (2, 3), "two tiers": (2, 2, 4, 2), "three tiers": (2, 2, 4, 8)}
MAKERS = {
    "dense": ft.partial(MonotoneDense, 3, 5, m=0.5),
    "two tiers": ft.partial(MonotoneConv, 2, (2, 3), m=0.5),
    "three tiers": ft.partial(MonotoneConv, 2, (2, 1, 2), m=0.5),
}
SPLITTINGS = {"fb": ForwardBackward(), "pr": PeacemanRachford(0.7)}


def operator_and_input(kind, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=SHAPES[kind]), jnp.float32)
    return fill(MAKERS[kind], seed, mean=0.0), x


def dense(fn, like):
    """The matrix of a linear map of one example."""
    flat, back = ravel_pytree(like)
    return np.asarray(
        jax.jit(jax.vmap(lambda e: ravel_pytree(fn(back(e)))[0], out_axes=1))(
            jnp.eye(len(flat))
        ),
        np.float64,
    )


def one(tree):
    return jax.tree.map(lambda a: a[:1], tree)


# --- the operators --------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["dense", pytest.param("three tiers", marks=pytest.mark.slow)]
)
def test_operators_are_monotone_their_inverse_and_bound_are_right(kind):
    operator, x = operator_and_input(kind)
    z = one(operator.initial_state(x))
    gap = dense(lambda v: jax.tree.map(jnp.subtract, v, operator.multiply(v)), z)
    assert np.linalg.eigvalsh((gap + gap.T) / 2)[0] >= 0.5 - 1e-5
    # Not by being symmetric: information flows from fine to coarse alone.
    assert np.linalg.norm(gap - gap.T) >= 0.1 * np.linalg.norm(gap)
    inverse = dense(operator.resolvent(0.7, z), z)
    want = np.linalg.inv(np.eye(len(gap)) + 0.7 * gap)
    assert np.max(np.abs(inverse - want)) <= 1e-5
    norm = np.linalg.norm(gap, 2)
    assert norm * 0.9999 <= float(operator.lipschitz(z)) <= 1.6 * norm


def test_the_dense_operator_is_its_formula():
    operator, x = operator_and_input("dense")
    a, b = (np.asarray(w, np.float64) for w in (operator.A, operator.B))
    want = 0.5 * np.eye(5) - a.T @ a + b - b.T
    got = dense(operator.multiply, one(operator.initial_state(x)))
    assert np.max(np.abs(got - want)) <= 1e-5


def test_half_precision_takes_its_inverse_in_float32():
    operator, x = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16), operator_and_input("dense")
    )
    z = MonotoneDEQ(operator)(x)
    assert z.dtype == jnp.bfloat16
    want = MonotoneDEQ(operator_and_input("dense")[0])(operator_and_input("dense")[1])
    assert error(z.astype(jnp.float32), want) <= 0.05


def test_a_kernel_without_a_direction_is_zero():
    operator, x = operator_and_input("two tiers")
    none = lambda kernel: jnp.zeros_like(kernel.direction)
    operator = eqx.tree_at(lambda o: o.B[0].direction, operator, none(operator.B[0]))

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def energy(operator):
        z = operator.multiply(operator.inject(x))
        return sum(jnp.sum(a**2) for a in z)

    value, slope = energy(operator)
    off = eqx.tree_at(lambda o: o.B[0].scale, operator_and_input("two tiers")[0], 0.0)
    np.testing.assert_allclose(value, energy(off)[0], rtol=1e-6)
    assert all(bool(jnp.all(jnp.isfinite(a))) for a in jax.tree.leaves(slope))


def np_circular(kernel, z, stride=1):
    """A circular convolution 3 × 3, written as the sum over the kernel."""
    w = np.asarray(kernel.direction, np.float64)
    w = w * float(kernel.scale) / np.sqrt(np.sum(w**2))
    out = sum(
        np.einsum("oc,chw->ohw", w[:, :, i, j], np.roll(z, (1 - i, 1 - j), (1, 2)))
        for i in range(3)
        for j in range(3)
    )
    return out[:, ::stride, ::stride]


def test_the_tiers_are_coupled_as_in_the_formula():
    # I − W = m I + AᵀA − (B − Bᵀ), A block bidiagonal, off the diagonal 2 Aᵀ P or 0.
    operator, x = operator_and_input("three tiers")
    z = one(operator.initial_state(x))
    rng = np.random.default_rng(1)
    z = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), z)
    gap = jax.tree.map(jnp.subtract, z, eqx.filter_jit(operator.multiply)(z))
    parts = [np.asarray(a[0], np.float64) for a in z]
    inner = lambda a, b: float(np.sum(np.asarray(a, np.float64) * b))
    # ⟨z, (I − W) z⟩ = m ‖z‖² + ‖A z‖²: B does not show.
    az = []
    for i, a in enumerate(parts):
        total = np_circular(operator.A[i], a)
        if i:
            down = np_circular(operator.P[i - 1], parts[i - 1], 2)
            total = total + np.pad(down, ((0, 0), (0, 1), (0, 1)))
        az.append(total)
    want = sum(0.5 * inner(a, a) + inner(b, b) for a, b in zip(parts, az, strict=True))
    got = sum(inner(g[0], a) for g, a in zip(gap, parts, strict=True))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # B shows in ⟨y, (I − W) z⟩ for the last tier alone, where nothing else couples.
    y = rng.normal(size=parts[2].shape)
    last = (*jax.tree.map(jnp.zeros_like, z[:2]), z[2])
    image = eqx.filter_jit(operator.multiply)(last)[2][0]
    a, b = operator.A[2], operator.B[2]
    want = (
        0.5 * inner(y, parts[2])
        - inner(np_circular(a, y), np_circular(a, parts[2]))
        + inner(y, np_circular(b, parts[2]))
        - inner(np_circular(b, y), parts[2])
    )
    np.testing.assert_allclose(inner(image, y), want, rtol=1e-4)


# --- the equilibrium ------------------------------------------------------------------


def double(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)


def tight(operator, splitting):
    solver = deqjax.Picard(1e-11, 1e-11, batch_ndim=1)
    return MonotoneDEQ(operator, splitting=splitting, solver=solver, max_steps=20_000)


@pytest.mark.parametrize("kind", ["dense", "two tiers"])
def test_twenty_random_starts_and_both_splittings_reach_the_one_equilibrium(kind, x64):
    # Twenty problems in one batch.
    @eqx.filter_jit
    def solve(operator, splitting, x, z0):
        layer = tight(operator, splitting)
        sol = layer.solve(x, z0=z0)
        return sol, layer.equation(sol.value, x)

    for seed in (0, 1):
        operator, x = double(operator_and_input(kind, seed))
        x = jnp.broadcast_to(x[:1], (20, *x.shape[1:]))
        rng = np.random.default_rng(seed + 10)
        starts = jax.tree.map(
            lambda a, rng=rng: jnp.asarray(5 * rng.normal(size=a.shape), a.dtype),
            operator.initial_state(x),
        )
        reached = []
        for splitting in SPLITTINGS.values():
            sol, again = solve(operator, splitting, x, starts)
            assert sol.result == OK
            assert error(again, sol.value) <= 1e-7
            first = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), sol.value)
            assert error(sol.value, first) <= 1e-7
            reached.append(sol.value)
            # A warm start is at the end, whatever variable the splitting iterates.
            warm, _ = solve(operator, splitting, x, sol.value)
            assert int(jnp.max(warm.stats["num_steps"])) <= 2
        assert error(*reached) <= 1e-7
        if kind == "two tiers":
            for a in sol.value:
                assert float(jnp.max(a)) > 0.01
                assert float(jnp.max(a.at[..., 1:-1, 1:-1].set(0))) == 0


@pytest.mark.parametrize("splitting", [ForwardBackward(), PeacemanRachford()])
@pytest.mark.parametrize(("m", "size"), [(0.01, 10.0), (1.0, 5.0), (1.0, 1.0)])
def test_converged_means_that_the_equation_holds(splitting, m, size):
    operator = MonotoneDense(3, 6, m=m, key=jr.key(0))
    scaled = (size * operator.A, size * operator.B)
    operator = eqx.tree_at(lambda o: (o.A, o.B), operator, scaled)
    layer, x = MonotoneDEQ(operator, splitting=splitting), jnp.ones((1, 3))
    sol = layer.solve(x, z0=10 * jr.normal(jr.key(1), (1, 6)))
    again = layer.equation(sol.value, x)
    residual, norm = (jnp.linalg.norm(a) for a in (again - sol.value, again))
    np.testing.assert_allclose(sol.stats["residual"][0], residual, rtol=1e-2)
    met = bool(residual <= 1e-6 + 1e-4 * norm)
    assert bool(sol.stats["converged"][0]) == met
    assert (sol.result == OK) == met
    # Only steps that are very short do not get there.
    assert met or isinstance(splitting, ForwardBackward)
    if not met:
        with pytest.raises(RuntimeError, match="steps"):
            layer.solve(x, throw=True)


def test_the_slack_bounds_the_equation_by_the_step():
    operator, x = operator_and_input("dense")
    bias = operator.inject(x)
    for alpha in (0.05, 0.7, 3.0):
        for splitting in (ForwardBackward(alpha), PeacemanRachford(alpha)):
            for seed in range(3):
                u = jr.normal(jr.key(seed), (2, 5))
                z = splitting.read(operator, u)
                if isinstance(splitting, ForwardBackward):
                    u = z = jax.nn.relu(u)
                moved = splitting.step(operator, bias, u) - u
                missed = operator.activate(operator.multiply(z) + bias) - z
                bound = splitting.slack(operator, u) * jnp.linalg.norm(moved, axis=1)
                assert bool(jnp.all(jnp.linalg.norm(missed, axis=1) <= 1.001 * bound))


@pytest.mark.parametrize("splitting", SPLITTINGS)
def test_twenty_starts_agree_to_the_default_tolerances(splitting):
    operator, x = operator_and_input("dense")
    layer = MonotoneDEQ(operator, splitting=SPLITTINGS[splitting], max_steps=2000)
    x = jnp.broadcast_to(x[:1], (20, 3))
    sol = layer.solve(x, z0=5 * jr.normal(jr.key(0), (20, 5)))
    assert sol.result == OK
    # Strong monotonicity bounds the distance: ‖z − z*‖ ≤ (1 + L) / m ‖residual‖.
    gap = dense(lambda v: v - operator.multiply(v), one(sol.value))
    reach = (1 + np.linalg.norm(gap, 2)) / operator.m
    spread = jnp.linalg.norm(sol.value - sol.value[:1], axis=1)
    bound = reach * (sol.stats["residual"] + sol.stats["residual"][0])
    assert bool(jnp.all(spread <= bound + 1e-6))
    size = jnp.linalg.norm(sol.value[0])
    assert float(jnp.max(spread)) <= 2 * reach * (1e-6 + 1e-4 * size)


def test_inverses_and_bounds_are_made_once_per_solve():
    operator, x = operator_and_input("two tiers")
    u = operator.initial_state(x)

    backward, kept = repeated(_split, u, (PeacemanRachford(), operator, x))
    assert all(jnp.issubdtype(k.dtype, jnp.floating) for k in kept)
    assert backward.count("fft") == 4  # there and back, for each tier
    assert "lu" not in backward
    tested, _ = repeated(_measured, u, (PeacemanRachford(), operator, x))
    assert tested.count("fft") == 4
    assert tested.count("dot_general") == backward.count("dot_general")
    forward, _ = repeated(_split, u, (ForwardBackward(), operator, x))
    assert "fft" not in forward
    assert "sqrt" not in forward  # nor norms of kernels


@pytest.mark.parametrize("splitting", SPLITTINGS)
def test_the_gradient_is_that_of_the_equilibrium(splitting, x64):
    # Reference: the implicit function theorem, densely, for z = relu(W z + U x + b).
    operator, x = operator_and_input("dense")
    operator, x = double(operator), double(x[:1])
    adjoint = deqjax.ImplicitAdjoint(deqjax.linear.GMRES(1e-12, batch_ndim=1))
    solver = deqjax.Picard(1e-13, 1e-13, batch_ndim=1)
    weights = np.arange(1.0, 6.0)

    @jax.jit
    def run(operator, x):
        layer = MonotoneDEQ(
            operator,
            splitting=SPLITTINGS[splitting],
            solver=solver,
            adjoint=adjoint,
            max_steps=3000,
        )
        z = layer(x)
        return jnp.sum(weights * z), z

    (_, z), got = jax.value_and_grad(run, has_aux=True)(operator, x)
    a, b, u = (np.asarray(w) for w in (operator.A, operator.B, operator.U.weight))
    w = 0.5 * np.eye(5) - a.T @ a + b - b.T
    z, x0 = np.asarray(z[0]), np.asarray(x[0])
    active = np.diag((w @ z + u @ x0 + np.asarray(operator.U.bias) > 0).astype(float))
    assert np.trace(active) > 0
    cotangent = active @ np.linalg.solve((np.eye(5) - active @ w).T, weights)
    outer = np.outer(cotangent, z)
    want = {
        "A": -a @ (outer + outer.T),
        "B": outer - outer.T,
        "U": np.outer(cotangent, x0),
        "b": cotangent,
    }
    for name, value in {
        "A": got.A,
        "B": got.B,
        "U": got.U.weight,
        "b": got.U.bias,
    }.items():
        assert error(value, want[name]) <= 1e-8, name


# --- classifiers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["dense", pytest.param("two tiers", marks=pytest.mark.slow)]
)
def test_classifiers_learn_and_stay_monotone(kind):
    images, labels = data(side=4)
    if kind == "dense":
        images, shape = images.reshape(6, -1), (48,)
        make_operator = lambda key: MonotoneDense(48, 6, m=0.5, key=key)
    else:
        shape = (3, 4, 4)
        make_operator = lambda key: MonotoneConv(3, (3, 4), m=0.5, key=key)

    @eqx.filter_jit
    def make(key):
        layer = MonotoneDEQ(make_operator(key))
        return MonotoneClassifier(layer, shape, 2, key=key)

    @eqx.filter_value_and_grad(has_aux=True)
    def loss(model, _):
        sol = model.solve(images)
        logits = model.logits(sol.value)
        return cross_entropy(logits, labels), (sol.stats["relative_residual"],)

    model, (residual,), losses = train(make(QUICK), loss, 100, lr=2e-2)((jnp.zeros(6),))
    assert losses[-1] <= 0.1 * losses[0]
    assert float(jnp.max(residual)) <= 2e-4
    # The bounds hold after 100 steps of the optimiser.
    operator = model.layer.operator
    z = one(operator.initial_state(images))
    gap = dense(lambda v: jax.tree.map(jnp.subtract, v, operator.multiply(v)), z)
    assert np.linalg.eigvalsh((gap + gap.T) / 2)[0] >= 0.5 - 1e-5
    assert np.linalg.norm(gap, 2) <= float(operator.lipschitz(z)) * 1.0001


# --- what does not fit ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MonotoneDense(3, 5, m=0.0, key=jr.key(0)), "`m`.*positive.*0.0"),
        (lambda: MonotoneConv(3, (), key=jr.key(0)), "`channels`.*at least 1"),
        (lambda: ForwardBackward(-1.0), "`alpha`.*-1.0"),
        (lambda: PeacemanRachford(0.0), "`alpha`.*0.0"),
    ],
)
def test_arguments_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_inputs_that_do_not_fit_are_refused():
    layer = MonotoneDEQ(operator_and_input("dense")[0])
    with pytest.raises(ValueError, match=r"`z0`.*\(2, 5\); got \(2, 4\)"):
        layer(jnp.zeros((2, 3)), z0=jnp.zeros((2, 4)))
    conv = MonotoneDEQ(MonotoneConv(1, (2,), key=jr.key(0)))
    with pytest.raises(ValueError, match=r"`pool`.*got 7 for"):
        MonotoneClassifier(conv, (1, 4, 4), 2, pool=7, key=jr.key(0))
    with pytest.raises(ValueError, match=r"`x`.*\(batch, 3\); got \(2, 4\)"):
        layer(jnp.zeros((2, 4)))
    with pytest.raises(TypeError, match="`x`.*float32; got bfloat16"):
        layer(jnp.zeros((2, 3), jnp.bfloat16))
    tiers = MonotoneDEQ(operator_and_input("three tiers")[0])
    with pytest.raises(ValueError, match="`images`.*multiples of 4 for 3 tiers"):
        tiers(jnp.zeros((2, 2, 4, 6)))
    with pytest.raises(ValueError, match="`solver`.*batch_ndim=1"):
        MonotoneDEQ(layer.operator, solver=deqjax.Picard())
