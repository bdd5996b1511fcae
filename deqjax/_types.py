"""Names for the types that the library speaks of."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

from jaxtyping import Array, Bool, Float, Int, PyTree

Y = TypeVar("Y")
"""The iterate: a pytree of real floating-point arrays."""

Aux = TypeVar("Aux")
"""Whatever the map returns beside its value: a pytree of arrays."""

State = TypeVar("State")
"""The state of a solver."""

Tolerance: TypeAlias = float | int | Array | Literal["auto"] | None
Args: TypeAlias = PyTree[Any]
Options: TypeAlias = dict[str, Any]
Map: TypeAlias = Callable[[Any, Any], tuple[Any, Any]]
"""`fn(z, args) -> (f, aux)`, the form in which solvers receive the user's map."""

Reals: TypeAlias = Float[Array, "*batch"]
Flags: TypeAlias = Bool[Array, "*batch"]
Counts: TypeAlias = Int[Array, "*batch"]
