"""Maps that are told the number of their step."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import deqjax
from tests import helpers
from tests.helpers import error, identical, problem, weigh

BETA = 0.7
STATIC = {
    "picard": deqjax.Picard(None, None, beta=BETA),
    "reversible": deqjax.Reversible(None, None, beta=BETA),
}
TESTED = {
    "picard": deqjax.Picard(1e-3, 1e-4, beta=BETA),
    "reversible": deqjax.Reversible(1e-3, 1e-4, beta=BETA),
}
UNROLLED = deqjax.UnrolledAdjoint()
WAYS = {
    "picard": ("picard", UNROLLED),
    "picard, last": ("picard", deqjax.UnrolledAdjoint(last=6)),
    "unrolled": ("reversible", UNROLLED),
    "reversible": ("reversible", deqjax.ReversibleAdjoint()),
}
P = problem("tanh")
KEY = jr.key(3)


def noisy(z, args, step):
    """With an embedding of the step, and noise that fades."""
    w, x, table = args
    size = 0.1 * jnp.exp2(-jnp.asarray(step, z.dtype))
    noise = size * jr.normal(jr.fold_in(KEY, step), z.shape, z.dtype)
    return jnp.tanh(z @ w + x + table[jnp.minimum(step, 2)]) + noise


def arguments():
    return (*P.args, jnp.linspace(-0.5, 0.5, 3).astype(P.z0.dtype))


def solve(args, name, adjoint, steps, z0=P.z0, solvers=None, **kwargs):
    solver = (STATIC if solvers is None else solvers)[name]
    return deqjax.fixed_point(
        noisy,
        z0,
        args,
        solver=solver,
        adjoint=adjoint,
        max_steps=steps,
        has_step=True,
        **kwargs,
    )


def textbook(args, name, steps, first=0, z=P.z0, y=None):
    y = z if y is None else y
    for n in range(first, first + steps):
        if name == "picard":
            z = helpers.mix(BETA, z, noisy(z, args, n))
        else:
            y = helpers.mix(BETA, y, noisy(z, args, n))
            z = helpers.mix(BETA, z, noisy(y, args, n))
    return z


@pytest.mark.parametrize("way", WAYS)
def test_every_evaluation_is_told_its_step_forwards_and_backwards(way, x64):
    name, adjoint = WAYS[way]
    z0 = jnp.asarray(problem("tanh").z0)
    args = tuple(
        jnp.asarray(a, z0.dtype) for a in (*problem("tanh").args, arguments()[2])
    )
    ours = lambda a: weigh(solve(a, name, adjoint, 6, z0).value)
    got = jax.jit(jax.value_and_grad(ours))(args)
    theirs = lambda a: weigh(textbook(a, name, 6, z=z0))
    want = jax.jit(jax.value_and_grad(theirs))(args)
    assert error(got, want) <= 1e-13


@pytest.mark.parametrize("way", ["picard", "reversible"])
def test_a_tested_solve_tells_the_steps_too(way):
    name, adjoint = WAYS[way]
    ours = lambda a: solve(a, name, adjoint, 60, solvers=TESTED)
    sol = jax.jit(ours)(arguments())
    taken = int(sol.stats["num_steps"]) - 1  # The last one only tests.
    # The map changes with the step: no fixed point is tested before it settles.
    got = jax.jit(jax.grad(lambda a: weigh(ours(a).value)))(arguments())
    want = jax.grad(lambda a: weigh(textbook(a, name, taken)))(arguments())
    assert error(sol.value, textbook(arguments(), name, taken)) <= 1e-6
    assert error(got, want) <= 1e-5


def test_segments_count_on_from_the_first_step():
    adjoint = deqjax.ReversibleAdjoint()

    @jax.jit
    def segments(args, first):
        sol = solve(args, "reversible", adjoint, 4)
        options = {"companion": sol.state.companion, "first_step": first}
        return solve(args, "reversible", adjoint, 3, sol.value, options=options).value

    args = arguments()
    long = jax.jit(lambda a: solve(a, "reversible", adjoint, 7).value)
    assert identical(segments(args, 4), long(args))
    assert not identical(segments(args, 5), long(args))
    assert segments._cache_size() == 1
    got = jax.jit(jax.grad(lambda a: weigh(segments(a, 4))))(args)
    want = jax.grad(lambda a: weigh(textbook(a, "reversible", 7)))(args)
    assert error(got, want) <= 1e-5


def test_noise_is_replayed_without_drift():
    def loss(args, probe):
        adjoint = deqjax.ReversibleAdjoint(probe=probe)
        return weigh(solve(args, "reversible", adjoint, 30).value)

    _, stats = jax.jit(jax.grad(loss, (0, 1)))(arguments(), deqjax.BackwardStats())
    assert float(stats.drift) == 0
    assert float(stats.repair) < 0.5


def test_aux_and_second_derivatives_know_the_step(x64):
    p = problem("tanh")
    table = jnp.linspace(-0.5, 0.5, 3)
    fn = lambda z, a, step: (
        jnp.tanh(z @ a[0] + table[step % 3]),
        z * jnp.asarray(step, z.dtype) * a[1],
    )

    def loss(a, adjoint):
        sol = deqjax.fixed_point(
            fn,
            p.z0,
            a,
            solver=STATIC["reversible"],
            adjoint=adjoint,
            max_steps=5,
            has_aux=True,
            has_step=True,
        )
        return weigh(sol.value) + weigh(sol.aux) ** 2

    along = jax.tree.map(jnp.ones_like, p.args)

    def curved(adjoint):
        run = lambda a: jax.grad(loss)(a, adjoint)
        return jax.jit(lambda a: jax.jvp(run, (a,), (along,)))(p.args)

    assert error(curved(deqjax.ReversibleAdjoint()), curved(UNROLLED)) <= 1e-12


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"solver": deqjax.Anderson()}, "no fixed point.*Anderson"),
        ({"solver": deqjax.Picard()}, "`adjoint`.*ImplicitAdjoint"),
        ({"has_step": False, "options": {"first_step": 1}}, "`has_step=True`"),
        (
            {"solver": deqjax.Reversible(), "options": {"first_step": 0.5}},
            "first_step.*integer; got 0.5",
        ),
        (
            {"solver": deqjax.Reversible(batch_ndim=1), "has_aux": True},
            "`batch_ndim=0`",
        ),
    ],
)
def test_what_has_no_steps_is_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        deqjax.fixed_point(noisy, P.z0, arguments(), **{"has_step": True, **kwargs})
