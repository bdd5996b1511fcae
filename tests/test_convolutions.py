"""Convolutions that XLA computes fast on the CPU, in loops as well.

Entries are small integers, so that sums are exact in whatever order they are made, and
results have to be equal bit by bit.
"""

import functools as ft
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import deqjax
from deqjax._convolutions import canonical, rewrite
from tests.helpers import error, identical

pytestmark = pytest.mark.optimised

CANONICAL = {"b0f_0io->b0f", "b01f_01io->b01f", "b012f_012io->b012f"}
SAME = {"window_strides": (1, 1), "padding": "SAME"}


def integers(seed, shape, dtype="float32"):
    return jr.randint(jr.key(seed), shape, -3, 4).astype(dtype)


# name -> shape of the operand, shape of the kernel, parameters
CASES = {
    "plain": ((4, 8, 6, 5), (8, 8, 3, 3), SAME),
    "strided": (
        (4, 8, 7, 6),
        (6, 8, 3, 2),
        {"window_strides": (2, 3), "padding": ((2, 0), (-1, 3))},
    ),
    "dilated": (
        (2, 8, 5, 4),
        (8, 8, 2, 3),
        {"rhs_dilation": (3, 2), "lhs_dilation": (1, 2)},
    ),
    "1d": ((4, 8, 9), (8, 8, 4), {"padding": "VALID"}),
    "3d": ((2, 8, 4, 3, 5), (6, 8, 2, 3, 2), {"padding": "SAME"}),
    "odd layouts": (
        (8, 6, 4, 5),
        (3, 8, 6, 2),
        {"dimension_numbers": ("CHNW", "HIOW", "WNCH")},
    ),
    "grouped": ((4, 16, 6, 5), (32, 8, 3, 3), {**SAME, "feature_group_count": 2}),
    "depthwise": ((4, 6, 6, 5), (12, 1, 3, 3), {**SAME, "feature_group_count": 6}),
    "batch groups": ((8, 3, 6, 5), (12, 3, 3, 2), {"batch_group_count": 4}),
    "batch groups, NHWC": (
        (6, 6, 5, 3),
        (3, 2, 3, 4),
        {"batch_group_count": 2, "dimension_numbers": ("NHWC", "HWIO", "NHWC")},
    ),
    "few channels": ((2, 1, 6, 5), (2, 1, 3, 3), SAME),
    "precision": ((4, 8, 6, 5), (8, 8, 3, 3), {"precision": "highest"}),
    "wider": (
        (2, 8, 4, 4),
        (8, 8, 2, 2),
        {"preferred_element_type": jnp.dtype("float32")},
    ),
}


def case(name, dtype="float32"):
    """A convolution, and two operands for it."""
    shape, kernel, params = CASES[name]
    n = len(shape) - 2
    params = {"window_strides": (1,) * n, "padding": ((1, 1),) * n, **params}
    fn = ft.partial(lax.conv_general_dilated, **params)
    return fn, integers(1, shape, dtype), integers(2, kernel, dtype)


def in_a_while_loop(fn, *example):
    """fn(*args), made again and again in a loop that XLA does not unroll."""
    blank = jax.tree.map(jnp.zeros_like, jax.eval_shape(fn, *example))

    def run(*args):
        trips = 2 + jnp.isnan(jnp.sum(args[0])).astype(int)
        return lax.fori_loop(0, trips, lambda *_: fn(*args), blank)

    return run


def in_loop(fn):
    return lambda *args: jax.jit(in_a_while_loop(fn, *args))(*args)


def derivatives(fn):
    """Values, the first derivatives both ways, and the second, which are bilinear."""

    def all_of(x, w, dx, dw):
        out, tangent = jax.jvp(fn, (x, w), (dx, dw))
        pulled = jax.vjp(fn, x, w)[1](out)
        pull = lambda x, w: jax.vjp(fn, x, w)[1](tangent)
        second = jax.jvp(pull, (x, w), (dx, dw))[1]
        twice = jax.vjp(pull, x, w)[1]((dx, dw))
        return out, tangent, pulled, second, twice

    return all_of


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_are_those_of_the_convolution(name):
    fn, x, w = case(name)
    args = x, w, integers(3, x.shape), integers(4, w.shape)
    got = in_loop(derivatives(canonical(fn)))(*args)
    assert identical(got, jax.jit(derivatives(fn))(*args))


@pytest.mark.parametrize("name", ["plain", "batch groups", "wider"])
def test_of_every_dtype(name, dtype):
    fn, x, w = case(name, dtype)
    if name == "wider" and dtype == "float64":
        pytest.skip("float32 is not wider")
    got = in_loop(canonical(fn))(x, w)
    want = fn(x, w)
    assert got.dtype == want.dtype
    assert identical(got, want)


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (2, 3)])
@pytest.mark.parametrize("name", ["plain", "odd layouts", "grouped", "batch groups"])
def test_batches(name, dims):
    fn, x, w = case(name)

    def stacked(a, dim):
        many = [a, a[::-1], 2 * a]
        return a if dim is None else jnp.stack(many, dim)

    x, w = stacked(x, dims[0]), stacked(w, dims[1])
    loss = lambda fn: lambda x, w: (fn(x, w), jax.vjp(fn, x, w)[1](fn(x, w)))
    got = in_loop(jax.vmap(loss(canonical(fn)), dims))(x, w)
    assert identical(got, jax.vmap(loss(fn), dims)(x, w))


# Functions that hold a convolution where it has to be looked for


@jax.custom_vjp
def own_rule(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME")


def _own_forward(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME"), (x, w)


def _own_backward(kept, ct):
    plain = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME")
    return jax.tree.map(lambda t: 2 * t, jax.vjp(plain, *kept)[1](ct))


own_rule.defvjp(_own_forward, _own_backward)


@jax.custom_jvp
def own_tangent(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME")


@own_tangent.defjvp
def _own_tangent(primals, tangents):
    plain = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME")
    return plain(*primals), 2 * jax.jvp(plain, primals, tangents)[1]


def convolve(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME")


saved = jax.checkpoint_policies.dots_saveable
NESTED = {
    "jit": jax.jit(convolve),
    "checkpoint": jax.checkpoint(convolve),
    "policy": jax.checkpoint(lambda x, w: convolve(convolve(x, w), w), policy=saved),
    "custom_vjp": own_rule,
    "custom_jvp": own_tangent,
    "nested": jax.jit(jax.checkpoint(lambda x, w: own_rule(own_tangent(x, w), w))),
    "scan": lambda x, w: lax.scan(lambda x, _: (convolve(x, w), None), x, length=2)[0],
    "while": lambda x, w: lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, convolve(c[1], w)), (0, x)
    )[1],
    "cond": lambda x, w: lax.cond(x[0, 0, 0, 0] > 9, lambda x, w: x, convolve, x, w),
    "vmap": lambda x, w: jax.vmap(lambda x: convolve(x[None], w)[0])(x),
}


@pytest.mark.parametrize("name", NESTED)
def test_wherever_it_is(name):
    fn = NESTED[name]
    x, w = jnp.sign(integers(1, (4, 8, 6, 5))), jnp.sign(integers(2, (8, 8, 3, 3)))
    # A `while` cannot be pulled back.
    pull = lambda fn: lambda x, w: (fn(x, w), jax.vjp(fn, x, w)[1](x))
    both = (lambda fn: fn) if name == "while" else pull
    run = in_a_while_loop(both(canonical(fn)), x, w)
    got = jax.jit(run)(x, w)
    assert identical(got, jax.jit(both(fn))(x, w))
    assert set(layouts(run, x, w)) <= CANONICAL


def test_without_this_loops_are_not_canonical():
    fn, x, w = case("plain")
    pull = lambda x, w: jax.vjp(fn, x, w)[1](x)
    assert not set(layouts(in_a_while_loop(pull, x, w), x, w)) & CANONICAL


def layouts(fn, *args):
    """The layouts of all convolutions that XLA has compiled."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    found = re.findall(r"dim_labels=([\w>-]+)", text)
    assert found
    assert "while(" in text
    return found


def test_a_policy_sees_the_convolution_as_it_was():
    fn = canonical(NESTED["policy"])
    x, w = jnp.ones((4, 8, 6, 5)), jnp.ones((8, 8, 3, 3))
    grad = jax.make_jaxpr(jax.grad(lambda x, w: jnp.sum(fn(x, w) ** 2)))(x, w)
    plain = jax.grad(lambda x, w: jnp.sum(NESTED["policy"](x, w) ** 2))
    count = lambda jaxpr: str(jaxpr).count("conv_general_dilated")
    # Each of the two convolutions is made once, and pulled back once.
    assert count(grad) == count(jax.make_jaxpr(plain)(x, w)) == 4


def test_python_runs_once():
    calls = []

    def fn(x, w):
        calls.append(1)
        return convolve(x, w)

    jax.make_jaxpr(canonical(fn))(jnp.ones((4, 8, 6, 5)), jnp.ones((8, 8, 3, 3)))
    assert len(calls) == 1


def test_without_convolutions_nothing_changes():
    @jax.checkpoint
    def fn(x, w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), jax.nn.relu(x), length=3)

    jaxpr = jax.make_jaxpr(fn)(jnp.ones((4, 4)), jnp.ones((4, 4)))
    assert rewrite(jaxpr) is jaxpr
    again = jax.make_jaxpr(canonical(fn))(jnp.ones((4, 4)), jnp.ones((4, 4)))
    assert str(again) == str(jaxpr)


def test_arguments_and_results_may_be_of_any_kind():
    def fn(tree, name):
        return {"out": convolve(*tree), "name": name, "none": None}

    x, w = integers(1, (4, 8, 6, 5)), integers(2, (8, 8, 3, 3))
    out = canonical(fn)([x, w], "some")
    assert (out["name"], out["none"]) == ("some", None)
    assert identical(out["out"], convolve(x, w))


def bare(text):
    """A lowered program without the names of its functions."""
    return re.sub(r"@\w+", "@", text)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ["odd layouts", "batch groups", "depthwise"])
def test_elsewhere_the_program_is_the_same(platform, name):
    fn, x, w = case(name)

    def lowered(fn):
        pull = lambda x, w: jax.vjp(fn, x, w)[1](fn(x, w))
        program = jax.jit(in_a_while_loop(pull, x, w)).trace(x, w)
        return bare(program.lower(lowering_platforms=(platform,)).as_text())

    assert lowered(canonical(fn)) == lowered(fn)


# Meshes


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["plain", "strided"])
def test_a_sharded_batch_stays_sharded(kind, name):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    fn, x, w = case(name)
    want = fn(x, w)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, rows)
        w = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
        compiled = jax.jit(canonical(fn)).lower(x, w).compile()
        out = compiled(x, w)
    assert out.sharding.is_equivalent_to(rows, out.ndim)
    assert not re.search("all-(gather|reduce|to-all)", compiled.as_text())
    np.testing.assert_array_equal(out, want)


def test_in_a_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    fn, x, w = case("plain")
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def sharded(fn):
        loss = lambda w, x: jnp.sum(fn(x, w) ** 2)
        each = lambda x, w: lax.psum(jax.grad(loss)(w, x), "data")
        # Convolutions are entered in what is already mapped, too.
        mapped = jax.shard_map(
            each, mesh=mesh, in_specs=(rows, whole), out_specs=whole, check_vma=False
        )
        return jax.jit(mapped)(x, w)

    want = jax.grad(lambda w: jnp.sum(fn(x, w) ** 2))(w)
    assert identical(np.asarray(sharded(canonical(fn))), np.asarray(want))


# What deqjax makes of maps with convolutions


def problem(channels=8):
    k1, k2 = jr.split(jr.key(0))
    w = jr.normal(k1, (channels, channels, 3, 3)) / (3 * channels)
    x = jr.normal(k2, (4, channels, 6, 5))
    fn = lambda z, args: jnp.tanh(convolve(z, args[0]) + args[1])
    return fn, jnp.zeros_like(x), (w, x)


def plain_fixed_point(fn, z, args, steps=60):
    for _ in range(steps):
        z = fn(z, args)
    return z


def solved(solver, adjoint=None, steps=12):
    adjoint = deqjax.ImplicitAdjoint() if adjoint is None else adjoint
    fn, z0, _ = problem()

    def loss(args):
        sol = deqjax.fixed_point(
            fn, z0, args, solver=solver, adjoint=adjoint, max_steps=steps
        )
        return jnp.sum(sol.value**2)

    return loss


SOLVERS = {
    "picard": deqjax.Picard(),
    "static": deqjax.Picard(None, None),
    "anderson": deqjax.Anderson(),
    "broyden": deqjax.Broyden(),
    "newton": deqjax.NewtonKrylov(),
    "foreign": optx.FixedPointIteration(1e-4, 1e-6),
    "dogleg": optx.Dogleg(
        1e-4, 1e-6, linear_solver=lx.GMRES(1e-4, 1e-4, max_steps=20, restart=10)
    ),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_forward_solves_have_canonical_loops(name):
    _, _, args = problem()
    assert set(layouts(solved(SOLVERS[name]), args)) <= CANONICAL


ADJOINTS = {
    "gmres": deqjax.ImplicitAdjoint(),
    "neumann": deqjax.ImplicitAdjoint(deqjax.linear.Neumann()),
    "series": deqjax.NeumannAdjoint(9),
    "jfb": deqjax.JFBAdjoint(),
    "phantom": deqjax.PhantomAdjoint(10),
    "unrolled": deqjax.UnrolledAdjoint(),
    "truncated": deqjax.UnrolledAdjoint(last=9),
}


@pytest.mark.parametrize("name", ADJOINTS)
def test_gradients_have_canonical_loops(name):
    _, _, args = problem()
    gradient = jax.grad(solved(deqjax.Picard(), ADJOINTS[name]))
    assert set(layouts(gradient, args)) <= CANONICAL


@pytest.mark.parametrize("name", ["gmres", "neumann", "unrolled"])
def test_gradients_are_those_of_plain_iteration(name):
    fn, z0, args = problem()
    want = jax.grad(lambda a: jnp.sum(plain_fixed_point(fn, z0, a) ** 2))(args)
    solver = deqjax.Picard(1e-7, 1e-7)
    got = jax.jit(jax.grad(solved(solver, ADJOINTS[name], steps=60)))(args)
    assert error(got, want) <= 1e-4


def test_maps_given_to_optimistix_are_canonical_too():
    fn, z0, args = problem()

    def loss(args):
        sol = optx.fixed_point(
            fn, deqjax.Picard(), z0, args, adjoint=deqjax.ImplicitAdjoint()
        )
        return jnp.sum(sol.value**2)

    assert set(layouts(jax.grad(loss), args)) <= CANONICAL


@pytest.mark.parametrize("solver", [deqjax.linear.GMRES(), deqjax.linear.Neumann()])
def test_linear_solves_have_canonical_loops(solver):
    _, z0, (w, x) = problem()

    def solve(w, x):
        operator = lx.FunctionLinearOperator(
            lambda v: v - 0.5 * convolve(v, w), jax.eval_shape(lambda: z0)
        )
        return lx.linear_solve(operator, x, solver).value

    assert set(layouts(solve, w, x)) <= CANONICAL
    out = solve(w, x)
    assert error(out - 0.5 * convolve(out, w), x) <= 1e-4


def test_the_spectral_norm_of_a_jacobian_has_a_canonical_loop():
    fn, z0, args = problem()
    norm = lambda args: jnp.sum(
        deqjax.regularise.jacobian_spectral_norm(fn, z0, args, key=jr.key(0))
    )
    assert set(layouts(jax.grad(norm), args)) <= CANONICAL


def test_checkpointed_maps_are_canonical():
    fn, z0, args = problem()
    loss = lambda args: jnp.sum(
        deqjax.fixed_point(eqx.filter_checkpoint(fn), z0, args).value
    )
    assert set(layouts(jax.grad(loss), args)) <= CANONICAL
