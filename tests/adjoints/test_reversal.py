"""Reversal repairs itself, and what it cannot repair is never silent."""

import functools as ft

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

import deqjax
from tests.helpers import error, weigh, weights

PROBE = deqjax.BackwardStats


def tanh_map(z, args):
    return jnp.tanh(0.5 * z + 0.3 * z @ args[0] + args[1])


def norm_map(z, args):
    h = z + jax.nn.gelu(z @ args[0] + args[1])
    h = h - h.mean(-1, keepdims=True)
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5)


def relu_map(z, args):
    return jax.nn.relu(0.5 * z @ args[0] + args[1])


MAPS = {"tanh": tanh_map, "norm": norm_map, "relu": relu_map}


def together(z, args):
    return {name: fn(z[name], args[name]) for name, fn in MAPS.items()}


def inputs(dtype="float32", width=16):
    args, z0 = {}, {}
    for i, name in enumerate(MAPS):
        k1, k2, k3 = jr.split(jr.key(i), 3)
        args[name] = weights(k1, width, dtype, 0.9), jr.normal(k2, (4, width), dtype)
        z0[name] = 0.1 * jr.normal(k3, (4, width), dtype)
    return args, z0


def solve(fn, z0, args, beta, steps, probe=None, **settings):
    adjoint = deqjax.ReversibleAdjoint(probe=probe, **settings)
    solver = deqjax.Reversible(None, None, beta=beta)
    return deqjax.fixed_point(
        fn, z0, args, solver=solver, adjoint=adjoint, max_steps=steps
    ).value


def plain(fn, z0, args, beta, steps):
    """z_N by backpropagation through the two lines of the method."""
    mix = lambda a, f: jax.tree.map(lambda a, f: (1 - beta) * a + beta * f, a, f)

    def step(pair, _):
        y, z = pair
        y = mix(y, fn(z, args))
        return (y, mix(z, fn(y, args))), None

    return lax.scan(step, (z0, z0), None, length=steps)[0][1]


def double(tree):
    return jax.tree.map(lambda x: x.astype("float64"), tree)


@pytest.mark.parametrize(("steps", "bits"), [(6, 8), (60, 8), (60, 16)])
def test_no_drift_and_the_gradient_of_backpropagation(steps, bits, x64):
    args, z0 = inputs()
    loss = lambda a, z, p, b: weigh(
        solve(together, z, a, b, steps, p, record_bits=bits)
    )
    run = jax.jit(jax.grad(loss, (0, 1, 2)))
    ref = jax.jit(
        jax.grad(lambda a, z, b: weigh(plain(together, z, a, b, steps)), (0, 1))
    )
    for beta in (0.3, 0.5, 0.77, 0.9):  # One program for all.
        *got, stats = run(args, z0, PROBE(), jnp.float32(beta))
        wanted = ref(double(args), double(z0), np.float64(np.float32(beta)))
        assert float(stats.drift) == 0
        assert 0 < float(stats.repair) < 0.5
        assert error(got, wanted) <= 2e-6


@pytest.mark.parametrize("beta", [0.5, 0.8])
def test_evaluations_that_differ_in_their_last_bits_are_repaired(beta, x64):
    args, z0 = inputs()
    args, z0 = args["tanh"], z0["tanh"]
    rng = np.random.default_rng(0)

    def fn(z, a):
        draw = lambda: rng.standard_normal(z.shape).astype(z.dtype)
        noise = io_callback(draw, jax.ShapeDtypeStruct(z.shape, z.dtype))
        f = tanh_map(z, a)
        return f + lax.stop_gradient(4 * float(jnp.finfo(z.dtype).eps) * noise * abs(f))

    loss = lambda a, p: weigh(solve(fn, z0, a, beta, 20, p))
    got, stats = jax.jit(jax.grad(loss, (0, 1)))(args, PROBE())
    want = jax.grad(lambda a: weigh(plain(tanh_map, double(z0), a, beta, 20)))(
        double(args)
    )
    assert float(stats.drift) == 0
    assert error(got, want) <= 4e-6


@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_scales_may_be_mixed(scale, x64):
    (w, x), z0 = inputs()[0]["tanh"], inputs()[1]["tanh"]
    wide = jnp.ones(16, "float32").at[3].set(scale)  # One outlying entry.

    def fn(z, x):
        s, v = wide.astype(x.dtype), w.astype(x.dtype)
        return {"a": s * tanh_map(z["a"] / s, (v, x)), "b": tanh_map(z["b"], (v, x))}

    start = {"a": scale * z0, "b": z0}  # And a start far from the answer.
    read = lambda z: weigh({"a": z["a"] / wide.astype(z["a"].dtype), "b": z["b"]})
    loss = lambda x, p: read(solve(fn, start, x, 0.8, 40, p))
    got, stats = jax.jit(jax.grad(loss, (0, 1)))(x, PROBE())
    ref = jax.jit(jax.grad(lambda x: read(plain(fn, double(start), x, 0.8, 40))))
    assert float(stats.drift) == 0
    for g, r in zip(got, ref(double(x)), strict=True):
        assert error(g, r) <= 2e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_all_dtypes_of_states(dtype, x64):
    args, z0 = inputs(dtype)
    loss = lambda a, p: weigh(solve(tanh_map, z0["tanh"], a, 0.8, 12, p))
    got, stats = jax.jit(jax.grad(loss, (0, 1)))(args["tanh"], PROBE())
    ref = lambda a: weigh(plain(tanh_map, double(z0["tanh"]), a, 0.8, 12))
    assert float(stats.drift) == 0
    eps = float(jnp.finfo(dtype).eps)
    assert error(double(got), jax.grad(ref)(double(args["tanh"]))) <= 8 * eps


def test_a_weight_for_every_channel_and_its_gradient(x64):
    args, z0 = inputs("float64")
    beta = jnp.linspace(0.3, 0.9, 16)
    run = lambda f: jax.grad(
        lambda b: weigh(f(tanh_map, z0["tanh"], args["tanh"], b, 8))
    )
    assert error(run(solve)(beta), run(plain)(beta)) <= 1e-12


def test_second_derivatives(x64):
    (w, x), z0 = inputs("float64", 4)[0]["tanh"], inputs("float64", 4)[1]["tanh"]

    def penalty(f):
        inner = jax.grad(lambda x: weigh(f(tanh_map, z0, (w, x), 0.6, 5)))
        return lambda x: jnp.sum(inner(x) ** 2)

    t = jnp.ones_like(x)
    got = jax.jit(jax.grad(penalty(solve)))(x)
    assert error(got, jax.grad(penalty(plain))(x)) <= 1e-12
    forward = lambda f: jax.jvp(jax.grad(penalty(f)), (x,), (t,))[1]
    assert error(forward(solve), forward(plain)) <= 1e-12


def test_noise_is_always_noticed():
    args, z0 = inputs()
    count = [0]

    def draw():
        count[0] += 1
        return np.float32(1e-3 * np.sin(count[0]))

    def fn(z, a):
        noise = io_callback(draw, jax.ShapeDtypeStruct((), jnp.float32))
        return tanh_map(z, a) + lax.stop_gradient(noise)

    loss = lambda a, p: weigh(solve(fn, z0["tanh"], a, 0.5, 6, p))
    run = jax.jit(jax.grad(loss, (0, 1)))
    for _ in range(100):
        gradient, stats = run(args["tanh"], PROBE())
        assert float(stats.drift) > 0
        assert all(np.isnan(g).all() for g in gradient)
    loss = lambda a: weigh(solve(fn, z0["tanh"], a, 0.5, 6, on_drift="recompute"))
    want = jax.grad(lambda a: weigh(plain(tanh_map, z0["tanh"], a, 0.5, 6)))(
        args["tanh"]
    )
    assert error(jax.jit(jax.grad(loss))(args["tanh"]), want) <= 1e-2
    loss = lambda a: weigh(solve(fn, z0["tanh"], a, 0.5, 6, on_drift="raise"))
    with pytest.raises(RuntimeError, match="not undone exactly"):
        jax.block_until_ready(jax.jit(jax.grad(loss))(args["tanh"]))


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_aux_and_budgets(tol, x64):
    (w, x), z0 = inputs("float64", 4)[0]["tanh"], inputs("float64", 4)[1]["tanh"]
    fn = lambda z, x: (tanh_map(z, (w, x)), jnp.sum(z**2 * x))
    solver = deqjax.Reversible(tol, tol, beta=0.6)

    def loss(x, n):
        options = {"step_budget": n}
        settings = {"solver": solver, "max_steps": 5, "options": options}
        return deqjax.fixed_point(fn, z0, x, has_aux=True, **settings).aux

    def wanted(x, n):
        taken = n if tol is None else max(n - 1, 0)
        y, z = z0, z0
        for _ in range(taken):
            y = 0.4 * y + 0.6 * tanh_map(z, (w, x))
            z = 0.4 * z + 0.6 * tanh_map(y, (w, x))
        return jnp.sum((y if tol is None else z) ** 2 * x)

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(
        x, jnp.arange(6)
    )
    for n in range(6):
        value, gradient = jax.value_and_grad(wanted)(x, n)
        assert error(values[n], value) <= 1e-12
        assert error(gradients[n], gradient) <= 1e-12


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (ft.partial(deqjax.Reversible, arithmetic="exact"), "arithmetic"),
        (ft.partial(deqjax.ReversibleAdjoint, anchors=2), "anchors"),
        (ft.partial(deqjax.ReversibleAdjoint, record_bits=5), "record_bits"),
        (ft.partial(deqjax.ReversibleAdjoint, drift_tol=-1.0), "drift_tol"),
        (ft.partial(deqjax.Reversible, beta=jnp.array(2)), "beta"),
        (ft.partial(deqjax.Reversible, beta=jnp.array([0.5, 1.5])), "beta"),
    ],
)
def test_bad_settings_are_refused_by_name(make, name):
    with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
        make()


@pytest.mark.parametrize("beta", [(0.3, 0.5), jnp.full((3,), 0.5)])
def test_weights_that_do_not_fit_are_refused(beta):
    with pytest.raises(ValueError, match="`beta`"):
        solve(lambda z, a: 0.5 * z, jnp.ones((4, 2)), None, beta, 2)


def test_a_gradient_of_n_steps_evaluates_4n_times():
    args, z0 = inputs()
    calls = []

    def fn(z, a):
        jax.debug.callback(lambda: calls.append(1))
        return tanh_map(z, a)

    loss = lambda a: weigh(solve(fn, z0["tanh"], a, 0.5, 10))
    jax.block_until_ready(jax.jit(jax.grad(loss))(args["tanh"]))
    jax.effects_barrier()
    assert len(calls) == 40


@pytest.mark.parametrize("bits", [4, 8])
def test_memory_per_step_is_that_of_the_record(bits):
    (w, x), z0 = inputs(width=64)[0]["tanh"], inputs(width=64)[1]["tanh"]

    def temp(steps):
        loss = lambda a: weigh(solve(tanh_map, z0, a, 0.5, steps, record_bits=bits))
        compiled = jax.jit(jax.grad(loss)).lower((w, x)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # The exponents of the rows are 4 of 2 bytes per evaluation.
    per_step = (temp(96) - temp(32)) / 64 / z0.nbytes
    assert per_step == pytest.approx(2 * bits / 32, abs=0.03)
