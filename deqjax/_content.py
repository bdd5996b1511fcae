"""What a program says, as a value that can be compared and hashed.

Two jaxprs with the same content compute the same, in every transformation, whatever
the Python objects were that they were traced from. Equations are compared one by one;
parameters by value where they have one. Functions among them are of two kinds:

- Derivative rules are traced again later, so that what counts is what they would see
  now: their code, and the content of their defaults, closures and globals.
- Callbacks run later, so that it matters which objects they write to: their code, and
  the identity of everything that can change.

What cannot be compared by these means equals nothing, which costs a compilation and
gives no wrong answer.
"""

import dis
import enum
import functools as ft
import sys
import types
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend as jex
import numpy as np
from jax.core import Tracer

# Functions of these packages are taken to have constant globals.
_LIBRARIES = {
    "equinox",
    "inspect",
    "jax",
    "jaxlib",
    "jaxtyping",
    "lineax",
    "numpy",
    "optimistix",
}

# Records of a trace that is over, or of what has been computed already.
_BYGONE = {"DynamicJaxprTrace", "Store", "EqualStore", "DebugInfo", "object"}

# Compared as they are.
_VALUES = (
    type,
    enum.Enum,
    np.dtype,
    np.ufunc,
    types.CodeType,
    jex.core.Primitive,
)

# More than this is a rule with half a program behind it.
_MOST_VISITS = 20_000


class Incomparable(Exception):
    """Something without a content that could be known."""


class Same:
    """An object that equals itself alone."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


class Content(NamedTuple):
    """The content of a jaxpr.

    Attributes:
        skeleton: everything but the numbers below.
        numbers: the scalars that stand in its own equations, not in inner jaxprs.
    """

    skeleton: Hashable
    numbers: tuple[Hashable, ...]


def content(jaxpr: Any) -> Content:
    """The content of an open jaxpr.

    Raises:
        Incomparable: if it cannot be compared with others.
    """
    numbers: list[Hashable] = []
    skeleton = _Reader().jaxpr(jaxpr, numbers)
    return Content(skeleton, tuple(numbers))


class _Reader:
    def __init__(self):
        # Objects on the way to this one, and how far from the root.
        self.above: dict[int, int] = {}
        self.visits = 0

    def jaxpr(self, jaxpr: Any, numbers: list[Hashable] | None = None) -> Hashable:
        names: dict[Any, int] = {}

        def bind(variables: Sequence[Any]) -> Hashable:
            for v in variables:
                names[v] = len(names)
            return tuple(_type(v.aval) for v in variables)

        def atom(v: Any) -> Hashable:
            if not isinstance(v, jex.core.Literal):
                return names[v]
            number = _number(v.val)
            if numbers is None:
                return (_type(v.aval), number)
            numbers.append(number)
            return _type(v.aval)

        inputs = bind(jaxpr.constvars), bind(jaxpr.invars)
        eqns = []
        for eqn in jaxpr.eqns:
            runs = "callback" in eqn.primitive.name
            params = tuple(
                (name, self.of(eqn.params[name], runs)) for name in sorted(eqn.params)
            )
            read = tuple(atom(v) for v in eqn.invars)
            context = self.of(eqn.ctx, False)
            effects = frozenset(map(_effect, eqn.effects))
            eqns.append(
                (eqn.primitive, read, bind(eqn.outvars), params, context, effects)
            )
        return inputs, tuple(eqns), tuple(atom(v) for v in jaxpr.outvars)

    def of(self, x: Any, runs: bool, mine: bool = True) -> Hashable:
        """The content of a parameter.

        Args:
            x: any object.
            runs: whether it belongs to a callback, for which identities count.
            mine: whether no user can have a reference to a container like x.
        """
        self.visits += 1
        if self.visits > _MOST_VISITS:
            raise Incomparable
        if x is None or isinstance(x, str | bytes | bool | int):
            return type(x), x
        if isinstance(x, float | complex | np.generic):
            return _number(x)
        if isinstance(x, Tracer):
            raise Incomparable
        if isinstance(x, jax.Array | types.ModuleType | types.BuiltinFunctionType):
            return Same(x)
        if isinstance(x, _VALUES):
            return x
        if _is_library(x) and _is_public(x):
            return Same(x)
        if id(x) in self.above:
            return "above", len(self.above) - self.above[id(x)]
        self.above[id(x)] = len(self.above)
        try:
            return self._compound(x, runs, mine)
        finally:
            del self.above[id(x)]

    def _compound(self, x: Any, runs: bool, mine: bool) -> Hashable:
        if isinstance(x, jex.core.ClosedJaxpr) and hasattr(x, "consts"):
            within = getattr(x, "jaxpr", x)
            consts = tuple(self.of(c, runs) for c in x.consts)
            return self.jaxpr(within), consts
        if isinstance(x, jex.core.Jaxpr):
            return self.jaxpr(x)
        if isinstance(x, tuple | frozenset):
            return type(x), self._items(x, runs, mine)
        if isinstance(x, list | dict | set | np.ndarray):
            if runs and not mine:
                return Same(x)
            inside = self._items(x, runs, mine)
            return (type(x), inside) if mine else (Same(x), inside)
        if isinstance(x, ft.partial):
            parts = (x.func, x.args, x.keywords)
            return ft.partial, tuple(self.of(part, runs, True) for part in parts)
        if isinstance(x, types.MethodType):
            owner = self.of(x.__self__, runs, mine)
            return types.MethodType, self.of(x.__func__, runs, mine), owner
        if isinstance(x, types.FunctionType):
            return self._function(x, runs)
        return self._instance(x, runs, mine)

    def _items(self, x: Any, runs: bool, mine: bool) -> Hashable:
        if isinstance(x, np.ndarray):
            if x.dtype.hasobject:
                return x.shape, self._items(x.ravel().tolist(), runs, mine)
            return x.shape, x.dtype, x.tobytes()
        if isinstance(x, set | frozenset):
            return frozenset(self.of(item, runs, mine) for item in x)
        if isinstance(x, dict):
            x = [part for item in x.items() for part in item]
        return tuple(self.of(item, runs, mine) for item in x)

    def _function(self, fn: types.FunctionType, runs: bool) -> Hashable:
        mine = _is_library(fn)
        of = lambda x: self.of(x, runs, mine)
        cells: list[Hashable] = []
        rebinds = _rebinds(fn.__code__)
        names = fn.__code__.co_freevars
        for name, cell in zip(names, fn.__closure__ or (), strict=True):
            if name in rebinds and not mine:
                cells.append(Same(cell))
            if mine and name == "cells" and fn.__name__ == "memoized":
                continue
            try:
                inside = cell.cell_contents
            except ValueError:
                inside = None
            cells.append(of(inside))
        parts: list[Hashable] = [fn.__code__, tuple(cells)]
        parts += [
            of(fn.__defaults__),
            of(fn.__kwdefaults__ and dict(fn.__kwdefaults__)),
        ]
        if not mine:
            parts.append(Same(fn.__globals__))
            if not runs:
                used = _global_names(fn.__code__) & fn.__globals__.keys()
                parts += [(name, of(fn.__globals__[name])) for name in sorted(used)]
        return tuple(parts)

    def _instance(self, x: Any, runs: bool, mine: bool) -> Hashable:
        kind = type(x)
        library = _is_library(kind) or kind is object
        if library and kind.__name__ in _BYGONE:
            return kind
        if library and _has_value(kind):
            return _hashed(x)
        frozen = isinstance(x, eqx.Module) or _is_frozen(kind)
        if runs and not (library or frozen):
            return Same(x)
        parts = _attributes(x).items()
        inside = tuple((name, self.of(part, runs, library)) for name, part in parts)
        return (kind, inside) if library or frozen else (kind, Same(x), inside)


def _has_value(kind: type) -> bool:
    """Whether instances are compared by value. Modules have arrays to compare."""
    default = kind.__hash__ is None or kind.__hash__ is object.__hash__
    return not (default or kind.__name__ == "WrappedFun" or _is_frozen(kind))


def _is_frozen(kind: type) -> bool:
    params = getattr(kind, "__dataclass_params__", None)
    return params is not None and params.frozen


def _attributes(x: Any) -> dict[str, Any]:
    names = [
        name
        for kind in type(x).__mro__
        for name in _as_tuple(kind.__dict__.get("__slots__", ()))
        if name not in ("__dict__", "__weakref__", "f_transformed")
    ]
    found = {name: getattr(x, name) for name in names if hasattr(x, name)}
    if not names and not hasattr(x, "__dict__"):
        raise Incomparable
    return {**found, **getattr(x, "__dict__", {})}


def _as_tuple(x: Any) -> tuple[Any, ...]:
    return (x,) if isinstance(x, str) else tuple(x)


def _hashed(x: Any) -> Hashable:
    try:
        hash(x)
    except TypeError as error:
        raise Incomparable from error
    return type(x), x


def _effect(effect: Any) -> Hashable:
    return type(effect), _hashed(effect)


def _number(x: Any) -> Hashable:
    """A scalar by its bits, so that 0.0 is not -0.0 and NaN is itself."""
    value = np.asarray(x)
    return type(x), value.dtype, value.tobytes()


def _type(aval: Any) -> Hashable:
    return aval, getattr(aval, "weak_type", False)


def _is_library(x: Any) -> bool:
    return (getattr(x, "__module__", None) or "").partition(".")[0] in _LIBRARIES


def _is_public(x: Any) -> bool:
    """Whether x stands in its module under its name, as `jax.nn.relu` does."""
    module = sys.modules.get(x.__module__)
    return getattr(module, getattr(x, "__name__", ""), None) is x


@ft.lru_cache(maxsize=4096)
def _rebinds(code: types.CodeType) -> frozenset[str]:
    """The variables of an outer function that a function may bind anew."""
    own = {
        i.argval
        for i in dis.get_instructions(code)
        if i.opname in ("STORE_DEREF", "DELETE_DEREF")
    }
    inner = (_rebinds(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return frozenset(own).union(*inner) & frozenset(code.co_freevars)


@ft.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> frozenset[str]:
    inner = (_global_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return frozenset(code.co_names).union(*inner)
