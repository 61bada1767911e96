"""Records, and other arguments and results of a call, as states."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fasthessian.checkpoints.state import State, Stored
from fasthessian.distributed.slices import Slice
from fasthessian.errors import ConvergenceWarning
from fasthessian.results.record import Record

VECTORS = "vectors"  # tensors of this name are rows, of which a rank may hold a range of columns
WARNINGS = {kind.__name__: kind for kind in (ConvergenceWarning, UserWarning)}


class Items(State):
    """Tensors, records and dictionaries of records by name; they never change.

    Args:
        items: by name; empty for a state that will be restored.
        device: where restored tensors are that lay on this device; all others are on the CPU.
        part: of each of the ``vectors``, that this rank has; None for whole ones.
    """

    FROZEN = True

    def __init__(
        self, items: Mapping[str, Any], device: torch.device, part: Slice | None = None
    ) -> None:
        self.items, self._device, self._part = dict(items), device, part

    def numbers(self) -> dict[str, Any]:
        """What is not a tensor, as JSON."""
        return {name: self._packed(name, item, {}) for name, item in self.items.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are whole, by the path to them."""
        return {name: t for name, t in self._all().items() if not self._is_split(name)}

    def split(self) -> dict[str, Tensor]:
        """The tensors of the name ``vectors``, if they are not whole, by the path to them."""
        return {name: t for name, t in self._all().items() if self._is_split(name)}

    def restore(self, numbers: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        """Take over the items."""
        self.items = {name: self._unpacked(item, stored) for name, item in numbers.items()}

    def _all(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, item in self.items.items():
            self._packed(name, item, found)
        return found

    def _packed(self, path: str, item: Any, tensors: dict[str, Tensor]) -> Any:
        """JSON of an item; its tensors are added to ``tensors``."""
        if isinstance(item, Tensor):
            tensors[path] = item.detach()
            return {"tensor": path, "device": item.device.type}
        if isinstance(item, Record):
            names = [field.name for field in dataclasses.fields(item)]
            fields = {x: self._packed(f"{path}.{x}", getattr(item, x), tensors) for x in names}
            return {"record": type(item).__name__, "fields": fields}
        if isinstance(item, Mapping):
            parts = (self._packed(f"{path}.{i}", x, tensors) for i, x in enumerate(item.values()))
            return {"mapping": dict(zip(item, parts, strict=True))}
        return list(item) if isinstance(item, tuple) else item

    def _is_split(self, path: str) -> bool:
        return self._part is not None and path.rpartition(".")[2] == VECTORS

    def _unpacked(self, item: Any, stored: Mapping[str, Stored]) -> Any:
        if isinstance(item, list):
            return tuple(item)
        if not isinstance(item, dict):
            return item
        if "tensor" in item:
            here = item["device"] == self._device.type
            found = stored[item["tensor"]].tensor(self._device if here else "cpu")
            part = self._part if self._is_split(item["tensor"]) else None
            if part is None or found.shape[-1] != part.width:
                return found
            return found[:, : part.held].contiguous()
        parts = item["fields"] if "record" in item else item["mapping"]
        values = {name: self._unpacked(part, stored) for name, part in parts.items()}
        if "mapping" in item:
            return values
        kinds = {kind.__name__: kind for kind in Record.__subclasses__()}
        return kinds[item["record"]](**values)


def packed_warnings(shortfalls: list[Warning]) -> list[Any]:
    """Warnings as JSON."""
    return [[type(warning).__name__, str(warning)] for warning in shortfalls]


def unpacked_warnings(packed: list[Any]) -> list[Warning]:
    """Warnings from JSON."""
    return [WARNINGS[name](text) for name, text in packed]
