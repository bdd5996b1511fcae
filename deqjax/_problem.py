"""A solve as adjoints see it: what is to be solved, and what came of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._convolutions import rewrite
from ._upstream import Static, wrap_jaxpr


class Problem(NamedTuple):
    """What optimistix passes to `AbstractAdjoint.apply`, under names.

    Attributes:
        fn: the map, `fn(z, args) -> (f, aux)`.
        solver: of deqjax or optimistix.
        y0: the start.
        args: of the map.
        options: of the solve.
        max_steps: most steps, or None.
        f_struct: shapes and dtypes of f.
        aux_struct: those of aux.
        tags: lineax tags for the Jacobian of the problem.
        rewrite_fn: `rewrite_fn(z, None, inputs)`, whose root the solution is, for
            problems of least squares and minimisation.
    """

    fn: Any
    solver: Any
    y0: Any
    args: Any
    options: Any
    max_steps: Any
    f_struct: Any
    aux_struct: Any
    tags: Any
    rewrite_fn: Any = None

    @staticmethod
    def of(inputs: tuple, rewrite_fn: Callable | None = None) -> "Problem":
        """The problem that optimistix hands to an adjoint."""
        is_static = lambda x: isinstance(x, Static)
        bare = lambda tree: jtu.tree_map(
            lambda x: x.value if is_static(x) else x, tree, is_leaf=is_static
        )
        given = Problem(*inputs)._replace(rewrite_fn=rewrite_fn)
        options = {} if given.options is None else dict(given.options)
        prepare = getattr(given.solver, "prepared", None)
        return given._replace(
            # A map that `deqjax.fixed_point` has not seen; its jaxpr is a leaf.
            fn=rewrite(given.fn),
            solver=given.solver if prepare is None else prepare(given.y0, options),
            options=options,
            f_struct=bare(given.f_struct),
            aux_struct=bare(given.aux_struct),
        )

    @property
    def batch_ndim(self) -> int:
        """The number of leading axes that index independent problems."""
        return getattr(self.solver, "batch_ndim", 0)


class Solved(NamedTuple):
    """What came of a solve.

    Attributes:
        value: the answer.
        companion: the second state of `deqjax.Reversible` at the answer, else None.
        aux: what the map returned beside its value there.
        num_steps: the largest number of steps of any problem.
        result: an `optimistix.RESULTS`.
        state: the arrays of the solver's state.
        others: the rest of it.
        stats: the statistics.
        tape: what going back needs, if it was asked for.
    """

    value: PyTree
    companion: PyTree
    aux: PyTree
    num_steps: Array
    result: Any
    state: PyTree
    others: Static
    stats: dict[str, Any]
    tape: PyTree = None

    @staticmethod
    def of(
        value: PyTree,
        aux: PyTree,
        num_steps: Array,
        result: Any,
        state: PyTree,
        stats: dict[str, Any],
        *,
        companion: PyTree = None,
        tape: PyTree = None,
    ) -> "Solved":
        """As given, the state being any pytree."""
        arrays, others = eqx.partition(state, eqx.is_array)
        others = Static(wrap_jaxpr(others))
        found = aux, num_steps, result, arrays, others, stats
        return Solved(value, companion, *found, tape)

    def outputs(self) -> tuple[PyTree, tuple]:
        """What optimistix expects of `AbstractAdjoint.apply`."""
        rest = self.num_steps, self.result, self.state, self.others, self.aux
        return self.value, (*rest, self.stats)
