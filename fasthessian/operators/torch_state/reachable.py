"""What can be reached from a user's object: every entry that a loss may depend on.

A loss reads more than its arguments: attributes of the model and of the objects that it holds,
variables of the enclosing function, globals, options in a list. ``reachable`` walks through an
object and yields an entry for each: its name (which messages show), the thing itself, and its kind.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

POINT = "point"  # kind of entry: parameters and buffers of the model
DATA = "data"  # tensors of the batches, tensors of the criterion
OTHER = "other"  # everything else
Entry = tuple[str, Any, str]  # name, thing, kind
LONG = 1000  # containers with more entries are not walked through, except in the data
_SIMPLE = frozenset({
    int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size
})  # fmt: skip
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # flags, hooks, tables
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def is_simple(item: Any) -> bool:
    """Whether this is a number, a string or the like, or a tuple of these: compared by value."""
    if type(item) is tuple:
        return _SIMPLE.issuperset(map(type, item))
    return type(item) in _SIMPLE or isinstance(item, np.generic)


def module_entries(root: str, module: nn.Module, kind: str, seen: set[int], whole: bool,
                   depth: int = 1) -> Iterator[Entry]:  # fmt: skip
    """Parameters and buffers of all modules inside, and if ``whole`` classes, hooks, attributes.

    ``root`` is the name of the module. ``seen`` has the ids of what was found already. Training
    flags are left out, since products set them.
    """
    for prefix, each in module.named_modules():
        seen.add(id(each))
        path = f"{prefix}." if prefix else ""
        for word, table in (("parameter", each._parameters), ("buffer", each._buffers)):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    label = f"{word} {path + name!r}" if kind == POINT else f"{root}.{path}{name}"
                    yield label, tensor, kind
        if not whole:
            continue
        yield f"{root}.{path}__class__", type(each), OTHER
        yield from _of_class(type(each), seen)
        for name in _HOOKS:
            for i, hook in enumerate(vars(each)[name].values()):
                yield f"{root}.{path}{name}[{i}]", hook, OTHER
        for name, value in list(vars(each).items()):
            if name in _OF_EVERY_MODULE:
                continue
            if type(value) in _SIMPLE:  # most are; a call of reachable would take longer
                yield f"{root}.{path}{name}", value, OTHER
            else:
                yield from reachable(f"{root}.{path}{name}", value, OTHER, seen, depth)


def reachable(label: str, item: Any, kind: str, seen: set[int], depth: int = 2) -> Iterator[Entry]:
    """What can be reached from an object of this name: tensors, arrays, numbers, other objects.

    The walk enters containers, and functions and objects up to ``depth`` levels deep: their
    attributes, default arguments, closure variables, and the globals that they name. What it does
    not enter is one entry, known by its identity.
    """
    if is_simple(item):
        yield label, item, OTHER
        return
    if id(item) in seen or isinstance(item, weakref.ref):
        return
    seen.add(id(item))
    inner: Iterable[tuple[str, Any]] = ()
    if isinstance(item, Tensor):
        if kind == DATA or item.grad_fn is None:  # a computed tensor is no setting
            yield from _dense(label, item, kind)
        return
    if isinstance(item, np.ndarray):
        yield label, _as_tensor(item), OTHER
        return
    if isinstance(item, nn.Module):
        yield from module_entries(label, item, OTHER, seen, True, depth)
        return
    if isinstance(item, (Mapping, list, tuple, set, frozenset)):
        if kind == DATA or len(item) <= LONG:
            pairs = list(item.items() if isinstance(item, Mapping) else enumerate(item))
            inner = ((f"{label}[{key!r}]", value) for key, value in pairs)
        else:
            yield label, item, OTHER
            yield f"{label}.__len__", len(item), OTHER
    elif depth == 0 or isinstance(item, (type, types.ModuleType)):
        yield label, item, OTHER
    else:
        depth -= 1
        inner, identity = _inside(label, item)
        yield label, identity, OTHER
        yield from _of_class(type(item), seen)
    for name, value in inner:
        yield from reachable(name, value, kind, seen, depth)


def _of_class(owner: type, seen: set[int]) -> Iterator[Entry]:
    """Simple attributes of a user's class and its bases, and what its forward function reads."""
    for base in owner.__mro__:
        if id(base) in seen or base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        seen.add(id(base))
        for name, value in list(vars(base).items()):
            if name in ("forward", "__call__"):
                yield from reachable(f"{base.__name__}.{name}", value, OTHER, seen, 1)
            elif type(value) in _SIMPLE and not name.startswith("__"):
                yield f"{base.__name__}.{name}", value, OTHER


def _inside(label: str, item: Any) -> tuple[Iterable[tuple[str, Any]], Any]:
    """What an object or a function holds, and the thing that stands for its identity."""
    if isinstance(item, functools.partial):
        names = ("func", "args", "keywords")
        return [(f"{label}.{name}", getattr(item, name)) for name in names], type(item)
    if isinstance(item, types.MethodType):
        return [(f"{label}.__self__", item.__self__), (f"{label}.__func__", item.__func__)], type(
            item
        )
    if isinstance(item, types.FunctionType):
        if item.__module__ is not None and item.__module__.partition(".")[0] == "torch":
            return (), item
        return _variables(label, item), item.__code__
    attributes = getattr(item, "__dict__", None)
    if not isinstance(attributes, dict):
        return (), item
    return ((f"{label}.{name}", value) for name, value in list(attributes.items())), type(item)


def _variables(label: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Closure variables, globals, default arguments and attributes of a function."""
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"variable {name!r} of {label}", cell.cell_contents
        except ValueError:  # an empty cell
            continue
    for name in code.co_names:
        value = function.__globals__.get(name, types)  # a module, so skipped, if it is no global
        if not isinstance(value, (type, types.ModuleType)):
            yield f"variable {name!r} of {label}", value
    for name in ("__defaults__", "__kwdefaults__", "__dict__"):
        yield f"{label}.{name}", getattr(function, name)


def _dense(label: str, tensor: Tensor, kind: str) -> Iterator[Entry]:
    """The tensor itself; or for a sparse one its identity and the dense tensors it consists of."""
    if tensor.layout is torch.strided and not tensor.is_nested and _has_memory(tensor):
        yield label, tensor, kind
        return
    yield label, (id(tensor), 0 if tensor.is_inference() else tensor._version), OTHER
    if tensor.layout is torch.sparse_coo:
        for name in ("_indices", "_values"):
            yield f"{label}.{name}()", getattr(tensor.detach(), name)(), kind
    elif tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        yield f"{label}.values()", tensor.detach().values(), kind


def _as_tensor(array: np.ndarray[Any, Any]) -> Any:
    """A tensor that shares the array's memory; the array if it is read-only or torch cannot."""
    if not array.flags.writeable or array.dtype.kind not in "biufc":
        return array
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError):  # negative strides, long double
        return array


def _has_memory(tensor: Tensor) -> bool:
    """Whether it has memory: torch.func leaves wrappers that have none in recurrent layers."""
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:
        return False
