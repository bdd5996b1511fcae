"""Compiled programs, found by the content of the map that they solve for.

A map is traced at every call, and the program for what it traced to is looked up. So
the answer is that of the map as it is now, and a call costs a compilation only where
another program is needed: arrays that the map closes over are inputs of the program,
and so are scalars that turn out to differ from one call to the next.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._content import Incomparable, content


class Programs:
    """The programs used last.

    Args:
        build: `build(jaxpr, statics)`, the function to compile.
        most: how many programs to keep: each takes some MiB.
    """

    def __init__(self, build: Callable[[Any, Any], Callable], most: int = 64):
        self.build = build
        self.most = most
        self._programs: OrderedDict[Hashable, Callable] = OrderedDict()
        self._scalars: OrderedDict[Hashable, tuple[Any, frozenset[int]]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._programs)

    def clear(self) -> None:
        """Forget all programs."""
        with self._lock:
            self._programs.clear()
            self._scalars.clear()

    def find(self, closed: Any, statics: PyTree) -> tuple[Callable, list[Array]]:
        """The program for a closed jaxpr, and the constants that it is to be given.

        Args:
            closed: what the map has been traced to.
            statics: whatever else distinguishes programs, without arrays.
        """
        consts = [_as_array(c) for c in closed.consts]
        # Types count: 1, 1.0 and True are equal.
        leaves, structure = jtu.tree_flatten(statics)
        named = (structure, tuple((type(leaf), leaf) for leaf in leaves))
        try:
            skeleton, numbers = content(closed.jaxpr)
            hash(skeleton)
        except Incomparable:
            return self._compiled(closed.jaxpr, statics), consts
        with self._lock:
            differing = self._differing((skeleton, named), numbers)
            fixed = tuple(n for i, n in enumerate(numbers) if i not in differing)
            key = (skeleton, named, differing, fixed)
            jaxpr, values = with_inputs_for(closed.jaxpr, differing)
            program = _recent(self._programs, key)
            if program is None:
                program = self._programs[key] = self._compiled(jaxpr, statics)
                _trim(self._programs, self.most)
        return program, values + consts

    def _differing(self, key: Hashable, numbers: tuple) -> frozenset[int]:
        """Which scalars have had several values so far."""
        old, differing = _recent(self._scalars, key) or (numbers, ())
        pairs = enumerate(zip(numbers, old, strict=True))
        differing = frozenset(differing) | {i for i, (a, b) in pairs if a != b}
        self._scalars[key] = (numbers, differing)
        _trim(self._scalars, self.most)
        return differing

    def _compiled(self, jaxpr: Any, statics: PyTree) -> Callable:
        # `equinox.filter_jit` would keep what it has compiled for ever.
        solve, others = self.build(jaxpr, statics), []

        @jax.jit
        def run(*args: PyTree) -> PyTree:
            arrays, other = eqx.partition(solve(*args), eqx.is_array)
            others[:] = [other]
            return arrays

        def call(*args: PyTree) -> PyTree:
            try:
                return eqx.combine(run(*args), others[0])
            except jax.errors.JaxRuntimeError as error:
                # The message of an `equinox.error_if` in the map, without JAX's report.
                _, found, message = str(error).partition("_EquinoxRuntimeError: ")
                if not found:
                    raise
                message, _, _ = message.partition("\n\n\n---")
            raise eqx.EquinoxRuntimeError(message)

        return call


def _recent(entries: OrderedDict, key: Hashable) -> Any:
    if key not in entries:
        return None
    entries.move_to_end(key)
    return entries[key]


def _trim(entries: OrderedDict, most: int) -> None:
    while len(entries) > most:
        entries.popitem(last=False)


def with_inputs_for(jaxpr: Any, which: frozenset[int]) -> tuple[Any, list[Array]]:
    """The jaxpr with some of its scalars as further constants, first, and their values.

    They are counted as `content` counts them.
    """
    if not which:
        return jaxpr, []
    count, values, places = 0, [], {}
    for at, atoms in enumerate([*(e.invars for e in jaxpr.eqns), jaxpr.outvars]):
        for place, v in enumerate(atoms):
            if isinstance(v, jex.core.Literal):
                if count in which:
                    aval: Any = v.aval
                    places[at, place] = len(values)
                    values.append(jnp.asarray(v.val, aval.dtype))
                count += 1
    # Variables are made by tracing alone.
    new = jax.make_jaxpr(lambda *xs: xs)(*values).jaxpr.invars

    def replaced(at: int, atoms: Any) -> list[Any]:
        place = lambda i: places.get((at, i))
        return [v if place(i) is None else new[place(i)] for i, v in enumerate(atoms)]

    eqns = [e.replace(invars=replaced(i, e.invars)) for i, e in enumerate(jaxpr.eqns)]
    jaxpr = jaxpr.replace(
        eqns=eqns,
        constvars=[*new, *jaxpr.constvars],
        outvars=replaced(len(eqns), jaxpr.outvars),
    )
    return jaxpr, values


def _as_array(x: Any) -> Array:
    # A copy of what may be changed in place while the program runs.
    return x if isinstance(x, jax.Array) else jnp.array(x)
