"""Lets the reference show an `equinox.Module`'s arguments.

mkdocstrings reads the source without running it, and so cannot know that a subclass of
`equinox.Module` is a dataclass, whose fields are its arguments. This says so.
"""

import re

import griffe

LIBRARIES = ("equinox.", "optimistix.", "lineax.")


def _is_module(cls: griffe.Class) -> bool:
    """Whether a base, or a base's base, comes from a library of `eqx.Module`s."""
    for base in cls.bases:
        path = base if isinstance(base, str) else base.canonical_path
        if path.startswith(LIBRARIES):
            return True
    return any(_is_module(b) for b in cls.resolved_bases if isinstance(b, griffe.Class))


def _classes(obj: griffe.Module | griffe.Class):
    for member in obj.members.values():
        if isinstance(member, griffe.Class):
            yield member
        if isinstance(member, griffe.Module | griffe.Class):
            yield from _classes(member)


def _read_fields(cls: griffe.Class) -> None:
    """Reads `eqx.field(...)` as the `dataclasses.field(...)` that it extends."""
    for member in cls.members.values():
        value = getattr(member, "value", None)
        if isinstance(value, griffe.ExprCall) and (
            value.canonical_path == "equinox.field"
        ):
            value.function = griffe.ExprName("dataclasses.field")


class Modules(griffe.Extension):
    """Treats every final `equinox.Module` as the dataclass that it is."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        """Runs once a package is read, before griffe's own support of dataclasses."""
        dataclass = griffe.ExprName("dataclasses.dataclass")
        for cls in _classes(pkg):
            # An abstract class has `eqx.AbstractVar`s, which are no arguments.
            if not cls.name.startswith("Abstract") and _is_module(cls):
                cls.decorators.append(
                    griffe.Decorator(dataclass, lineno=None, endlineno=None)
                )
                _read_fields(cls)

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Reads "Example:" as "Examples:", which griffe renders as code."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"(?m)^(\s*)Example:$", r"\1Examples:", obj.docstring.value
            )
