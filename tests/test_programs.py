"""Calls without an outer `jax.jit`: what they see, and what they cost."""

import dataclasses
import gc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from deqjax._content import Incomparable, content
from deqjax._fixed_point import PROGRAMS
from deqjax._programs import Programs, with_inputs_for
from tests import helpers
from tests.helpers import identical

# Solves z = w (z + a), z* = w a / (1 − w), whose derivative by a is w / (1 − w).
SOLVER = deqjax.Picard(1e-6, 0.0)


def solve(fn, a=1.0):
    z0 = jnp.zeros(2)
    sol = deqjax.fixed_point(fn, z0, jnp.asarray(a), solver=SOLVER, max_steps=99)
    return sol.value[0]


value = solve
slope = lambda fn: jax.grad(lambda a: solve(fn, a))(1.0)
by = pytest.mark.parametrize("run", [value, slope])


# --- what a call sees -----------------------------------------------------------------


class Layer:
    """Not a pytree, and it may be changed."""

    def __init__(self, w):
        self.w = w

    def __call__(self, z, a):
        return self.w * (z + a)

    def bound(self, z, a):
        return self.w * (z + a)


@dataclasses.dataclass
class Unhashable(Layer):
    w: jax.Array | float


@dataclasses.dataclass(frozen=True)
class Frozen:
    w: jax.Array

    def __call__(self, z, a):
        return self.w * (z + a)


class Over(eqx.Module):
    fn: object = eqx.field(static=True)

    def __call__(self, z, a):
        return self.fn(z, a)


def set_attribute(w):
    layer = Layer(w(0.5))
    yield layer
    layer.w = w(0.75)
    yield layer


def bound_method(w):
    layer = Layer(w(0.5))
    yield layer.bound
    layer.w = w(0.75)
    yield layer.bound


def in_place(w):
    weight = np.full(2, 0.5, np.float32)
    fn = lambda z, a: weight * (z + a)
    yield fn
    weight[:] = 0.75
    yield fn


def dictionary(w):
    params = {"w": w(0.5)}
    fn = lambda z, a: params["w"] * (z + a)
    yield fn
    params["w"] = w(0.75)
    yield fn


def listed(w):
    params = [w(0.5)]
    fn = lambda z, a: params[0] * (z + a)
    yield fn
    params[0] = w(0.75)
    yield fn


def layer_over_closure(w):
    model = Layer(w(0.5))
    layer = Over(lambda z, a: model(z, a))
    yield layer
    model.w = w(0.75)
    yield layer


def cell_variable(w):
    weight = w(0.5)
    fn = lambda z, a: weight * (z + a)
    yield fn
    weight = w(0.75)
    yield fn


def unhashable(w):
    layer = Unhashable(w(0.5))
    yield layer
    layer.w = w(0.75)
    yield layer


def frozen(w):
    yield Frozen(jnp.asarray(w(0.5)))
    yield Frozen(jnp.asarray(w(0.75)))


def converted(w):
    for x in (0.5, 0.75):
        weight = jnp.asarray(w(x))
        fn = lambda z, a, weight=weight: weight * (z + a)
        yield eqx.filter_closure_convert(fn, jnp.zeros(2), jnp.array(1.0))


def fresh(w):
    for x in (0.5, 0.75):
        weight = w(x)
        yield lambda z, a, weight=weight: weight * (z + a)


KINDS = [
    set_attribute,
    bound_method,
    in_place,
    dictionary,
    listed,
    layer_over_closure,
    cell_variable,
    unhashable,
    frozen,
    converted,
    fresh,
]


@by
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("w", [jnp.asarray, float], ids=["array", "number"])
def test_the_map_is_what_it_is_at_the_call(kind, w, run):
    got = [float(run(fn)) for fn in kind(w)]
    np.testing.assert_allclose(got, [1.0, 3.0], rtol=1e-4)


@by
@pytest.mark.parametrize("kind", KINDS)
def test_where_arrays_alone_changed_nothing_is_compiled(kind, run):
    first, second = kind(lambda x: jnp.asarray(x)), kind(lambda x: jnp.asarray(x))
    jax.block_until_ready([run(fn) for fn in first])
    with helpers.compilations() as compiled:
        jax.block_until_ready([run(fn) for fn in second])
    assert not compiled


def test_numbers_that_change_are_compiled_twice():
    """Once as constants, and once as inputs, when another value has been seen."""
    layer = Layer(0.5)
    for w in (0.5, 0.6):
        layer.w = w
        jax.block_until_ready(solve(layer))
    with helpers.compilations() as compiled:
        for w in (0.7, 0.75, 0.5):
            layer.w = w
            got = float(solve(layer))
            np.testing.assert_allclose(got, w / (1 - w), rtol=1e-4)
    assert not compiled


@pytest.mark.parametrize("w", [1.0, -0.0, np.float32(0.25), 3])
def test_numbers_as_inputs_are_the_numbers(w):
    fn = lambda z: jnp.sin(z) * w + 2.0
    closed = jax.make_jaxpr(fn)(jnp.ones(3))
    which = frozenset(range(len(content(closed.jaxpr).numbers)))
    jaxpr, values = with_inputs_for(closed.jaxpr, which)
    assert values
    open_ = jax.extend.core.ClosedJaxpr(jaxpr, values + closed.consts)
    got = jax.extend.core.jaxpr_as_fun(open_)(jnp.ones(3))[0]
    assert identical(got, fn(jnp.ones(3)))
    assert content(jaxpr).numbers == ()


def test_gradients_reach_what_a_mutable_object_holds():
    layer = Layer(None)

    def loss(w):
        layer.w = w
        return solve(layer)

    # d/dw w / (1 − w) = 1 / (1 − w)².
    for w in (0.5, 0.75):
        np.testing.assert_allclose(jax.grad(loss)(w), 1 / (1 - w) ** 2, rtol=1e-4)
    assert not isinstance(jax.jit(jax.grad(loss))(0.5), jax.core.Tracer)


@by
def test_tracers_do_not_leak(run):
    with jax.checking_leaks():
        for w in (0.5, 0.75):
            weight = jnp.asarray(w)
            np.testing.assert_allclose(
                run(lambda z, a, w=weight: w * (jax.nn.relu(z) + a)),
                w / (1 - w),
                rtol=1e-4,
            )


def test_flags_and_names_in_args_choose_the_branch():
    def fn(z, args):
        a, name, act = args
        return act(0.5 * (z + a) if name == "half" else 0.75 * (z + a))

    def run(name, act):
        args = (jnp.array(1.0), name, act)
        return float(deqjax.fixed_point(fn, jnp.zeros(()), args, max_steps=99).value)

    got = [run("half", jax.nn.relu), run("other", jax.nn.relu), run("half", jnp.sin)]
    np.testing.assert_allclose(got[:2], [1.0, 3.0], rtol=1e-3)
    assert got[2] < 1


def test_aux_that_is_no_array_is_that_of_this_call():
    def run(name):
        fn = lambda z, a: (0.5 * (z + a), {"name": name, "z": z})
        sol = deqjax.fixed_point(fn, jnp.zeros(2), jnp.array(1.0), has_aux=True)
        return sol.aux

    assert run("first")["name"] == "first"
    with helpers.compilations() as compiled:
        aux = run("second")
    assert aux["name"] == "second"
    assert aux["z"].shape == (2,)
    assert not compiled


# --- derivative rules and callbacks ---------------------------------------------------


def with_rule(kind, factor):
    """The identity, with a derivative rule that multiplies by a factor."""
    if kind == "jvp":
        same = jax.custom_jvp(lambda z: z)
        same.defjvp(lambda p, t: (p[0], factor * t[0]))
        return same
    if kind == "vjp":
        same = jax.custom_vjp(lambda z: z)
        same.defvjp(lambda z: (z, None), lambda _, ct: (factor * ct,))
        return same
    same = eqx.filter_custom_vjp(lambda z: z)
    same.def_fwd(lambda perturbed, z: (z, None))
    same.def_bwd(lambda _, ct, perturbed, z: factor * ct)
    return same


@pytest.mark.parametrize("kind", ["jvp", "vjp", "filter_vjp"])
def test_rules_are_those_of_this_call(kind):
    def run(factor):
        same = with_rule(kind, factor)
        return slope(lambda z, a: 0.5 * (z + same(a)))

    got = [run(1.0), run(jnp.asarray(2.0))]
    np.testing.assert_allclose(got, [1.0, 2.0], rtol=1e-4)
    with helpers.compilations() as compiled:
        run(1.0)
    assert not compiled


FACTOR = 1.0


def test_globals_of_a_rule_are_those_of_this_call():
    global FACTOR
    same = jax.custom_vjp(lambda z: z)
    same.defvjp(lambda z: (z, None), lambda _, ct: (FACTOR * ct,))
    got = []
    for FACTOR in (1.0, 2.0):  # noqa: B007
        got.append(slope(lambda z, a: 0.5 * (z + same(a))))
    np.testing.assert_allclose(got, [1.0, 2.0], rtol=1e-4)


class Mutable:
    factor = 1.0


@pytest.mark.parametrize("kind", ["array", "dictionary", "object"])
def test_what_a_rule_reads_may_change_in_place(kind):
    held = {"array": np.ones(1, np.float32), "dictionary": {0: 1.0}}.get(kind, [1.0])
    thing = Mutable()
    same = jax.custom_vjp(lambda z: z)
    read = (lambda: thing.factor) if kind == "object" else (lambda: held[0])
    same.defvjp(lambda z: (z, None), lambda _, ct: (read() * ct,))
    got = []
    for factor in (1.0, 2.0):
        held[0] = thing.factor = factor
        got.append(slope(lambda z, a: 0.5 * (z + same(a))))
    np.testing.assert_allclose(got, [1.0, 2.0], rtol=1e-4)


def test_callbacks_write_to_the_objects_of_this_call():
    def run(into):
        def fn(z, a):
            jax.debug.callback(lambda: into.append(1))
            return 0.5 * (z + a)

        jax.block_until_ready(solve(fn))
        jax.effects_barrier()
        return len(into)

    assert run([]) == run([]) > 1
    into = []
    once = run(into)
    with helpers.compilations() as compiled:
        assert run(into) == 2 * once
    assert not compiled


def test_callbacks_count_in_variables_of_this_call():
    def counted():
        count = 0

        def add():
            nonlocal count
            count += 1

        def fn(z, a):
            jax.debug.callback(add)
            return 0.5 * (z + a)

        jax.block_until_ready(solve(fn))
        jax.effects_barrier()
        return count

    assert counted() == counted() > 1


def test_ordinary_layers_compare():
    def fn(z):
        z = jax.nn.gelu(eqx.nn.LayerNorm(3)(jax.nn.relu(z)))
        z = jax.checkpoint(jnp.sin)(z) + jax.nn.softmax(z)
        z = jax.lax.cond(z[0] > 0, jnp.sin, jax.jit(jnp.cos), z)
        jax.debug.print("{}", z)
        return jax.lax.fori_loop(0, 3, lambda i, z: jax.nn.silu(z) * i, z)

    first, second, other = (
        content(jax.make_jaxpr(lambda z, f=f: f(z))(jnp.ones(3)).jaxpr)
        for f in (fn, fn, lambda z: 2 * fn(z))
    )
    assert first == second
    assert hash(first) == hash(second)
    assert first != other


def test_a_rule_with_a_tracer_in_it_is_not_kept():
    before = len(PROGRAMS)

    def loss(w):
        same = jax.custom_jvp(lambda z: z)
        same.defjvp(lambda p, t: (p[0], w * t[0]))
        with pytest.raises(Incomparable):
            content(jax.make_jaxpr(same)(jnp.ones(2)).jaxpr)
        return solve(lambda z, a: 0.5 * (z + same(a)))

    jax.grad(loss)(1.0)
    assert len(PROGRAMS) == before


# --- what is kept ---------------------------------------------------------------------


def test_fresh_closures_share_one_program():
    run = lambda w: solve(lambda z, a: w * (z + a) + 0.25 * jax.nn.relu(z))
    run(jnp.linspace(0.1, 0.5, 5)[0])
    gc.collect()
    client = jax.devices()[0].client
    programs, executables = len(PROGRAMS), len(client.live_executables())
    for w in jnp.linspace(0.1, 0.5, 5):
        run(w)
    assert len(PROGRAMS) == programs
    assert len(client.live_executables()) <= executables + 2


def test_programs_that_are_not_used_are_forgotten():
    client = jax.devices()[0].client
    build = lambda jaxpr, statics: (
        lambda consts, x: jax.extend.core.jaxpr_as_fun(
            jax.extend.core.ClosedJaxpr(jaxpr, consts)
        )(x)
    )
    programs = Programs(build, most=3)

    def run(n):
        closed = jax.make_jaxpr(lambda x: sum([jnp.sin(x)] * n))(1.0)
        program, consts = programs.find(closed, ())
        np.testing.assert_allclose(program(consts, 1.0)[0], n * np.sin(1), rtol=1e-5)

    for n in range(1, 4):
        run(n)
    gc.collect()
    full = len(client.live_executables())
    for n in range(4, 12):
        run(n)
    gc.collect()
    assert len(programs) == 3
    assert len(client.live_executables()) <= full
    with helpers.compilations() as compiled:
        run(11)
    assert not compiled
