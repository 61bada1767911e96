"""For editors and type checkers: options have names, and the stub matches the extension."""

import ast
import inspect
import re
import typing
from pathlib import Path

import pytest

import fasthessian
import fasthessian.pyhessian
from fasthessian.kernels import native

ROOT = Path(fasthessian.__file__).parent


def functions():
    """(name, function) for the public functions and the public methods of public classes."""
    for module in (fasthessian, fasthessian.pyhessian):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                yield name, thing
            elif isinstance(thing, type) and not issubclass(thing, BaseException):
                for method, value in inspect.getmembers(thing, inspect.isfunction):
                    ours = value.__module__.startswith("fasthessian")
                    if ours and (not method.startswith("_") or method == "__init__"):
                        yield f"{name}.{method}", value


FUNCTIONS = dict(functions())


def untyped_options(function):
    """The parameters ``**options: Any`` of a function."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and parameter.annotation in (
            "Any", typing.Any, inspect.Parameter.empty,
        ):  # fmt: skip
            yield parameter.name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_public_function_takes_options_without_names(name):
    assert list(untyped_options(FUNCTIONS[name])) == []


def test_options_without_names_are_found():
    def loose(a, **options: typing.Any): ...
    def named(a, *, tol: float = 1e-3): ...

    assert list(untyped_options(loose)) == ["options"] and list(untyped_options(named)) == []


def test_the_package_is_marked_as_typed():
    assert (ROOT / "py.typed").exists()


def counts(functions):
    """Numbers of arguments by name, ``self`` left out."""
    found = {}
    for node in functions:
        if isinstance(node, ast.FunctionDef):
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
            found[node.name] = len([name for name in names if name != "self"])
    return found


def built(module):
    """The same of a built module, from the signatures that pybind11 writes."""
    names = [name for name in vars(module) if not name.startswith("_")]
    signatures = {name: getattr(module, name).__doc__.splitlines()[0] for name in names}
    return {name: len(re.findall(r"\barg\d+: ", text)) for name, text in signatures.items()}


def stub():
    """The functions in the stub with their numbers of arguments: of the module, and by class."""
    tree = ast.parse((ROOT / "_native.pyi").read_text())
    classes = {node.name: counts(node.body) for node in tree.body if isinstance(node, ast.ClassDef)}
    return counts(tree.body), classes


@pytest.mark.skipif(native.unavailable("cpu") is not None, reason="the extension is not built")
def test_the_stub_has_the_functions_of_the_extension():
    from fasthessian import _native

    own, classes = stub()
    cuda = {name for name in own if name.startswith("cuda_")}
    found = {name for name in vars(_native) if not name.startswith("_")}
    assert found - {"cuda"} - cuda == own.keys() - cuda | {"cpu"}
    assert built(_native.cpu) == classes["_Cpu"]
    if hasattr(_native, "cuda"):
        assert built(_native.cuda) == classes["_Cuda"] and cuda <= found
