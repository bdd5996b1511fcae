"""States that are pytree classes of users."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from tests.helpers import SOLVERS


@jax.tree_util.register_pytree_node_class
class Picky:
    """Checks what it is built of, and cannot be compared."""

    __hash__ = None

    def __init__(self, x):
        assert x.shape == (2,)
        assert x.dtype == jnp.float32
        self.x = x

    def __eq__(self, other):
        raise RuntimeError("There is no ==.")

    def tree_flatten(self):
        return (self.x,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


X = jnp.array([0.1, 0.2])
CASES = {
    "implicit": ("anderson", lambda y: deqjax.ImplicitAdjoint(initial=y)),
    "newton": ("newton", lambda y: deqjax.JFBAdjoint()),
    "shine": ("broyden", lambda y: deqjax.ShineAdjoint()),
    "phantom": ("picard", lambda y: deqjax.PhantomAdjoint(2)),
    "unrolled": ("picard", lambda y: deqjax.UnrolledAdjoint()),
    "truncated": ("picard", lambda y: deqjax.UnrolledAdjoint(last=2)),
    "reversible": ("reversible", lambda y: deqjax.ReversibleAdjoint()),
}


def run(x, name, state, throw=False):
    solver, adjoint = CASES[name]

    def fn(z, args):
        (z,), (x,) = jax.tree.leaves(z), jax.tree.leaves(args)
        return state(0.5 * jnp.tanh(z) + x), state(z)

    options = {"companion": state(0 * x)} if name == "reversible" else None
    return deqjax.fixed_point(
        fn,
        state(0 * x),
        state(x),
        solver=SOLVERS[solver](1e-2, 1e-2),
        adjoint=adjoint(state(0 * x)),
        has_aux=True,
        options=options,
        throw=throw,
    )


@pytest.mark.parametrize("name", CASES)
def test_classes_that_check_their_leaves_are_solved_for(name):
    def loss(x, state):
        sol = run(x, name, state)
        seen = sol.value, sol.aux
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(seen)), seen

    gradient, (value, aux) = jax.grad(loss, has_aux=True)(X, Picky)
    assert isinstance(value, Picky)
    assert isinstance(aux, Picky)
    want, ((leaf,), _) = jax.grad(loss, has_aux=True)(X, lambda x: [x])
    np.testing.assert_allclose(gradient, want, rtol=1e-6)
    np.testing.assert_allclose(value.x, leaf, rtol=1e-6)


def test_companions_and_errors_of_such_states():
    sol = run(X, "reversible", Picky, throw=True)
    assert isinstance(sol.state.companion, Picky)
    with pytest.raises(ValueError, match="tree structure of `z0`"):
        deqjax.fixed_point(lambda z, _: z.x, Picky(X))
    with pytest.raises(ValueError, match="`fn` must return arrays"):
        deqjax.fixed_point(lambda z, _: [1.0], [X])
