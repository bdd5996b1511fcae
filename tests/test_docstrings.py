"""What is public is documented, argument by argument."""

import importlib
import inspect
import pathlib
import re

import pytest

PACKAGES = [
    "",
    ".adjoints",
    ".diagnostics",
    ".linear",
    ".models",
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


API = pathlib.Path(__file__).parents[1] / "docs" / "api"


def places():
    """The names that the pages of the reference document."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in API.rglob("*.md"))
    return set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_public_has_a_place_in_the_reference(package):
    # `deqjax.Picard` documents `deqjax.solvers.Picard` too.
    missing = [
        name
        for name, value in public(package)
        if not {f"deqjax{package}.{name}", f"deqjax.{name}"} & places()
        and inspect.getmodule(inspect.unwrap(value)).__name__.startswith("deqjax")
    ]
    assert not missing


def test_the_reference_names_only_what_is_public():
    known = {
        f"deqjax{package}.{name}" for package in PACKAGES for name, _ in public(package)
    }
    assert places() <= known


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_public_says_what_it_is_and_what_it_raises(package):
    silent = []
    for name, value in public(package):
        text = inspect.getdoc(value) or ""
        first = text.split("\n\n")[0]
        if not first.rstrip().endswith((".", ":")):
            silent.append(f"{name}: no first sentence")
        if refuses(value) and not re.search(r"^Raises:$", text, re.MULTILINE):
            silent.append(f"{name}: no Raises")
    assert not silent


def refuses(value):
    """Whether a function, or making an object of a class, raises by itself."""
    if inspect.isclass(value):
        made = [vars(value).get(m) for m in ("__init__", "__check_init__")]
    else:
        made = [value]
    pattern = r"^\s+(?:raise [A-Z]|_?check_\w+\()"
    return any(re.search(pattern, source(m), re.MULTILINE) for m in made)


def source(function):
    """The text of a function; "" of those that equinox writes, and of None."""
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return ""


def test_refusals_are_seen():
    def refusing(x):
        raise ValueError(x)

    def quiet(x):
        return x

    assert refuses(refusing)
    assert not refuses(quiet)
