"""The gradient of the exact arithmetic, and that going back restores every bit."""

import functools as ft

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

import deqjax
from tests import helpers
from tests.helpers import error, norm_map, problem, relu_map, tanh_map, weigh, weights
from tests.layers import Case, attention, case

Exact = deqjax.Reversible
static = ft.partial(Exact, None, None)


def solve(fn, z0, args, probe=None, *, solver, steps, **kwargs):
    adjoint = kwargs.pop("adjoint", deqjax.ReversibleAdjoint(probe=probe))
    return deqjax.fixed_point(
        fn, z0, args, solver=solver, adjoint=adjoint, max_steps=steps, **kwargs
    )


def going_back(fn, z0, args, **kwargs):
    """The gradient for args and z0, and the drift."""

    @jax.jit
    def run(args, z0, probe):
        loss = lambda a, z, q: weigh(solve(fn, z, a, q, **kwargs).value)
        return jax.grad(loss, (0, 1, 2), allow_int=True)(args, z0, probe)

    *gradient, stats = run(args, z0, deqjax.BackwardStats())
    return gradient, float(stats.drift)


def plain_value(fn, z0, args, steps, beta):
    """z_N by a scan, to be differentiated plainly."""

    def step(carry, _):
        y, z = carry
        y = helpers.mix(beta, y, fn(z, args))
        return (y, helpers.mix(beta, z, fn(y, args))), None

    return lax.scan(step, (z0, z0), None, length=steps)[0][1]


def looped(fn, steps, beta=0.5):
    return lambda args, z0: weigh(plain_value(fn, z0, args, steps, beta))


def widened(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


def narrowed(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


# --- at the level of float32 ----------------------------------------------------------


def sized(name, width=16):
    """(fn, z0, args) in float64, to be narrowed."""
    ks = jr.split(jr.key(1), 6)
    w, x = weights(ks[0], width, jnp.float64, 0.9), jr.normal(ks[1], (4, width))
    z0 = 0.1 * jr.normal(ks[2], (4, width))
    if name == "attention":
        return attention, z0, ([weights(k, width, jnp.float64, 1.5) for k in ks[3:]], x)
    return {"tanh": tanh_map, "relu": relu_map, "norm": norm_map}[name], z0, (w, x)


def check_float32_level(name, beta, steps):
    fn, z0, args = sized(name)
    z0, args = narrowed((z0, args))
    plain = jax.jit(jax.grad(looped(fn, steps, beta), (0, 1)))
    want = plain(*widened((args, z0)))
    got, drift = going_back(
        fn, z0, args, solver=Exact(None, None, beta=beta), steps=steps
    )
    assert drift == 0
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))
    assert error(got, want) <= max(2e-6, 2 * error(plain(args, z0), want))


@pytest.mark.parametrize(
    ("name", "beta", "steps"),
    [
        ("tanh", 0.8, 8),
        ("norm", 0.8, 9),
        ("relu", 0.9, 64),
        ("attention", 0.75, 32),
        ("norm", 0.5, 128),
    ],
)
def test_gradient_is_that_of_float64_at_the_level_of_float32(name, beta, steps, x64):
    check_float32_level(name, beta, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "beta", "steps"),
    [
        ("tanh", 0.5, 1000),
        ("relu", 0.7, 1),
        ("relu", 0.8, 128),
        ("norm", 0.9, 1000),
        ("attention", 0.8, 128),
    ],
)
def test_gradient_of_every_map_beta_and_depth(name, beta, steps, x64):
    check_float32_level(name, beta, steps)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_huge_and_tiny_states(scale, x64):
    fn, z0, (w, x) = sized("relu")
    z0, args = narrowed((scale * z0, (w, scale * x)))
    c = jnp.cos(jnp.arange(z0.size, dtype=jnp.float64)).reshape(z0.shape)
    loss = lambda value: jnp.sum(value * c.astype(value.dtype))
    solver = static(beta=0.8)
    run = lambda a, z, q: loss(solve(fn, z, a, q, solver=solver, steps=12).value)
    *got, stats = jax.jit(jax.grad(run, (0, 1, 2)))(args, z0, deqjax.BackwardStats())
    assert float(stats.drift) == 0
    plain = lambda a, z: loss(plain_value(fn, z, a, 12, 0.8))
    want = jax.jit(jax.grad(plain, (0, 1)))(*widened((args, z0)))
    # One by one, as their scales differ.
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert error(one, other) <= 2e-6


# --- repeatability --------------------------------------------------------------------


NAMES = ["conv", "bf16 conv", "attention", "dropout", "rms", "norm", "bf16 matmul"]
NAMES += ["contracted", "power", "elementwise"]


def drift(c, solver, steps, **kwargs):
    gradient, drift = going_back(*c, solver=solver, steps=steps, **kwargs)
    if drift == 0:
        for g in jax.tree.leaves(gradient):
            assert g.dtype == jax.dtypes.float0 or (np.any(g) and np.isfinite(g).all())
    return drift


@pytest.mark.parametrize("name", NAMES)
def test_layers_repeat_themselves_in_a_loop(name):
    assert drift(case(name), static(beta=0.8), 20) == 0


def gated(z, args):
    w, x = args
    return jax.nn.sigmoid(z @ w) * jax.nn.gelu(z @ w.T + x) + 0.1 * z


def chained(z, args):
    w, x = args
    return 0.7 * jax.nn.sigmoid(0.9 * w[0] * z + x) + 0.1 * z


@pytest.mark.parametrize(
    ("fn", "shape", "dtype"),
    [
        (gated, (35,), "float32"),
        (gated, (36,), "float64"),
        (gated, (3, 43), "float32"),
        (gated, (17, 57), "float64"),
        (chained, (67,), "float64"),
        (chained, (17, 16), "float32"),
    ],
)
def test_sums_of_products_round_alike_in_both_passes(fn, shape, dtype, x64):
    """XLA contracts some of them to fused multiply-adds: not others going back."""
    k1, k2 = jr.split(jr.key(0))
    w, x = 0.5 * weights(k1, shape[-1], dtype, 1.0), jr.normal(k2, shape, dtype)
    c = Case(fn, jnp.zeros(shape, dtype), (w, x))
    assert drift(c, static(beta=0.8), 12) == 0


@pytest.mark.parametrize("name", ["attention", "contracted", "elementwise"])
def test_layers_repeat_themselves_in_short_solves(name):
    assert drift(case(name), static(beta=0.75), 3) == 0


@pytest.mark.parametrize(("steps", "beta"), [(1, 0.9), (3, 0.75), (8, 0.8)])
def test_short_solves_of_convolutions_are_as_good_as_backpropagation(steps, beta, x64):
    """Unrolled, they need not repeat bit for bit: they have an anchor at every step."""
    fn, z0, args = case("conv")
    plain = jax.jit(jax.grad(looped(fn, steps, beta), (0, 1)))
    want = plain(*widened((args, z0)))
    got, drift = going_back(fn, z0, args, solver=static(beta=beta), steps=steps)
    assert drift <= 1e-5
    assert error(got, want) <= max(2e-6, 2 * error(plain(args, z0), want))


@pytest.mark.parametrize("name", ["conv", "norm", "contracted", "elementwise"])
def test_layers_repeat_themselves_in_a_tested_solve(name):
    assert drift(case(name), Exact(1e-3, 1e-4, beta=0.5), 30) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "beta", "tol"), [(2, 0.9, None), (60, 0.5, 1e-4)])
def test_layers_repeat_themselves(name, steps, beta, tol):
    unrolled = "conv" in name and tol is None and steps <= 8
    found = drift(case(name), Exact(tol, tol, beta=beta), steps)
    assert found <= 1e-5 if unrolled else found == 0


@pytest.mark.parametrize("state", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize(("tol", "steps"), [(None, 12), (None, 2), (1e-2, 9)])
def test_states_of_every_precision_repeat(state, tol, steps, request):
    if state == "float64":
        request.getfixturevalue("x64")
    c = case("contracted")
    args, z0 = jax.tree.map(lambda x: x.astype(state), (c.args, c.z0))
    assert drift(Case(c.fn, z0, args), Exact(tol, tol, beta=0.7), steps) == 0


# --- where it is used -----------------------------------------------------------------


def mixed_map(z, args):
    """Leaves of three precisions and no common shape; one is empty, one a scalar."""
    w, x = args
    s = jnp.tanh(0.5 * z["s"].astype(jnp.float32) + 0.1 * jnp.sum(z["v"]))
    v = jnp.tanh(z["v"] @ w + x + s)
    h = (0.3 * z["h"][0].astype(jnp.float32) + 0.1 * v[:3]).astype(jnp.bfloat16)
    return {"s": s.astype(jnp.float16), "v": v, "h": (h,), "e": z["e"]}


@pytest.mark.parametrize(("tol", "steps"), [(None, 2), (None, 15), (1e-3, 20)])
def test_a_pytree_of_mixed_precisions(tol, steps):
    w, x = problem("tanh", 6).args
    z0 = {
        "s": jnp.zeros((), jnp.float16),
        "v": jnp.zeros(6),
        "h": (jnp.ones((3,), jnp.bfloat16),),
        "e": jnp.zeros((0, 4)),
    }
    solver = Exact(tol, tol, beta=0.8)

    def loss(args, probe):
        value = solve(mixed_map, z0, args, probe, solver=solver, steps=steps).value
        return weigh(narrowed(value))

    got, stats = jax.jit(jax.grad(loss, (0, 1)))((w, x), deqjax.BackwardStats())
    assert float(stats.drift) == 0
    if tol is None:
        plain = looped(mixed_map_wide, steps, 0.8)
        assert error(got, jax.jit(jax.grad(plain))((w, x), narrowed(z0))) <= 2e-2


def mixed_map_wide(z, args):
    """The same without the roundings to 16 bits."""
    w, x = args
    s = jnp.tanh(0.5 * z["s"] + 0.1 * jnp.sum(z["v"]))
    v = jnp.tanh(z["v"] @ w + x + s)
    return {"s": s, "v": v, "h": (0.3 * z["h"][0] + 0.1 * v[:3],), "e": z["e"]}


@pytest.mark.parametrize("tol", [None, 1e-3], ids=["static", "tested"])
def test_batch_ndim_and_vmap_repeat_and_agree(tol):
    p = helpers.batched()
    solver = ft.partial(Exact, tol, tol, beta=0.8)
    scale = jnp.array([1.0, 1e-3, 1e3, 1.0])[:, None]

    def fn(z, args):
        w, x, gain, scale = args
        return scale * p.fn(z / scale, (w, x, gain))

    args = (*p.args, scale)

    def whole(args, probe):
        sol = solve(fn, p.z0, args, probe, solver=solver(batch_ndim=1), steps=40)
        return weigh(sol.value / scale)

    def lanes(args, probe):
        def one(x, gain, scale, z, probe):
            a = (args[0], x, gain, scale)
            return solve(fn, z, a, probe, solver=solver(), steps=40).value

        return weigh(jax.vmap(one)(*args[1:], p.z0, probe) / scale)

    probe = deqjax.BackwardStats((4,))
    got, stats = jax.jit(jax.grad(whole, (0, 1)))(args, probe)
    want, other = jax.jit(jax.grad(lanes, (0, 1)))(args, probe)
    np.testing.assert_array_equal(stats.drift, np.zeros(4))
    np.testing.assert_array_equal(other.drift, np.zeros(4))
    assert error(got, want) <= 3e-6
    if tol is None:
        plain = lambda a, z: looped(lambda z, b: p.fn(z, b[:3]), 40, 0.8)(a, z)
        want = jax.jit(jax.grad(plain))(args, p.z0)
        assert error(got[:3], want[:3]) <= 3e-6


@pytest.mark.parametrize("limit", [4, 20])
def test_a_step_budget_of_run_time(limit):
    c = case("norm")

    @jax.jit
    def run(args, probe, n):
        options = {"step_budget": n}
        loss = lambda a, q: weigh(
            solve(
                c.fn, c.z0, a, q, solver=static(beta=0.8), steps=limit, options=options
            ).value
        )
        return jax.grad(loss, (0, 1))(args, probe)

    for n in (0, 1, 3, limit + 1):
        got, stats = run(c.args, deqjax.BackwardStats(), jnp.array(n))
        assert float(stats.drift) == 0
        if n == 0:
            assert not np.any(helpers.flat(got))
            continue
        want = jax.jit(jax.grad(looped(c.fn, min(n, limit), 0.8)))(c.args, c.z0)
        assert error(got, want) <= 2e-6


@pytest.mark.parametrize("around", ["twice", "checkpoint", "scan"])
@pytest.mark.parametrize("steps", [3, 12], ids=["unrolled", "loop"])
def test_inside_other_programs(around, steps):
    c = case("norm")
    w, x = c.args
    solver = static(beta=0.8)
    layer = lambda z, w, q: solve(c.fn, z, (w, x), q, solver=solver, steps=steps).value
    plain = lambda z, w: plain_value(c.fn, z, (w, x), steps, 0.8)

    def network(layer):
        if around == "twice":
            return lambda z, w, *q: layer(jnp.sin(layer(z, w, *q)) + x, w, *q)
        if around == "checkpoint":
            return lambda z, w, *q: jax.checkpoint(layer)(z, 1.1 * w, *q) ** 2

        def scanned(z, w, *q):
            step = lambda z, s: (layer(z * s, w, *q), None)
            return lax.scan(step, z, jnp.array([1.0, 0.5, 2.0], w.dtype))[0]

        return scanned

    def loss(layer):
        return lambda *a: weigh(network(layer)(*a))

    run = jax.jit(jax.grad(loss(layer), (0, 1, 2)))
    *got, stats = run(c.z0, w, deqjax.BackwardStats())
    assert float(stats.drift) == 0
    want = jax.jit(jax.grad(loss(plain), (0, 1)))(c.z0, w)
    assert error(got, want) <= 4e-6
