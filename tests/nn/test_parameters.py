"""Which arrays of a model are parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp

import deqjax
from deqjax.nn import DEQ, LearnedStart, count_parameters, trainable


def test_settings_of_solvers_and_adjoints_are_no_parameters():
    cell = eqx.Partial(lambda w, z, x: jnp.tanh(w * z + x), jnp.full(3, 0.3))
    adjoint = deqjax.ImplicitAdjoint(probe=deqjax.BackwardStats())
    solver = deqjax.Picard(jnp.array(1e-5), jnp.array(1e-6))
    deq = DEQ(cell, start=LearnedStart((3,)), solver=solver, adjoint=adjoint)
    assert len(jax.tree.leaves(eqx.filter(deq, eqx.is_inexact_array))) > 8
    assert count_parameters(deq) == count_parameters([deq]) == 6
    assert count_parameters(eqx.filter_eval_shape(lambda: deq)) == 6

    @eqx.filter_grad
    def gradient(moving, fixed):
        return jnp.sum(eqx.combine(moving, fixed)(jnp.ones(3)))

    slope = gradient(*eqx.partition(deq, trainable(deq)))
    assert [leaf.shape for leaf in jax.tree.leaves(slope)] == [(3,), (3,)]
