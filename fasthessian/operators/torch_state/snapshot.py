"""Whether tensors changed since a snapshot: by memory address, version counter and value.

Autograd's version counter shows most writes, but not those through NumPy or ``.data``. So a
snapshot also keeps values: a copy of the tensor, or checksums of a large one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

COPIED = 1 << 26  # bytes of copies that a snapshot keeps at most; other tensors have checksums
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def version(tensor: Tensor) -> tuple[int, int]:
    """The address of the tensor's memory, and how often autograd saw it written."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class _Seen(NamedTuple):
    """A tensor as it was."""

    tensor: Tensor  # a reference to it, so that no other tensor can get its address
    version: tuple[int, int]
    form: tuple[torch.Size, torch.dtype, torch.device]
    copied: bool
    value: Tensor  # a copy, or checksums


class Snapshot:
    """Tensors by name as they were when they were last read.

    Up to ``COPIED`` bytes are copied. A tensor beyond that has checksums: its numbers, taken as
    integers and arranged in a square, are summed over rows and columns modulo 2^64. They cost one
    read and almost no memory.
    """

    def __init__(self, named: Mapping[Hashable, Tensor]) -> None:
        self._seen: dict[Hashable, _Seen] = {}
        self._room = COPIED
        self.update(named, named)

    def update(self, named: Mapping[Hashable, Tensor], names: Iterable[Hashable]) -> None:
        """Read the tensors of these names again; names that ``named`` lacks are dropped."""
        for name in names:
            old = self._seen.pop(name, None)
            if old is not None and old.copied:
                self._room += old.value.nbytes
            tensor = named.get(name)
            if tensor is None:
                continue
            copied = tensor.nbytes <= self._room
            value = tensor.detach().clone() if copied else _checksums(tensor)
            self._room -= value.nbytes if copied else 0
            self._seen[name] = _Seen(tensor, version(tensor), _form(tensor), copied, value)

    def compare(
        self, named: Mapping[Hashable, Tensor], by_version: bool = False
    ) -> tuple[list[Hashable], list[Hashable]]:
        """Names of tensors that were written or replaced, and of those whose values changed.

        If ``by_version``, a value is compared only if the version counter shows a write: a
        comparison has to wait for an accelerator.
        """
        written: list[Hashable] = []
        changed: list[Hashable] = [name for name in self._seen if name not in named]
        waiting: list[tuple[Hashable, Tensor]] = []
        for name, tensor in named.items():
            seen = self._seen.get(name)
            if seen is None or _form(tensor) != seen.form:
                changed.append(name)
                continue
            same = version(tensor) == seen.version
            if not same:
                written.append(name)
            elif by_version:
                continue
            if seen.copied and tensor.device.type == "cpu" and torch.equal(tensor, seen.value):
                continue
            now, then = _integers(tensor) if seen.copied else _checksums(tensor), seen.value
            then = _integers(then) if seen.copied else then
            if now.device.type != "cpu":
                waiting.append((name, (now != then).any()))
            elif not torch.equal(now, then):
                changed.append(name)
        if waiting:  # wait only once for all tensors of an accelerator
            flags = torch.stack([flag.to(waiting[0][1].device) for _, flag in waiting]).tolist()
            changed += [name for (name, _), flag in zip(waiting, flags, strict=True) if flag]
        return written, changed

    def same_object(self, name: Hashable, tensor: Tensor) -> bool:
        """Whether the tensor of this name is the same object as before."""
        return name in self._seen and self._seen[name].tensor is tensor

    def matches(self, named: Mapping[Hashable, Tensor]) -> bool:
        """Whether these are the same tensors, unchanged and unwritten."""
        return not any(self.compare(named))


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _integers(tensor: Tensor) -> Tensor:
    """The bits of the numbers as integers, so that NaN equals itself."""
    numbers = tensor.detach()
    if numbers.is_complex():
        numbers = torch.view_as_real(numbers.resolve_conj())
    numbers = numbers.resolve_neg()
    return numbers.view(_INTEGERS[numbers.element_size()])


def _checksums(tensor: Tensor) -> Tensor:
    """Sums of the bits over rows and over columns: a change or a swap shows in one of them."""
    integers = _integers(tensor).reshape(-1)
    width = 1 << (len(integers).bit_length() // 2)
    square = integers[: len(integers) // width * width].view(-1, width)
    return torch.cat((square.sum(0), square.sum(1), integers[square.numel() :].long()))
