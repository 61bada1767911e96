"""The public API as text: every public name with its signature, methods and fields included.

python tests/support/public_api.py > tests/house/public_api.txt    after a change that is meant
"""

import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator

import fasthessian
import fasthessian.pyhessian
from fasthessian.operators.blocks import Block
from fasthessian.operators.checks import Check
from fasthessian.study.resnet import resnet


def lines() -> Iterator[str]:
    """One line per name; overloads one line each."""
    for name in sorted(fasthessian.__all__):
        if name != "__version__":
            yield from described(f"fasthessian.{name}", getattr(fasthessian, name))
    for name in sorted(fasthessian.pyhessian.__all__):
        if name != "hessian":
            yield from described(
                f"fasthessian.pyhessian.{name}", getattr(fasthessian.pyhessian, name)
            )
    yield from described("fasthessian.pyhessian.install", fasthessian.pyhessian.install)
    yield from described("fasthessian.study.resnet.resnet", resnet)
    for returned in (Block, Check):  # by methods of the operators
        yield from described(f"{returned.__module__}.{returned.__name__}", returned)


def described(name: str, thing: object) -> Iterator[str]:
    """The lines of a class or a function; none for a module."""
    if not isinstance(thing, type):
        if inspect.isfunction(thing):
            overloads = typing.get_overloads(thing) if sys.version_info >= (3, 11) else []
            yield from (f"{name}{signature(each)}" for each in overloads or [thing])
        return
    known = {*fasthessian.__all__, "UserWarning", "ValueError", "TypeError"}
    bases = ", ".join(base.__name__ for base in thing.__mro__[1:] if base.__name__ in known)
    yield f"class {name}({bases})"
    if dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            yield f"{name}.{field.name}: {field.type}"
    else:
        if thing.__init__ is not object.__init__ and not issubclass(thing, BaseException):
            yield f"{name}{signature(thing.__init__)}"
        for attribute, annotation in sorted(annotated(thing).items()):
            yield f"{name}.{attribute}: {annotation}"
    for attribute in sorted(vars_of(thing)):
        value = inspect.getattr_static(thing, attribute)
        value = getattr(value, "__func__", value)
        if isinstance(value, property):
            yield f"{name}.{attribute}: property"
        elif inspect.isfunction(value):
            yield f"{name}.{attribute}{signature(value)}"


def annotated(thing: type) -> dict[str, str]:
    """Public attributes of the instances of a class that is no record, by their annotations."""
    ours = [base for base in thing.__mro__ if base.__module__.startswith("fasthessian")]
    found = {
        k: v for base in reversed(ours) for k, v in vars(base).get("__annotations__", {}).items()
    }
    return {k: v for k, v in found.items() if public(k)}


def vars_of(thing: type) -> set[str]:
    """Public attributes of a class and of those of its bases that are ours."""
    ours = [base for base in thing.__mro__ if base.__module__.startswith("fasthessian")]
    found = {name for base in ours for name in vars(base) if public(name)}
    fields = {field.name for field in dataclasses.fields(thing)} if is_record(thing) else set()
    return found - fields | ({"__matmul__"} & set(dir(thing)))


def is_record(thing: type) -> bool:
    """Whether the class is a record."""
    return dataclasses.is_dataclass(thing)


def public(name: str) -> bool:
    """Whether a name has no underscore in front."""
    return not name.startswith("_")


def signature(function: object) -> str:
    """The signature in one line."""
    return " ".join(str(inspect.signature(function)).split())  # type: ignore[arg-type]


if __name__ == "__main__":
    print("\n".join(lines()))
