"""What the fields of a record accept, as their annotations declare, and a strict reader of JSON.

The annotation ``Annotated[Tensor, "k n", ">= 0"]`` declares a float64 array of shape (k, n) and a
rule, which is a key of ``RULES``. The name of an axis stands for one length in the whole record. An
axis ``q?`` may have the length 0, and is absent if an earlier field has q = 0. ``FLOATING`` among
the rules also accepts narrower dtypes; ``OMITTED`` keeps the field out of JSON. Scalars and tuples
are declared in the same way. NaN stands for an unknown number and breaks no rule.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fasthessian.errors import InputError

Array = npt.NDArray[np.float64]

FLOATING = "of 16 to 64 bits"
OMITTED = "not in JSON"
RULES: dict[str, Callable[[Array], npt.NDArray[np.bool_]]] = {  # true where a value breaks the rule
    ">= 0": lambda x: x < 0,
    "> 0": lambda x: x <= 0,
    "between 0 and 1": lambda x: (x <= 0) | (x >= 1),
    "ascending": lambda x: np.diff(x, axis=-1) < 0,
}
WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


class Field(NamedTuple):
    """The declaration of one field."""

    kind: Any  # the type; for a tuple, `items` holds the types within
    items: tuple[Any, ...]
    axes: tuple[str, ...]
    rules: tuple[str, ...]


def fields_of(kind: type) -> dict[str, Field]:
    """The declarations of a dataclass by field name, in the order of the class."""
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        words = getattr(hint, "__metadata__", ())
        base = hint.__origin__ if words else hint
        rules = tuple(word for word in words if word in (*RULES, FLOATING, OMITTED))
        axes = tuple(" ".join(word for word in words if word not in rules).split())
        found[name] = Field(typing.get_origin(base) or base, typing.get_args(base), axes, rules)
    return found


def scalar(name: str, field: Field, value: Any, sizes: dict[str, int], null: bool) -> Any:
    """Convert a value of JSON (a list if the field is a tuple) to the type of the field.

    Args:
        name: name of the field, for the message.
        field: the declaration.
        value: the value that was found.
        sizes: lengths of axes by name; those of this field are added.
        null: whether null stands for a number that is not finite.

    Raises:
        ValueError: the value is not what the field declares.
    """
    many, count = field.kind is tuple, 1
    found, kind = (value, field.items[0]) if many else ([value], field.kind)
    if isinstance(found, list):
        if many:
            fixed = Ellipsis not in field.items
            count = len(field.items) if fixed else sizes.setdefault(field.axes[0], len(found))
        items = [_item(kind, item, null) for item in found]
        if len(items) == count and not any(item is None for item in items):
            if kind in (int, float):
                obey(name, field, np.array(items, dtype=float))
            return tuple(items) if many else items[0]
    length = f" ({field.axes[0]}={sizes[field.axes[0]]})" if field.axes and sizes else ""
    accepted = f"a list of {WORDS[kind]}{length}" if many else WORDS[kind]
    if many and not field.axes:
        accepted += f", {len(field.items)} items"
    accepted += "".join(f" {rule}" for rule in field.rules)
    raise InputError(f"{name} must be {accepted}, got {_short(value)}")


def _item(kind: type, value: Any, null: bool) -> Any:
    """The value if it has that type, else None."""
    if kind is float and value is None and null:
        return math.nan
    if type(value) is int and abs(value) >= 2**63:
        return None
    return value if type(value) is kind or (kind is float and type(value) is int) else None


def numbers(name: str, value: Any) -> Array:
    """Convert nested lists of numbers to an array; null stands for NaN.

    Raises:
        ValueError: they hold something else, or their lengths differ.
    """
    try:
        found = np.array(value, dtype=object)
        if isinstance(value, list) and all(type(x) in (int, float, type(None)) for x in found.flat):
            return found.astype(np.float64)
    except (ValueError, OverflowError):  # lists of different lengths; an integer of 400 digits
        pass
    raise InputError(
        f"{name} must be float64 numbers in lists of equal length, got {_short(value)}"
    )


def fits(
    name: str, field: Field, dtype: np.dtype[Any], shape: tuple[int, ...], sizes: dict[str, int]
) -> None:
    """Raise ValueError unless the field accepts an array of this dtype and shape.

    Lengths of axes that are not in ``sizes`` yet are added to it.
    """
    names = ("float16", "float32", "float64") if FLOATING in field.rules else ("float64",)
    present = [a for a in field.axes if not (a.endswith("?") and sizes.get(a.rstrip("?")) == 0)]
    axes = [axis.rstrip("?") for axis in present]
    known = dict(sizes)
    same = [known.setdefault(a, length) == length for a, length in zip(axes, shape, strict=False)]
    if str(dtype) in names and len(axes) == len(shape) and all(same):
        sizes.update(known)
        return
    wanted = ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in axes)
    wanted += "," * (len(axes) == 1)
    raise InputError(
        f"{name} must be {' or '.join(names)} of shape ({wanted}), got {dtype} of shape {shape}"
    )


def obey(name: str, field: Field, values: Array) -> None:
    """Raise ValueError if the values break a rule of the field."""
    for rule in field.rules:
        if rule in RULES and bool(np.any(RULES[rule](values))):
            raise InputError(f"{name} must be {rule}, got {_short(values.tolist())}")


def json_types(value: Any) -> Any:
    """Tensors, dataclasses and containers as JSON types; a number that is not finite is null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = fields_of(type(value))
        return {
            name: json_types(getattr(value, name))
            for name, field in fields.items()
            if OMITTED not in field.rules
        }
    if isinstance(value, Tensor):
        return json_types(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): json_types(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_types(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def parse(text: str, *, finite: bool = False) -> Any:
    """Read JSON; refuse repeated keys, numbers above float64 and, if ``finite``, NaN.

    Raises:
        ValueError: the text is something else; the message has one line.
    """

    def number(word: str) -> float:
        if math.isinf(float(word)):
            raise InputError(f"{word[:40]} is above the largest float64")
        return float(word)

    def constant(word: str) -> float:
        if finite:
            raise InputError(f"{word} is no number of JSON; null stands for an unknown one")
        return float(word.replace("Infinity", "inf"))

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in found if keys.count(key) > 1)
            raise InputError(f"the key {_short(twice)} appears twice")
        return found

    try:
        return json.loads(
            text, parse_float=number, parse_constant=constant, object_pairs_hook=pairs
        )
    except RecursionError:
        raise InputError("it is nested too deeply") from None


def _short(value: Any) -> str:
    return " ".join(reprlib.repr(value).split())
