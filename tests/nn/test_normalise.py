"""Normalised weights: bounds that hold, computed once per solve."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax import lax

import deqjax
from deqjax.nn import DEQ, Contractive, spectral_bound
from tests.helpers import error


@pytest.mark.parametrize("shape", [(9, 9), (5, 12), (1, 4)])
def test_the_bound_is_above_the_norm_and_close_to_it(shape):
    w = jr.normal(jr.key(0), shape)
    norm = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)[0]
    for k in (1, 4, 6):
        bound = float(spectral_bound(w, k))
        assert norm <= bound <= norm * min(shape) ** (0.5 ** (k + 1)) * 1.0001


def test_stacks_may_be_complex_and_each_matrix_has_its_own_bound():
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(4, 6, 4)) + 1j * rng.normal(size=(4, 6, 4))
    stack *= np.array([1e-20, 1.0, 0.0, 1e15])[:, None, None]
    want = np.linalg.norm(stack, 2, (1, 2))
    got = np.asarray(spectral_bound(jnp.asarray(stack, jnp.complex64), 4), np.float64)
    assert got[2] == 0
    got, want = got[[0, 1, 3]], want[[0, 1, 3]]
    assert ((want <= got) & (got <= want * 4 ** (1 / 32) * 1.0001)).all()


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_the_bound_scales_with_the_matrix(scale):
    w = jr.orthogonal(jr.key(0), 6)
    assert abs(float(spectral_bound(scale * w)) / scale / 6 ** (1 / 128) - 1) < 1e-4


def test_the_bound_of_zero_is_zero_and_can_be_differentiated():
    value, slope = jax.value_and_grad(spectral_bound)(jnp.zeros((3, 2)))
    assert float(value) == 0
    assert bool(jnp.all(jnp.isfinite(slope)))
    # Elsewhere the derivative approaches u vᵀ of the leading singular vectors.
    w = jnp.diag(jnp.array([3.0, 1.0]))
    np.testing.assert_allclose(jax.grad(spectral_bound)(w), [[1, 0], [0, 0]], atol=1e-4)


def dense(layer, shape):
    """The matrix of a convolution, from its action on unit vectors."""
    units = jnp.eye(int(np.prod(shape))).reshape(-1, *shape)
    bare = eqx.tree_at(lambda c: c.bias, layer, None, is_leaf=lambda x: x is None)
    rows = jax.vmap(bare)(units)
    return np.asarray(rows.reshape(len(units), -1).T, np.float64)


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"padding": 1, "padding_mode": "CIRCULAR", "groups": 2},
        {"padding": [(0, 2), (1, 1)], "padding_mode": "CIRCULAR", "stride": 2},
        {"padding": 2, "dilation": 2, "stride": 2},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_convolutions_keep_the_bound(settings):
    conv = eqx.nn.Conv2d(2, 4, 3, use_bias=False, **settings, key=jr.key(1))
    conv = eqx.tree_at(lambda c: c.weight, conv, jnp.ones_like(conv.weight))
    used = dense(Contractive(conv, 0.8).bounded(), (2, 6, 6))
    norm = np.linalg.svd(used, compute_uv=False)[0]
    # A constant kernel on a constant image is the worst case, but for the borders.
    assert 0.2 <= norm <= 0.8


def test_weights_within_the_bound_are_as_they_are():
    layer = eqx.nn.Linear(4, 4, key=jr.key(0))
    small = eqx.tree_at(lambda p: p.weight, layer, 0.1 * jnp.eye(4))
    np.testing.assert_allclose(
        Contractive(small, 0.9).bounded().weight, small.weight, rtol=1e-6
    )
    x = jnp.arange(4.0)
    np.testing.assert_allclose(Contractive(small, 0.9)(x), small(x), rtol=1e-6)


class Cell(eqx.Module):
    """φ(Ŵ z + x) with a bounded and a weight-normed layer."""

    inner: Contractive
    outer: eqx.nn.WeightNorm

    def __init__(self):
        k1, k2 = jr.split(jr.key(0))
        self.inner = Contractive(eqx.nn.Linear(7, 7, key=k1), 0.9)
        self.outer = eqx.nn.WeightNorm(eqx.nn.Linear(7, 7, key=k2))

    def __call__(self, z, x, *, key=None):
        return jnp.tanh(self.inner(z) + self.outer(x) + 0.1 * jnp.tanh(self.outer(z)))


def test_bounds_hold_after_100_steps_of_an_optimiser():
    """Of a loss that rewards large weights."""
    cell = Cell()
    x = jr.normal(jr.key(1), (5, 7))
    optimiser = optax.sgd(0.5)
    moving, fixed = eqx.partition(cell, eqx.is_inexact_array)

    def loss(moving):
        cell = eqx.combine(moving, fixed)
        return -jnp.sum(jax.vmap(cell)(x, x) ** 2)

    def step(carry, _):
        moving, state = carry
        updates, state = optimiser.update(jax.grad(loss)(moving), state)
        return (optax.apply_updates(moving, updates), state), None

    run = jax.jit(lambda c: lax.scan(step, c, length=100)[0])
    moving, _ = run((moving, optimiser.init(moving)))
    cell = eqx.combine(moving, fixed)
    sigma = lambda w: np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)[0]
    assert sigma(cell.inner.layer.weight) > 2  # without the bound
    assert 0.8 < sigma(cell.inner.bounded().weight) <= 0.9
    # Rows of the other one have the norms g.
    units = jax.vmap(cell.outer)(jnp.eye(7)).T - cell.outer.layer.bias[:, None]
    rows = jnp.linalg.norm(units, axis=1)
    np.testing.assert_allclose(rows, jnp.abs(cell.outer.g[:, 0]), rtol=1e-4)


def operations(module):
    """Every operation, with whether it is inside of a loop; calls are entered."""
    functions = {}
    for op in module.body.operations:
        functions[str(op.attributes["sym_name"]).strip('"')] = op

    def walk(op, inside):
        yield op, inside
        name = op.name
        inside = inside or name == "stablehlo.while"
        if name in ("func.call", "call"):
            callee = str(op.attributes["callee"]).lstrip("@")
            yield from walk(functions[callee], inside)
        for region in op.regions:
            for block in region:
                for inner in block.operations:
                    yield from walk(inner.operation, inside)

    return walk(functions["main"].operation, False)


def norms_of_weights(fn, *args):
    """How many operations inside of loops and outside have a matrix's norm to do.

    Square roots and logarithms: neither tanh nor a static loop needs one.
    """
    module = jax.jit(fn).lower(*args).compiler_ir("stablehlo")
    found = [
        inside
        for op, inside in operations(module)
        if op.name in ("stablehlo.sqrt", "stablehlo.rsqrt", "stablehlo.log")
    ]
    return sum(found), len(found) - sum(found)


def test_the_compiled_loop_contains_no_norm_of_a_weight(x64):
    cell, x = Cell(), jr.normal(jr.key(1), (7,), jnp.float64)
    moving, fixed = eqx.partition(cell, eqx.is_inexact_array)
    moving = jax.tree.map(lambda a: a.astype(jnp.float64), moving)
    static = {"solver": deqjax.Picard(None, None), "max_steps": 12}

    def folded(moving):
        return DEQ(eqx.combine(moving, fixed), **static)(x)

    def unfolded(moving):
        cell = eqx.combine(moving, fixed)
        return lax.fori_loop(0, 12, lambda _, z: cell(z, x), jnp.zeros_like(x))

    # A check that cannot fail would not find them where they are:
    assert norms_of_weights(unfolded, moving)[0] >= 2
    inside, outside = norms_of_weights(folded, moving)
    assert inside == 0
    assert outside >= 2
    assert error(jax.jit(folded)(moving), jax.jit(unfolded)(moving)) <= 1e-14

    def gradient(moving):
        adjoint = deqjax.ReversibleAdjoint()
        solver = deqjax.Reversible(None, None)
        run = lambda m: jnp.sum(
            DEQ(eqx.combine(m, fixed), solver=solver, adjoint=adjoint, max_steps=12)(x)
        )
        return jax.grad(run)(moving)

    module = jax.jit(gradient).lower(moving).compiler_ir("stablehlo")
    matrices = [
        op
        for op, inside in operations(module)
        if inside
        and op.name in ("stablehlo.sqrt", "stablehlo.rsqrt", "stablehlo.log")
        and any("7" in str(r.type) for r in op.results)
    ]
    assert not matrices


def circular(size, padding):
    layer = eqx.nn.Conv2d(
        1, 2, size, padding=padding, padding_mode="CIRCULAR", key=jr.key(0)
    )
    return Contractive(layer)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Contractive(jnp.tanh), "equinox.nn.Linear or"),
        (lambda: Contractive(eqx.nn.Linear(2, 2, key=jr.key(0)), 0.0), "`kappa`.*0.0"),
        (
            lambda: Contractive(
                eqx.nn.Conv2d(1, 1, 3, padding=1, padding_mode="REFLECT", key=jr.key(0))
            ),
            "REFLECT",
        ),
        (lambda: spectral_bound(jnp.eye(2), 0), "`num_squarings`.*0"),
        (lambda: circular(3, 2), "more than its kernel needs.*2, 2.*3, 3"),
        (lambda: circular(1, (1, 0)), "more than its kernel needs"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()
