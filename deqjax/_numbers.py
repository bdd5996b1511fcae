"""Numbers that are inputs of a program, so that another value is not another program.

Tolerances and weights are floats to those who write them, who may compute with them and
compare them. The compiled program is given them as inputs. Integers give a program its
shape (a history, a number of steps) and stay outside.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

# Fields of solvers and adjoints that hold such numbers, alone or in a pytree.
_TRACED = {"rtol", "atol", "beta", "ridge", "fallback", "drift_tol"}

_never = lambda x: False
_always = lambda x: True
_unless_zero = lambda x: x != 0
_unless_one = lambda x: x != 1


def inputs_and_rest(tree: PyTree) -> tuple[PyTree, PyTree]:
    """A tree with solvers and adjoints, as `equinox.partition` does it.

    Inputs are arrays and traced numbers. `jax.jit` makes arrays of a weak type of the
    latter: like numbers of Python they are rounded to the dtype of what they meet, and
    change none. Three kinds of number name a program, and are not among the inputs:

    - a weight `beta` of 1: the undamped iteration does not read z;
    - a tolerance of 0 of a lineax solver: with two of them it tests nothing;
    - those of a solver from another package, which may look at their value.
    """
    leaves, structure = jtu.tree_flatten(tree)
    chosen = [
        eqx.is_array(x) or (isinstance(x, float) and is_input(x))
        for x, is_input in zip(leaves, _rules(structure), strict=True)
    ]
    pairs = list(zip(leaves, chosen, strict=True))
    inputs = structure.unflatten([x if inside else None for x, inside in pairs])
    return inputs, structure.unflatten([None if inside else x for x, inside in pairs])


@ft.lru_cache(maxsize=256)
def _rules(structure: Any) -> list[Callable[[float], bool]]:
    """For every leaf of a tree, which values of a number there are inputs."""

    def rule(path: tuple[Any, ...], x: Any) -> PyTree:
        if _package(x) == "lineax":
            return jtu.tree_map_with_path(rule_of_lineax, x)
        if isinstance(x, eqx.Module):
            return jtu.tree_map(lambda _: _never, x)
        names = _names(path)
        return (_unless_one if "beta" in names else _always) if names else _never

    def rule_of_lineax(path: tuple[Any, ...], _: Any) -> Callable[[float], bool]:
        return _unless_zero if _names(path) else _never

    tree = structure.unflatten(range(structure.num_leaves))
    apart = lambda x: _package(x) not in (None, "deqjax", "optimistix")
    return jtu.tree_leaves(jtu.tree_map_with_path(rule, tree, is_leaf=apart))


def _names(path: tuple[Any, ...]) -> set[str]:
    return _TRACED.intersection(getattr(key, "name", "") for key in path)


def _package(x: Any) -> str | None:
    """The package that a module of equinox is from; None for all else."""
    is_module = isinstance(x, eqx.Module)
    return type(x).__module__.partition(".")[0] if is_module else None
