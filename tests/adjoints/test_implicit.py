"""The implicit gradient against dense (I − J)⁻ᵀ, finite differences and autodiff."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

import deqjax
from deqjax.linear import GMRES
from tests import helpers
from tests.helpers import batched, dense, error, inner, problem, row, weigh

SOLVER = deqjax.Picard(1e-14, 1e-14)
EXACT = deqjax.ImplicitAdjoint(GMRES(1e-13))
# Those that show the least beside the others only on request.
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("relu", "linear")]
KINDS = ["tanh", "norm", "tree", "aux", "idle", *SLOW]


def loss(p, adjoint=EXACT, **kwargs):
    return helpers.loss(p, adjoint=adjoint, solver=SOLVER, max_steps=300, **kwargs)


# --- reverse mode ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_dense_one_and_that_of_finite_differences(kind, x64):
    p = problem(kind)
    run = loss(p)
    gradient = eqx.filter_jit(eqx.filter_grad(run))(p.args)
    assert error(gradient, dense(p).gradient) <= 1e-9
    direction, want = helpers.slope(run, p.args)
    np.testing.assert_allclose(inner(gradient, direction), want, rtol=1e-8)


def test_leaves_that_f_does_not_use_have_gradient_zero(x64):
    p = problem("idle")
    gradient = eqx.filter_jit(eqx.filter_grad(loss(p)))(p.args)
    assert gradient["unused"].shape == (3,)
    assert not np.any(gradient["unused"])
    assert gradient["order"] is None


def test_the_start_has_gradient_zero(x64):
    p = problem("tree")
    gradient = jax.grad(loss(p), argnums=1)(p.args, p.z0)
    assert jax.tree.structure(gradient) == jax.tree.structure(p.z0)
    assert all(not np.any(x) for x in jax.tree.leaves(gradient))


def test_without_anything_to_differentiate_nothing_is_solved(x64):
    p, counter = problem("tanh"), helpers.Counter()
    q = p._replace(fn=counter.wrap(p.fn))
    gradient = jax.grad(lambda z: loss(q)(p.args, z))(p.z0)
    assert not np.any(gradient)
    assert counter.pulls == 0


def test_a_loss_of_aux_alone_has_its_gradient(x64):
    p = problem("aux")

    def ours(args):
        sol = deqjax.fixed_point(
            p.fn, p.z0, args, has_aux=True, solver=SOLVER, adjoint=EXACT, max_steps=300
        )
        return sol.aux["energy"]

    def plain(args):
        z = lax.fori_loop(0, 300, lambda _, z: p.fn(z, args)[0], p.z0)
        return p.fn(z, args)[1]["energy"]

    got = jax.grad(ours)(p.args)
    assert error(got, jax.jacfwd(plain)(p.args)) <= 1e-9


@pytest.mark.parametrize(
    "linear_solver",
    [lx.LU(), lx.QR(), lx.GMRES(1e-12, 1e-12), lx.BiCGStab(1e-13, 1e-13)],
    ids=lambda s: type(s).__name__,
)
def test_any_linear_solver_of_lineax_serves(linear_solver, x64):
    p = problem("aux")
    adjoint = deqjax.ImplicitAdjoint(linear_solver)
    assert error(jax.jit(jax.grad(loss(p, adjoint)))(p.args), dense(p).gradient) <= 1e-9


def test_tags_choose_the_solver_for_symmetric_jacobians(x64):
    p = problem("linear")
    w = (p.args[0] + p.args[0].T) / 2
    p = p._replace(args=(w, p.args[1]))
    adjoint = deqjax.ImplicitAdjoint(lx.CG(1e-13, 1e-13))
    tags = frozenset({lx.symmetric_tag, lx.negative_semidefinite_tag})
    got = jax.jit(jax.grad(loss(p, adjoint, tags=tags)))(p.args)
    assert error(got, dense(p).gradient) <= 1e-9


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_loss_does_not_matter(scale):
    p = problem("tanh")
    adjoint = deqjax.ImplicitAdjoint()
    run = lambda a: helpers.loss(p, adjoint=adjoint)(a)
    want = jax.grad(run)(p.args)
    got = jax.grad(lambda a: jnp.float32(scale) * run(a))(p.args)
    assert error(jax.tree.map(lambda x: x / jnp.float32(scale), got), want) <= 1e-5


def test_no_cotangent_gives_gradient_zero():
    p = problem("tanh")
    got = jax.grad(lambda a: 0 * helpers.loss(p)(a))(p.args)
    assert all(not np.any(x) for x in jax.tree.leaves(got))


@pytest.mark.parametrize("state", ["float32", "bfloat16", "float16"])
def test_gradients_of_lower_precision(state):
    dtype = jnp.dtype(state)
    eps = float(jnp.finfo(dtype).eps)
    p = problem("tanh")
    args = jax.tree.map(lambda x: x.astype(dtype), p.args)
    q = p._replace(z0=p.z0.astype(dtype), args=args)
    solver = deqjax.Picard(8 * eps, 8 * eps)
    got = jax.grad(helpers.loss(q, solver=solver, max_steps=200))(args)
    assert all(x.dtype == dtype for x in jax.tree.leaves(got))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), args)
    want = dense(p._replace(args=exact)).gradient
    assert error(got, want) <= 60 * eps


# --- cost -----------------------------------------------------------------------------


def test_a_gradient_linearises_once_and_counts_its_products(x64):
    p, counter = problem("tanh"), helpers.Counter()
    q = p._replace(fn=counter.wrap(p.fn))
    probe = deqjax.BackwardStats()

    @jax.jit
    def gradient(args, probe):
        adjoint = deqjax.ImplicitAdjoint(GMRES(1e-6), probe=probe)
        return loss(q, adjoint)(args)

    forward = jax.jit(lambda a: loss(q, EXACT)(a))
    forward(p.args)
    evals = counter.evaluations
    counter.reset()
    _, stats = jax.grad(gradient, argnums=(0, 1))(p.args, probe)
    assert counter.evaluations == evals + 1
    # The products of the solve, and the one that makes the gradient of args.
    assert counter.pulls == int(stats.num_products) + 1
    assert 2 <= int(stats.num_products) <= 4 + 1  # One measures the residual.


def test_nothing_calls_the_host():
    p = problem("aux")
    run = jax.jit(jax.grad(helpers.loss(p, adjoint=deqjax.ImplicitAdjoint())))
    assert "callback" not in run.lower(p.args).compile().as_text()


# --- forward mode and second order ----------------------------------------------------


@pytest.mark.parametrize("kind", ["tanh", "tree", "aux"])
def test_forward_mode_is_the_transpose_of_reverse_mode(kind, x64):
    p = problem(kind)
    run = loss(p)
    direction, want = helpers.slope(run, p.args, seed=1)
    got = jax.jvp(run, (p.args,), (direction,))[1]
    np.testing.assert_allclose(got, want, rtol=1e-8)
    np.testing.assert_allclose(got, inner(dense(p).gradient, direction), rtol=1e-9)


def test_jacfwd_of_the_value_is_the_dense_jacobian(x64):
    p = problem("tanh")

    def value(x):
        sol = deqjax.fixed_point(
            p.fn, p.z0, (p.args[0], x), solver=SOLVER, adjoint=EXACT, max_steps=300
        )
        return sol.value

    push = dense(p).tangent
    want = np.stack([push(t) for t in np.eye(20)[16:]], 1)
    assert error(jax.jacfwd(value)(p.args[1]), want) <= 1e-9
    assert error(jax.jacrev(value)(p.args[1]), want) <= 1e-9


def second_orders(run, flat, t):
    """∇²run · t in the three ways of composing forward and reverse mode."""
    yield jax.jvp(jax.grad(run), (flat,), (t,))[1]
    yield jax.grad(lambda a: jnp.vdot(jax.grad(run)(a), t))(flat)
    yield jax.grad(lambda a: jax.jvp(run, (a,), (t,))[1])(flat)


@pytest.mark.parametrize("kind", ["aux", pytest.param("tree", marks=pytest.mark.slow)])
def test_second_order_in_all_compositions(kind, x64):
    p = problem(kind, n=3)
    flat, back = ravel_pytree(p.args)
    run, fn = loss(p), helpers.pair(p)

    def plain(a):
        z = lax.scan(lambda z, _: (fn(z, back(a))[0], None), p.z0, None, length=120)[0]
        return weigh((z, fn(z, back(a))[1]))

    t = jr.normal(jr.key(0), flat.shape)
    want = jax.jit(lambda a: jax.jvp(jax.grad(plain), (a,), (t,))[1])(flat)
    ours = jax.jit(lambda a: list(second_orders(lambda a: run(back(a)), a, t)))(flat)
    for got in ours:
        assert error(got, want) <= 1e-8


def test_mixed_second_derivatives(x64):
    # One of two arguments is moved at a time, and one of two tangents.
    p = problem("tanh", n=3)
    w, x = p.args
    run = lambda w, x: loss(p)((w, x))
    want = jax.jit(jax.jvp, static_argnums=0)(
        lambda w: jax.grad(run, 1)(w, x), (w,), (w,)
    )[1]

    @jax.jit
    def ours(w, x):
        along = lambda tx: jax.jvp(run, (w, x), (w, tx))[1]
        first = jax.grad(along)(x)
        return first, jax.grad(lambda x: jax.jvp(lambda w: run(w, x), (w,), (w,))[1])(x)

    first, second = ours(w, x)
    assert error(first, jax.grad(run, 1)(w, x)) <= 1e-9
    assert error(second, want) <= 1e-9


def test_hessian_of_a_quadratic_solution(x64):
    # z = a / (1 − b): every second derivative is known by hand.
    fn = lambda z, args: args[1] * z + args[0]
    run = lambda args: (
        deqjax.fixed_point(
            fn, jnp.zeros(()), args, solver=SOLVER, adjoint=EXACT, max_steps=200
        ).value
    )
    got = jax.hessian(run)((jnp.array(2.0), jnp.array(0.5)))
    want = [[0.0, 4.0], [4.0, 32.0]]
    np.testing.assert_allclose(np.array(got), want, atol=1e-9)


# --- batches --------------------------------------------------------------------------


def test_gradients_under_batch_ndim_and_vmap(x64):
    p = batched()
    tight = {"max_steps": 400}
    whole = deqjax.Picard(1e-14, 1e-14, batch_ndim=1)

    def together(args):
        return helpers.loss(p, solver=whole, **tight)(args)

    def lanes(args):
        w, x, gain = args

        def one(x, gain, z):
            sol = deqjax.fixed_point(p.fn, z, (w, x, gain), solver=SOLVER, **tight)
            return sol.value

        return weigh(jax.vmap(one)(x, gain, p.z0))

    want = dense(p).gradient
    # The tolerance of the default linear solver is 1e-8.
    for run in (together, lanes):
        assert error(jax.jit(jax.grad(run))(p.args), want) <= 1e-7


def test_gradients_of_a_problem_do_not_depend_on_its_mates(x64):
    p = batched()
    solver = deqjax.Picard(1e-12, 1e-12, batch_ndim=1)

    def gradient(q, solver, keep):
        def run(x):
            sol = deqjax.fixed_point(
                q.fn, q.z0, (q.args[0], x, q.args[2]), solver=solver, max_steps=400
            )
            return jnp.sum(jnp.sin(sol.value[keep]))

        return jax.grad(run)(q.args[1])

    clean = gradient(p, solver, slice(None))
    spoiled = gradient(p._replace(z0=p.z0.at[2].set(jnp.nan)), solver, slice(None))
    keep = np.array([0, 1, 3])
    assert error(spoiled[keep], clean[keep]) <= 1e-12
    # Its own part is 0: see the test of the probe below.
    assert not np.any(spoiled[2])
    alone = gradient(row(p, 1), deqjax.Picard(1e-12, 1e-12), slice(None))
    assert error(clean[1], alone) <= 1e-7


def test_a_sharded_batch_has_the_same_gradient():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    shard = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    p = batched()
    w, x, gain = p.args
    place = lambda a: jax.device_put(a, shard)
    solver = deqjax.Picard(1e-6, 1e-6, batch_ndim=1)
    run = lambda args, z: helpers.loss(p, solver=solver, max_steps=200)(args, z)
    gradient = jax.jit(jax.grad(run))
    got = gradient((w, place(x), place(gain)), place(p.z0))
    assert got[1].sharding.is_equivalent_to(shard, 2)
    assert error(got, gradient(p.args, p.z0)) <= 1e-5


# --- failure --------------------------------------------------------------------------


def singular(scale):
    """Two problems, one of them with I − J singular and no solution for its loss."""
    slopes = jnp.array([[0.5, 0.25], [1.0, 0.5]])

    def fn(z, x):
        return slopes * z + x

    x = jnp.array([[1.0, 1.0], [0.0, 1.0]])

    def run(x, adjoint):
        solver = deqjax.Picard(1e-6, 1e-6, batch_ndim=1)
        sol = deqjax.fixed_point(
            fn, jnp.zeros((2, 2)), x, solver=solver, adjoint=adjoint
        )
        return scale * jnp.sum(sol.value)

    return run, x


@pytest.mark.parametrize("on_failure", ["keep", "nan", "jfb"])
def test_a_failed_backward_solve_returns_what_was_asked_for(on_failure):
    run, x = singular(1e-3)

    def loss(x, probe):
        adjoint = deqjax.ImplicitAdjoint(probe=probe, on_failure=on_failure)
        return run(x, adjoint)

    probe = deqjax.BackwardStats(batch_shape=(2,))
    got, stats = jax.grad(loss, argnums=(0, 1))(x, probe)
    np.testing.assert_array_equal(stats.converged, [1.0, 0.0])
    np.testing.assert_allclose(got[0], [2e-3, 4e-3 / 3], rtol=1e-5)
    if on_failure == "nan":
        assert np.isnan(got[1]).all()
    elif on_failure == "jfb":
        np.testing.assert_allclose(got[1], [1e-3, 1e-3], rtol=1e-6)
    else:
        # The least squares solution in the Krylov space: along (1, 1), then (0, 1/2).
        np.testing.assert_allclose(got[1][1], 2e-3, rtol=1e-5)
        assert stats.residual[1] >= 0.99e-3


def test_a_nan_cotangent_shows():
    p = problem("tanh")
    got = jax.grad(lambda a: jnp.nan * helpers.loss(p)(a))(p.args)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(got))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"linear_solver": 3}, "linear_solver"),
        ({"probe": 3}, "probe"),
        ({"on_failure": "raise"}, "on_failure"),
    ],
)
def test_arguments_are_refused_by_name(kwargs, words):
    with pytest.raises((TypeError, ValueError), match=words):
        deqjax.ImplicitAdjoint(**kwargs)
