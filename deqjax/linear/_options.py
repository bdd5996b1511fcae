"""Checks of what a linear solve is given beside its operator, before anything runs."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree


def shapes(structure: PyTree) -> PyTree:
    """The shapes of the leaves."""
    return jtu.tree_map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, bool), structure)


def check_preconditioner(options: dict[str, Any], structure: PyTree) -> None:
    """Raise unless `options["preconditioner"]`, if given, maps vectors to vectors."""
    given = options.get("preconditioner")
    if given is None:
        return
    if not isinstance(given, lx.AbstractLinearOperator):
        raise TypeError(
            '`options["preconditioner"]` must be a linear operator '
            f"(lineax.AbstractLinearOperator); got {type(given).__name__}. Use "
            "`lineax.FunctionLinearOperator` for a function."
        )
    for got in (given.in_structure(), given.out_structure()):
        if shapes(got) != shapes(structure):
            raise ValueError(
                '`options["preconditioner"]` must map vectors of the system to such '
                f"vectors, of {structure}; got one from {given.in_structure()} to "
                f"{given.out_structure()}."
            )


def check_start(options: dict[str, Any], structure: PyTree) -> None:
    """Raise unless `options["y0"]`, if given, is a vector of the system."""
    if options.get("y0") is None:
        return
    start = jax.eval_shape(lambda: as_arrays(options["y0"]))
    real = all(jnp.issubdtype(x.dtype, jnp.floating) for x in jtu.tree_leaves(start))
    if shapes(start) != shapes(structure) or not real:
        raise ValueError(
            '`options["y0"]`, the start, must be real and have the structure and the '
            f"shapes of the solution, {structure}; got {start}."
        )


def as_arrays(x: PyTree) -> PyTree:
    """The leaves as arrays."""

    def leaf(a: Any) -> Array:
        return jnp.asarray(a)

    return jtu.tree_map(leaf, x)
