"""Checks of arguments that several modules ask for."""

from typing import Any

from jaxtyping import Array


def check_count(name: str, value: Any, least: int) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer ≥ {least}; got {value!r}.")


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
