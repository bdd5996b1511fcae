"""Numbers that are inputs of a program, so that another value is not another program.

Tolerances and weights are floats to those who write them, who may compute with them and
compare them. The compiled program is given them as inputs. Integers give a program its
shape (a history, a number of steps) and stay outside.
"""

from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

# Fields of solvers and adjoints that hold such numbers, alone or in a pytree.
_TRACED = {"rtol", "atol", "beta", "ridge", "fallback", "drift_tol"}

# Solvers of other packages may look at the value of a number that is theirs.
_PACKAGES = {"deqjax", "lineax", "optimistix"}


def inputs_and_rest(tree: PyTree) -> tuple[PyTree, PyTree]:
    """A tree with solvers and adjoints, as `equinox.partition` does it.

    Inputs are arrays and traced numbers. `jax.jit` makes arrays of a weak type of the
    latter: like numbers of Python they are rounded to the dtype of what they meet, and
    change none. Three kinds of number name a program, and are not among the inputs:

    - a weight `beta` of 1: the undamped iteration does not read z;
    - those of a solver of lineax with `rtol=0, atol=0`, which tests nothing;
    - those of a solver from another package.
    """

    def is_input(path: tuple[Any, ...], x: Any) -> PyTree:
        if _keeps_numbers(x):
            return jtu.tree_map(eqx.is_array, x)
        if not isinstance(x, float):
            return eqx.is_array(x)
        names = _TRACED.intersection(getattr(key, "name", None) for key in path)
        return bool(names) and not (names == {"beta"} and x == 1)

    return eqx.partition(
        tree, jtu.tree_map_with_path(is_input, tree, is_leaf=_keeps_numbers)
    )


def _keeps_numbers(x: Any) -> bool:
    """Whether x is a module whose numbers may decide what the program is."""
    if not isinstance(x, eqx.Module):
        return False
    package = type(x).__module__.partition(".")[0]
    tolerances = getattr(x, "rtol", None), getattr(x, "atol", None)
    untested = all(isinstance(t, int | float) and t == 0 for t in tolerances)
    return package not in _PACKAGES or (package == "lineax" and untested)
