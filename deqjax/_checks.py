"""Checks of arguments that several modules ask for."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

# Counts are int32 in the compiled program.
_LARGEST = 2**31 - 1


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's, its other arrays as JAX's; all else as it is.

    Those that configuration files and NumPy's functions give are numbers, too.
    """
    if isinstance(value, np.generic | np.ndarray):
        return value.item() if value.ndim == 0 else jnp.asarray(value)
    return value


def real(value: Any) -> Any:
    """As `plain`, and integers as floats: the program does not depend on the value."""
    value = plain(value)
    return float(value) if type(value) is int else value


def whole(value: Any) -> Any:
    """A whole number that is known while tracing as Python's; all else as it is."""
    known = isinstance(value, Array) and not isinstance(value, Tracer)
    return plain(np.asarray(value) if known and value.ndim == 0 else value)


def check_count(name: str, value: Any, least: int) -> int:
    """`value` as a Python integer; raises unless it is one of at least `least`."""
    count = whole(value)
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise ValueError(f"`{name}` must be an integer ≥ {least}; got {value!r}.")
    if count > _LARGEST:
        raise ValueError(
            f"`{name}` must be at most {_LARGEST}, the largest that int32 holds; got "
            f"{value!r}."
        )
    return count


def check_flag(name: str, value: Any) -> bool:
    """`value` as a Python bool; raises unless it is True or False."""
    flag = whole(value)
    if not isinstance(flag, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}.")
    return flag


def check_tolerance(name: str, value: Any, batch: tuple[int, ...]) -> None:
    """Raise unless a tolerance is one number, or one per problem."""
    shape = np.shape(value)
    try:
        fits = np.broadcast_shapes(shape, batch) == batch
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"`{name}` must be one number or one per problem; the problems have the "
            f"shape {batch} (see `batch_ndim`), `{name}` has {shape}."
        )


def check_beta(beta: Any, *, below: float) -> None:
    """Raise unless `beta`, the weight on f, lies in (0, below)."""
    if isinstance(beta, Array):
        return
    if isinstance(beta, bool) or not (
        isinstance(beta, int | float) and 0 < beta < below
    ):
        raise ValueError(
            f"`beta`, the weight on f, must satisfy 0 < beta < {below:g}; got {beta!r}."
        )


def canonical_weights(name: str, beta: PyTree) -> PyTree:
    """Weights on f as Python numbers and floating-point arrays.

    Raises:
        ValueError: if one is known not to lie in (0, 1).
    """

    def leaf(b: Any) -> Any:
        b = plain(b)
        try:
            known = np.asarray(b) if not isinstance(b, Tracer) else None
            real = jnp.issubdtype(jnp.result_type(b), jnp.floating)
        except TypeError:
            known, real = None, False
        inside = known is None or bool(np.all((known > 0) & (known < 1)))
        if not (real and inside):
            raise ValueError(
                f"{name}, the weight on f, must be a number in (0, 1), a floating-"
                f"point array of such numbers, or a pytree of them; got {b!r}."
            )
        # Numbers that are known while tracing need no place among a program's inputs.
        return jnp.asarray(b) if isinstance(b, Array | np.ndarray) else float(b)

    return jtu.tree_map(leaf, beta)


def fit_weights(name: str, beta: PyTree, z: PyTree) -> PyTree:
    """The weight on f of every leaf of z.

    Raises:
        ValueError: if the structure or a shape does not fit z.
    """
    structure = jtu.tree_structure(z)
    if jtu.all_leaves([beta]):
        beta = jtu.tree_map(lambda _: beta, z)
    elif jtu.tree_structure(beta) != structure:
        raise ValueError(
            f"{name} must be a number, an array, or a pytree with the structure of the "
            f"state, {structure}; got {jtu.tree_structure(beta)}. (One of several "
            'weights is chosen outside of the solver: `options={"beta": value}`, see '
            "`deqjax.nn.draw_options`.)"
        )
    for b, (path, x) in zip(
        jtu.tree_leaves(beta), jtu.tree_leaves_with_path(z), strict=True
    ):
        shape = jnp.shape(b)
        matches = zip(shape[::-1], x.shape[::-1], strict=False)
        if len(shape) > x.ndim or any(n not in (1, m) for n, m in matches):
            raise ValueError(
                f"{name} must broadcast against every leaf of the state; it has shape "
                f"{shape}, the leaf `{jtu.keystr(path) or 'z0'}` has shape {x.shape}. "
                "(A weight per example of a batch has shape (batch, 1, …).)"
            )
    return beta


def refuse_retired(given: Mapping[str, Any], successors: Mapping[str, str]) -> None:
    """Raise for arguments that a constructor does not have, or does not have any more.

    Args:
        given: the arguments.
        successors: what to use instead, by the name of a retired argument.
    """
    for name in given:
        if name in successors:
            raise TypeError(f"`{name}` has been retired: {successors[name]}.")
        raise TypeError(f"unexpected keyword argument `{name}`")
