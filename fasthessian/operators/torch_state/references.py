"""Graphs that keep references to the full parameters of a module instead of their values.

A graph saves the tensors that derivatives need. `References` hooks this: what is a view of a full
parameter is saved as the parameter's name and the geometry of the view, and read again when a
derivative needs it. So the memory of a full parameter is free as soon as the operation that read it
is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from fasthessian.operators.torch_state.scopes import Scope, saved_tensors

_weak: Any = reductions.StorageWeakRef


class Reference(NamedTuple):
    """A full parameter, or a view of it."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class References:
    """The full parameters that are alive, and what graphs save instead of them.

    Args:
        read: returns the full parameter of a name, in memory of its own.
    """

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._read = read
        # Names by the address of their storage. While there is a weak reference, no other storage
        # gets this address.
        self._alive: dict[int, tuple[Any, str, torch.dtype]] = {}

    def full(self, name: str) -> Tensor:
        """The full parameter of this name, which graphs do not keep."""
        full = self._read(name)
        self._alive = {at: entry for at, entry in self._alive.items() if not entry[0].expired()}
        storage = full.untyped_storage()
        self._alive[storage._cdata] = _weak(storage), name, full.dtype
        return full

    def kept(self) -> Scope[None]:
        """Inside this scope, graphs keep references."""
        return saved_tensors(self._pack, self._unpack)

    def _pack(self, t: Tensor) -> Tensor | Reference:
        if t.layout is not torch.strided or t.is_conj() or t.is_neg():
            return t
        _, name, dtype = self._alive.get(t.untyped_storage()._cdata, (None, "", None))
        if dtype != t.dtype:
            return t
        return Reference(name, t.size(), t.stride(), int(t.storage_offset()))

    def _unpack(self, kept: Tensor | Reference) -> Tensor:
        if not isinstance(kept, Reference):
            return kept
        return self.full(kept.name).as_strided(kept.size, kept.stride, kept.offset)


class Table(dict[str, Any]):
    """The parameters of a module, some of which are leaves without memory that are read as full.

    Args:
        parameters: by attribute.
        names: the full names of these leaves, by their id.
        references: reads them.
    """

    def __init__(
        self, parameters: Mapping[str, Any], names: Mapping[int, str], references: References
    ) -> None:
        super().__init__(parameters)
        self._names, self._references = names, references

    def __getitem__(self, key: str) -> Any:
        """The parameter, full and with the leaf as its history."""
        leaf = super().__getitem__(key)
        name = self._names.get(id(leaf))
        if name is None:
            return leaf
        return _Read.apply(leaf, lambda: self._references.full(name))  # type: ignore[no-untyped-call]


class _Read(torch.autograd.Function):
    """A leaf without memory becomes the full parameter, whose gradient it gets."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, read: Callable[[], Tensor]) -> Tensor:
        return read()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
