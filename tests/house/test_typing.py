"""For editors and type checkers: options have names, and the stub matches the extension."""

import ast
import inspect
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


def stub():
    """The functions in the stub: of the module, and by class for submodules."""
    tree = ast.parse((ROOT / "_native.pyi").read_text())
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {
        node.name: {f.name for f in node.body if isinstance(f, ast.FunctionDef)}
        for node in tree.body if isinstance(node, ast.ClassDef)
    }  # fmt: skip
    return own, classes


@pytest.mark.skipif(native.unavailable("cpu") is not None, reason="the extension is not built")
def test_the_stub_has_the_functions_of_the_extension():
    from fasthessian import _native

    own, classes = stub()
    cuda = {name for name in own if name.startswith("cuda_")}
    found = {name for name in vars(_native) if not name.startswith("_")}
    assert found - {"cuda"} - cuda == own - cuda | {"cpu"}
    assert {name for name in vars(_native.cpu) if not name.startswith("_")} == classes["_Cpu"]
    if hasattr(_native, "cuda"):
        names = {name for name in vars(_native.cuda) if not name.startswith("_")}
        assert names == classes["_Cuda"] and cuda <= found
