"""What a loss depends on besides its formula, found in the user's objects and watched."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from fasthessian.operators.torch_state.snapshot import Snapshot

POINT, DATA, OTHER = "point", "data", "other"  # kinds of entries
Entry = tuple[str, Any, str]  # what it is called, itself, its kind
LONG = 1000  # entries of a container of the model that are looked through at most
PLAIN = (
    int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size
)  # fmt: skip
_PLAIN = frozenset(PLAIN)
_MODULE = frozenset(vars(nn.Module()))  # what every module has: flags, hooks, tables
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Change(NamedTuple):
    """What a look found."""

    void: bool = False  # kept graphs no longer stand for the loss
    name: str | None = None  # of the first thing whose value changed
    terms: bool = False  # more than the model's parameters and buffers changed


class Watch:
    """What a loss depends on, as it was at the last look.

    Args:
        entries: all of it now, or without what is plain Python for ``entries(False)``.
    """

    def __init__(self, entries: Callable[[bool], Iterable[Entry]]) -> None:
        self._entries = entries
        self._seen: dict[str, Snapshot] = {}
        self._plain: dict[str, Any] = {}
        self._own: set[str] = set()  # what the loss itself changes: counters, caches
        self.written: set[str] = set()  # tensors among them that it writes into

    def look(self, trusted: bool = False, whole: bool = True, data: bool = True) -> Change:
        """Compare with the last look, and see everything as it is now.

        With ``trusted`` values are compared only where the version tells of a write; without
        ``data`` the same holds for all but parameters and buffers. Without ``whole`` only
        parameters, buffers and batches are looked at.
        """
        first = not self._seen
        tensors, plain = self._read(whole or first)
        if first:
            self._seen = {kind: Snapshot(found) for kind, found in tensors.items()}
            self._plain = plain
            return Change()
        void, names, terms = False, [], False
        for kind in (POINT, DATA, OTHER) if whole else (POINT, DATA):
            unread = trusted or not (data or kind == POINT)
            written, changed = self._seen[kind].compare(tensors[kind], unread)
            self._seen[kind].take(tensors[kind], [*written, *changed])
            void |= bool(written or changed)
            names += [cast(str, name) for name in changed]
            terms |= bool(changed) and kind != POINT
        if whole:
            differing = _differing(self._plain, plain)
            self._plain = plain
            names += differing
            terms |= bool(differing)
        elif void or names:  # graphs are built anew: what they depend on has to be known in whole
            rest = self.look(trusted, data=data)
            names += [] if rest.name is None else [rest.name]
            terms |= rest.terms
        return Change(void or bool(names), names[0] if names else None, terms)

    def settle(self, trusted: bool = True) -> None:
        """After the loss was evaluated: what differs from the look before is its own doing.

        With ``trusted`` values are compared only where the version tells of a write.
        """
        tensors, plain = self._read(True)
        written, changed = self._seen[OTHER].compare(tensors[OTHER], trusted)
        inside = [cast(str, name) for name in written + changed if name in tensors[OTHER]]
        self.written.update(
            name for name in inside if self._seen[OTHER].holds(name, tensors[OTHER][name])
        )
        own = [*_differing(self._plain, plain), *(cast(str, name) for name in written + changed)]
        if own:
            self._own.update(map(_whole, own))
            tensors, self._plain = self._read(True)
            self._seen[OTHER] = Snapshot(tensors[OTHER])

    def _read(self, whole: bool) -> tuple[dict[str, dict[Any, Tensor]], dict[str, Any]]:
        """Tensors by kind and name, and the rest by name."""
        tensors: dict[str, dict[Any, Tensor]] = {POINT: {}, DATA: {}, OTHER: {}}
        plain: dict[str, Any] = {}
        for name, item, kind in self._entries(whole):
            if kind == OTHER and self._own and _whole(name) in self._own:
                continue
            if isinstance(item, Tensor):
                tensors[kind][name] = item
            else:
                plain[name] = item
        return tensors, plain


def _whole(name: str) -> str:
    """The container that an entry is in, which has other entries the next time."""
    return name.partition("[")[0]


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = [name for name in old if name not in new]
    for name, value in new.items():
        before = old.get(name, names)  # a list that nothing equals
        if before is value:
            continue
        if not (type(before) is type(value) and _is_plain(value) and before == value):
            names.append(name)
    return names


def _is_plain(item: Any) -> bool:
    if type(item) is tuple:
        return _PLAIN.issuperset(map(type, item))
    return type(item) in _PLAIN or isinstance(item, np.generic)


def of_module(root: str, module: nn.Module, kind: str, seen: set[int], whole: bool,
              depth: int = 1) -> Iterator[Entry]:  # fmt: skip
    """Parameters, buffers and, if ``whole``, classes, hooks and attributes of all modules inside.

    ``seen`` are the ids of what was found already. Flags of training are left out.
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
            if name in _MODULE:
                continue
            if type(value) in _PLAIN:  # most are: no generator for these
                yield f"{root}.{path}{name}", value, OTHER
            else:
                yield from reach(f"{root}.{path}{name}", value, OTHER, seen, depth)


def reach(label: str, item: Any, kind: str, seen: set[int], depth: int = 2) -> Iterator[Entry]:
    """What can be reached from an object: tensors, arrays, numbers, words, and other objects.

    Containers are looked through, and ``depth`` functions and objects one inside another: their
    attributes, defaults, closures, and the globals they name. What is not looked through is known
    by its identity.
    """
    if _is_plain(item):
        yield label, item, OTHER
        return
    if id(item) in seen or isinstance(item, weakref.ref):
        return
    seen.add(id(item))
    inner: Iterable[tuple[str, Any]] = ()
    if isinstance(item, Tensor):
        if kind == DATA or item.grad_fn is None:  # what was computed is not set
            yield from _dense(label, item, kind)
        return
    if isinstance(item, np.ndarray):
        yield label, _as_tensor(item), OTHER
        return
    if isinstance(item, nn.Module):
        yield from of_module(label, item, OTHER, seen, True, depth)
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
        yield from reach(name, value, kind, seen, depth)


def _of_class(owner: type, seen: set[int]) -> Iterator[Entry]:
    """Plain attributes of a class of the user's and its bases, and what its call reads."""
    for base in owner.__mro__:
        if id(base) in seen or base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        seen.add(id(base))
        for name, value in list(vars(base).items()):
            if name in ("forward", "__call__"):
                yield from reach(f"{base.__name__}.{name}", value, OTHER, seen, 1)
            elif type(value) in _PLAIN and not name.startswith("__"):
                yield f"{base.__name__}.{name}", value, OTHER


def _inside(label: str, item: Any) -> tuple[Iterable[tuple[str, Any]], Any]:
    """What an object or a function holds, and what stands for its identity."""
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
    held = getattr(item, "__dict__", None)
    if not isinstance(held, dict):
        return (), item
    return ((f"{label}.{name}", value) for name, value in list(held.items())), type(item)


def _variables(label: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"variable {name!r} of {label}", cell.cell_contents
        except ValueError:  # an empty cell
            continue
    for name in code.co_names:
        value = function.__globals__.get(name, types)  # attributes and builtins are no globals
        if not isinstance(value, (type, types.ModuleType)):
            yield f"variable {name!r} of {label}", value
    for name in ("__defaults__", "__kwdefaults__", "__dict__"):
        yield f"{label}.{name}", getattr(function, name)


def _dense(label: str, tensor: Tensor, kind: str) -> Iterator[Entry]:
    """The tensor, the dense ones that a sparse one consists of, or its identity."""
    if tensor.layout is torch.strided and not tensor.is_nested and _stored(tensor):
        yield label, tensor, kind
        return
    yield label, (id(tensor), 0 if tensor.is_inference() else tensor._version), OTHER
    if tensor.layout is torch.sparse_coo:
        for name in ("_indices", "_values"):
            yield f"{label}.{name}()", getattr(tensor.detach(), name)(), kind
    elif tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        yield f"{label}.values()", tensor.detach().values(), kind


def _as_tensor(array: np.ndarray[Any, Any]) -> Any:
    """A tensor on the array's memory; the array itself where torch has none or it is read-only."""
    if not array.flags.writeable or array.dtype.kind not in "biufc":
        return array
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError):  # negative strides, long double
        return array


def _stored(tensor: Tensor) -> bool:
    """Whether it has numbers of its own: torch.func leaves wrappers behind in recurrent layers."""
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:
        return False
