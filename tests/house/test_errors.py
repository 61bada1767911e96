"""The package raises its own errors. Each is also a built-in exception."""

import ast
import builtins
import inspect
from pathlib import Path

import pytest

import fasthessian
from fasthessian import errors
from fasthessian.errors import Refusal

ROOT = Path(fasthessian.__file__).parent
BUILTIN = {
    name for name, thing in vars(builtins).items()
    if isinstance(thing, type) and issubclass(thing, BaseException)
}  # fmt: skip
OWN = [
    thing for thing in vars(errors).values()
    if isinstance(thing, type) and issubclass(thing, Refusal) and thing is not Refusal
]  # fmt: skip
# A module must raise AttributeError for a missing name. The classes of OSError are specific.
ACCEPTED = {"AttributeError"} | {
    name for name in BUILTIN if issubclass(vars(builtins)[name], OSError)
}


def raised(tree):
    """The line and name of each built-in exception that a module raises with a message."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = getattr(node.exc.func, "id", getattr(node.exc.func, "attr", ""))
            if name in BUILTIN - ACCEPTED:
                yield node.lineno, name


@pytest.mark.parametrize(
    "path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_module_raises_a_built_in_exception(path):
    assert list(raised(ast.parse(path.read_text()))) == []


def test_built_in_exceptions_are_found():
    source = "raise ValueError('x') from None\nraise builtins.TypeError('z')\n"
    source += "raise InputError('y')\nraise OSError('a path')\nraise\nraise KeyboardInterrupt"
    assert list(raised(ast.parse(source))) == [(1, "ValueError"), (2, "TypeError")]


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_an_error_is_caught_as_the_built_in_one(kind):
    first, second = kind.__bases__
    assert first is Refusal and second.__name__ in BUILTIN and inspect.getdoc(kind)
    with pytest.raises(second, match="what was given") as caught:
        raise kind("what was given")
    assert isinstance(caught.value, Refusal) and type(caught.value) is kind


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyError, ZeroDivisionError])
def test_an_exception_of_the_callers_code_keeps_its_class(kind):
    import torch

    def closure():
        raise kind("of the caller")

    w = torch.ones(2, requires_grad=True)
    with pytest.raises(kind, match="of the caller") as caught:
        fasthessian.Hessian.from_closure(closure, [w]) @ torch.ones(2)
    assert type(caught.value) is kind
