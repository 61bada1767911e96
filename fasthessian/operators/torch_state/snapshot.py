"""Whether tensors changed since they were last seen: by place and version, and by value."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

EXACT = 1 << 26  # bytes of copies that a snapshot keeps; tensors beyond are known by sums
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def version(tensor: Tensor) -> tuple[int, int]:
    """Where the tensor's memory is and how often it was written through autograd's eyes."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class _Seen(NamedTuple):
    """A tensor as it was; it is held, so that no other one can get its place in memory."""

    tensor: Tensor
    version: tuple[int, int]
    form: tuple[torch.Size, torch.dtype, torch.device]
    exact: bool
    value: Tensor  # a copy, or the sums of its words


class Snapshot:
    """Tensors by name as they were last seen.

    Values are compared too, because writes through NumPy or ``.data`` leave no trace in the
    version. Up to ``EXACT`` bytes are copied; larger tensors are known by the sums of their words
    over rows and columns, modulo 2^64: one read, and no memory to speak of.
    """

    def __init__(self, named: Mapping[Hashable, Tensor]) -> None:
        self._seen: dict[Hashable, _Seen] = {}
        self._room = EXACT
        self.take(named, named)

    def take(self, named: Mapping[Hashable, Tensor], names: Iterable[Hashable]) -> None:
        """See the tensors of these names as they are now; names without one are dropped."""
        for name in names:
            old = self._seen.pop(name, None)
            if old is not None and old.exact:
                self._room += old.value.nbytes
            tensor = named.get(name)
            if tensor is None:
                continue
            exact = tensor.nbytes <= self._room
            value = tensor.detach().clone() if exact else _sums(tensor)
            self._room -= value.nbytes if exact else 0
            self._seen[name] = _Seen(tensor, version(tensor), _form(tensor), exact, value)

    def compare(
        self, named: Mapping[Hashable, Tensor], trusted: bool = False
    ) -> tuple[list[Hashable], list[Hashable]]:
        """Names of tensors that were written or replaced, and of those whose values changed.

        With ``trusted`` values are compared only where the version tells of a write: a comparison
        waits for an accelerator.
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
            elif trusted:
                continue
            if seen.exact and tensor.device.type == "cpu" and torch.equal(tensor, seen.value):
                continue
            now, then = _words(tensor) if seen.exact else _sums(tensor), seen.value
            then = _words(then) if seen.exact else then
            if now.device.type != "cpu":
                waiting.append((name, (now != then).any()))
            elif not torch.equal(now, then):
                changed.append(name)
        if waiting:  # one synchronisation for all tensors of an accelerator
            flags = torch.stack([flag.to(waiting[0][1].device) for _, flag in waiting]).tolist()
            changed += [name for (name, _), flag in zip(waiting, flags, strict=True) if flag]
        return written, changed

    def holds(self, name: Hashable, tensor: Tensor) -> bool:
        """Whether the tensor of this name is still the same object."""
        return name in self._seen and self._seen[name].tensor is tensor

    def matches(self, named: Mapping[Hashable, Tensor]) -> bool:
        """Whether these are the same tensors, unchanged and unwritten."""
        return not any(self.compare(named))


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _words(tensor: Tensor) -> Tensor:
    """The numbers as integers of their width, so that NaN equals itself."""
    words = tensor.detach()
    if words.is_complex():
        words = torch.view_as_real(words.resolve_conj())
    words = words.resolve_neg()
    return words.view(_WORDS[words.element_size()])


def _sums(tensor: Tensor) -> Tensor:
    """Sums over the rows and the columns of the words: a change or a swap shows in one of them."""
    words = _words(tensor).reshape(-1)
    width = 1 << (len(words).bit_length() // 2)
    square = words[: len(words) // width * width].view(-1, width)
    return torch.cat((square.sum(0), square.sum(1), words[square.numel() :].long()))
