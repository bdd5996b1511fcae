"""What does not depend on the iterate is computed once per solve."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.experimental import io_callback

import deqjax
from deqjax._fold import fold


def weight_norm(w):
    return w / jnp.linalg.norm(w, axis=-1, keepdims=True)


def cell(z, args):
    w, u, x, key = args
    mask = jr.bernoulli(key, 0.9, z.shape)
    mixed = z @ weight_norm(w).T + x @ u.T
    return jnp.where(mask, jnp.tanh(0.5 * mixed), 0.0)


@pytest.fixture(scope="module")
def args():
    k1, k2, k3 = jr.split(jr.key(0), 3)
    return (
        jr.normal(k1, (6, 6)),
        jr.normal(k2, (6, 6)),
        jr.normal(k3, (4, 6)),
        jr.key(7),
    )


def primitives(fn, *inputs):
    return [eqn.primitive.name for eqn in jax.make_jaxpr(fn)(*inputs).eqns]


def test_the_parts_make_the_whole(args):
    z = jr.normal(jr.key(1), (4, 6))
    rest, kept, _ = fold(cell, jnp.zeros_like(z), args)
    np.testing.assert_allclose(rest(z, kept), cell(z, args), rtol=1e-6)


def test_norms_injections_and_masks_are_not_in_the_part_that_is_repeated(args):
    z = jnp.zeros((4, 6))
    rest, kept, _ = fold(cell, z, args)
    names = primitives(rest, z, kept)
    assert names.count("dot_general") == 1, names
    assert "sqrt" not in names
    assert "reduce_sum" not in names
    assert not any("random" in name or "threefry" in name for name in names), names


def test_calls_of_jitted_functions_are_entered(args):
    z = jnp.zeros((4, 6))
    rest, kept, _ = fold(jax.jit(cell), z, args)
    assert primitives(rest, z, kept).count("dot_general") == 1


def inside(eqns):
    """The names of all primitives, and of those in their jaxprs."""
    for eqn in eqns:
        yield eqn.primitive.name
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            yield from inside(getattr(inner, "eqns", ()))


@pytest.mark.parametrize("wrap", [jax.checkpoint, eqx.filter_checkpoint, "nested"])
def test_of_a_checkpoint_the_part_that_varies_alone_is_repeated(args, wrap):
    if wrap == "nested":
        wrap = lambda fn: jax.checkpoint(jax.jit(jax.checkpoint(fn)))
    z = jr.normal(jr.key(1), (4, 6))
    rest, kept, _ = fold(wrap(cell), jnp.zeros_like(z), args)
    names = list(inside(jax.make_jaxpr(rest)(z, kept).eqns))
    assert names.count("dot_general") == 1, names
    assert not {"sqrt", "reduce_sum", "threefry2x32", "random_bits"} & set(names), names
    assert any("remat" in name or "checkpoint" in name for name in names)
    np.testing.assert_allclose(rest(z, kept), cell(z, args), rtol=1e-6)

    moving = (z, args[:3])
    whole = lambda z, p: jnp.sum(cell(z, (*p, args[3])) ** 2)
    parts = lambda z, p: jnp.sum(
        (lambda rest, kept, _: rest(z, kept))(*fold(wrap(cell), z, (*p, args[3]))) ** 2
    )
    got, want = (jax.jit(jax.grad(f, (0, 1)))(*moving) for f in (parts, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got, want)


@pytest.mark.parametrize("kind", ["weight norm", "contractive"])
def test_kernels_of_convolutions_are_normalised_once(kind):
    conv = eqx.nn.Conv2d(2, 2, 3, padding=1, key=jr.key(0))
    norm = eqx.nn.WeightNorm if kind == "weight norm" else deqjax.nn.Contractive
    z, x = jr.normal(jr.key(1), (2, 2, 4, 4))
    # As large as that its norm is reduced.
    layer = norm(eqx.tree_at(lambda c: c.weight, conv, 5 * conv.weight))
    fn = lambda z, args: jnp.tanh(args[0](z) + args[1])
    rest, kept, _ = fold(fn, jnp.zeros_like(z), (layer, x))
    names = primitives(rest, z, kept)
    assert names.count("conv_general_dilated") == 1
    assert not {"sqrt", "reduce_sum", "dot_general", "exp", "log"} & set(names), names
    np.testing.assert_allclose(rest(z, kept), fn(z, (layer, x)), rtol=1e-5)


def test_masks_made_of_constants_are_made_again_not_kept():
    def causal(z, args):
        mask = jnp.tril(jnp.ones((64, 64), bool))
        return jnp.where(mask, z * args, 0.0)

    z = jnp.zeros((64, 64))
    _, kept, _ = fold(causal, z, jnp.ones(()))
    assert sum(k.size for k in kept) == 1


def test_broadcasts_are_not_kept():
    def broadcast(z, args):
        return z * jnp.broadcast_to(jnp.exp(args)[:, None], z.shape)

    rest, kept, _ = fold(broadcast, jnp.zeros((8, 64)), jnp.arange(8.0))
    assert [k.shape for k in kept] == [(8,)]
    z = jnp.ones((8, 64))
    np.testing.assert_allclose(rest(z, kept), broadcast(z, jnp.arange(8.0)), rtol=1e-6)


def test_what_is_kept_is_arrays():
    """Python numbers are traced to constants that are none."""

    def damped(z, args):
        return z * (1 - jax.lax.stop_gradient(0.25)) + args

    rest, kept, _ = fold(damped, jnp.zeros(3), jnp.ones(3))
    assert all(isinstance(x, jax.Array) for x in kept)
    np.testing.assert_allclose(rest(jnp.ones(3), kept), 1.75)


def test_constants_that_the_first_part_needs_are_there():
    def shifted(z, args):
        ramp = jnp.arange(3.0) ** 2
        return 0.5 * z + jnp.sin(args + ramp) + ramp

    a = jnp.array([0.1, 0.2, 0.3])
    rest, kept, _ = fold(shifted, jnp.zeros(3), a)
    z = jnp.ones(3)
    np.testing.assert_allclose(rest(z, kept), shifted(z, a), rtol=1e-6)


def test_constants_that_the_first_part_alone_needs_stay_there():
    def fn(z, w):
        eye = jnp.eye(3)
        return z @ jnp.linalg.inv(eye + w @ w.T) + jnp.arange(3.0)

    w = jr.normal(jr.key(0), (3, 3))
    rest, kept, _ = fold(fn, jnp.zeros(3), w)
    assert [k.shape for k in kept] == [(3, 3)]
    assert primitives(rest, jnp.ones(3), kept).count("eq") == 0
    np.testing.assert_allclose(rest(jnp.ones(3), kept), fn(jnp.ones(3), w), rtol=1e-5)


def test_an_output_that_does_not_depend_on_the_iterate():
    rest, kept, _ = fold(lambda z, a: (z, {"twice": 2 * a}), jnp.zeros(2), jnp.ones(()))
    z, aux = rest(jnp.ones(2), kept)
    assert float(aux["twice"]) == 2
    assert z.shape == (2,)


def test_callbacks_stay_where_every_evaluation_runs_them():
    calls = []

    def counted(z, a):
        noise = io_callback(
            lambda: (calls.append(1), np.float32(0))[1],
            jax.ShapeDtypeStruct((), jnp.float32),
        )
        return 0.5 * z + a + noise

    sol = deqjax.fixed_point(
        counted,
        jnp.zeros(2),
        jnp.ones(2),
        solver=deqjax.Picard(None, None),
        max_steps=12,
    )
    jax.block_until_ready(sol.value)
    jax.effects_barrier()
    assert len(calls) == 12


def test_spectral_norm_inside_the_cell_repeats_bit_for_bit():
    """Compiled differently in the two passes, it used to drift."""

    def spectral(z, args):
        w, x = args
        v = jnp.ones(w.shape[1])
        for _ in range(3):
            v = w.T @ (w @ v)
            v = v / jnp.linalg.norm(v)
        return jnp.tanh(0.8 * z @ (w / jnp.linalg.norm(w @ v)).T + x)

    inputs = (jr.normal(jr.key(0), (32, 32)), jr.normal(jr.key(1), (8, 32)))

    def loss(inputs, probe):
        sol = deqjax.fixed_point(
            spectral,
            jnp.zeros((8, 32)),
            inputs,
            solver=deqjax.Reversible(None, None),
            adjoint=deqjax.ReversibleAdjoint(probe=probe),
            max_steps=4,
        )
        return jnp.sum(sol.value**2)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    _, stats = grad(inputs, deqjax.BackwardStats())
    assert float(stats.drift) == 0
