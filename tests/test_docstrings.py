"""What is public is documented, argument by argument."""

import importlib
import inspect
import re

import pytest

PACKAGES = [
    "",
    ".adjoints",
    ".diagnostics",
    ".linear",
    ".nn",
    ".regularise",
    ".solvers",
]


def public(package):
    module = importlib.import_module(f"deqjax{package}")
    for name, value in sorted(vars(module).items()):
        if not name.startswith("_") and (
            inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value))
        ):
            yield name, value


def documented(text):
    """The names that a docstring's section of arguments, or of attributes, explains."""
    pattern = r"^(?:Args|Attributes):$(.*?)(?=^\w|\Z)"
    sections = re.findall(pattern, text or "", re.MULTILINE | re.DOTALL)
    names = re.findall(r"^    \*{0,2}(\w+):", "".join(sections), re.MULTILINE)
    return set(names)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_argument_of_what_is_public_is_documented(package):
    missing = [
        f"{name}({argument})"
        for name, value in public(package)
        for argument in inspect.signature(value).parameters
        # `**retired` holds the names of former versions, which are refused.
        if argument not in {"retired", *documented(inspect.getdoc(value))}
    ]
    assert not missing


def test_the_check_sees_what_is_missing():
    text = """One line.

    Args:
        a: one.
        **rest: others.

    Returns:
        b: nothing.
    """
    assert documented(inspect.cleandoc(text)) == {"a", "rest"}
