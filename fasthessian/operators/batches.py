"""The forms of ``data``: one batch, a list of batches, or a loader that is read again and again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fasthessian.operators.state import seeded
from fasthessian.operators.watch import DATA, OTHER, Entry, reach

Batch = Any  # a Mapping, or a tuple or list (inputs..., targets)
FORMS = "a batch (inputs, targets), a mapping, a list of batches, or a DataLoader"


def leaves(batch: Batch) -> Iterator[Tensor]:
    """Every dense tensor inside a batch, in a fixed order."""
    if isinstance(batch, Tensor):
        if batch.layout is torch.strided:
            yield batch
    elif isinstance(batch, Mapping):
        for key in batch:
            yield from leaves(batch[key])
    elif isinstance(batch, (tuple, list)):
        for item in batch:
            yield from leaves(item)


def mapped(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    """The batch with ``change`` applied to everything in it that is no container."""
    if isinstance(batch, Mapping):
        return {key: mapped(batch[key], change) for key in batch}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(item, change) for item in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(mapped(item, change) for item in batch)
    return change(batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on ``device``; tensors already there are not copied."""

    def move(item: Any) -> Any:
        if isinstance(item, Tensor):
            moved = item.to(device, non_blocking=True)
            return moved.clone() if moved.is_inference() else moved  # autograd cannot save those
        return item.to(device) if hasattr(item, "to") else item

    return mapped(batch, move)


def cut(batch: Batch, most: int | None) -> Iterator[Batch]:
    """Chunks of at most ``most`` samples; None leaves the batch whole.

    Tensors as long as the batch are cut along their first dimension, others go into every chunk.
    """
    count = samples(batch)
    if most is None or count <= most:
        yield batch
        return
    for start in range(0, count, most):
        stop = min(start + most, count)

        def window(item: Any, start: int = start, stop: int = stop) -> Any:
            long = isinstance(item, Tensor) and item.dim() > 0 and len(item) == count
            return item[start:stop] if long else item

        yield mapped(batch, window)


def samples(batch: Batch) -> int:
    """The first dimension of the targets, or else of the first tensor that has one."""
    last = None if isinstance(batch, Mapping) else batch[-1]
    if isinstance(last, Tensor) and last.dim() == 0:
        return 1
    for tensor in [*leaves(last), *leaves(batch)]:
        if tensor.dim() > 0:
            return tensor.shape[0]
    return 1


def size(batch: Batch) -> int:
    """Numbers held by the batch, to compare the memory of batches."""
    return sum(tensor.numel() for tensor in leaves(batch)) or 1


def check_batch(batch: Batch, has_criterion: bool) -> None:
    """Raise TypeError unless the batch is a mapping or a tuple or list of the right length."""
    if isinstance(batch, Mapping):
        if not batch:
            raise TypeError("data holds an empty mapping; a batch needs at least one tensor")
        return
    if not isinstance(batch, (tuple, list)):
        raise TypeError(
            f"data holds a batch of type {type(batch).__name__}; "
            f"a batch is (inputs, targets), a tuple of more, or a mapping"
        )
    least = 2 if has_criterion else 1
    if len(batch) < least:
        form = "(inputs, targets)" if has_criterion else "(inputs,)"
        raise TypeError(f"data holds a batch of {len(batch)} entries; at least {form} is needed")


class DataChanged(RuntimeError):
    """A loader yielded other samples than at its first pass."""


class Memory:
    """One batch or the user's list of batches; they come in the same order at every pass."""

    replayable = True

    def __init__(self, data: Any, many: bool) -> None:
        self._data, self._many = data, many

    def one_pass(self) -> Generator[Batch, None, None]:
        """Yield every batch."""
        yield from self._data if self._many else [self._data]

    def order(self) -> None:
        """They are."""

    def restart(self) -> None:
        """Nothing is kept of a pass."""

    def entries(self, whole: bool, seen: set[int]) -> Iterator[Entry]:
        """All that the batches hold; see ``watch``."""
        return reach("data", self._data, DATA, seen)


class Stream:
    """A re-iterable such as a DataLoader, checked to yield the same samples at every pass.

    The global random states differ at each pass, so random augmentation shows as a change
    instead of being frozen. The order of the samples is free unless ``ordered``.
    """

    replayable = False

    def __init__(self, loader: Iterable[Batch], ordered: bool) -> None:
        self._loader = loader
        self._ordered = ordered
        self._passes = 0
        self._first: Fingerprint | None = None

    def one_pass(self) -> Generator[Batch, None, None]:
        """Yield every batch, then compare the pass with the first one.

        Raises:
            DataChanged: the samples differ from those of the first pass.
        """
        self._passes += 1
        seen = Fingerprint()
        owners = (self._loader, *(getattr(self._loader, key, None) for key in _SAMPLERS))
        generators = {id(g): g for owner in owners if (g := getattr(owner, "generator", None))}
        with seeded(self._passes, list(generators.values())):
            for batch in self._loader:
                seen.add(batch)
                yield batch
        if self._first is None:
            self._first = seen
        elif not seen.matches(self._first, self._ordered):
            raise DataChanged(
                f"data yields different batches at each pass (random augmentation, sampling or "
                f"padding{', or their order' if self._ordered else ''}); use a loader without "
                f"randomness, or fix one pass: data=list(loader)"
            )

    def order(self) -> None:
        """From now on every pass must yield the same batches in the same order."""
        self._ordered = True

    def restart(self) -> None:
        """Take the next pass for the first one."""
        self._first = None

    def entries(self, whole: bool, seen: set[int]) -> Iterator[Entry]:
        """What the dataset holds in memory, for graphs that are kept; see ``watch``."""
        held = getattr(self._loader, "dataset", self._loader)
        return reach("data.dataset", held, OTHER, seen) if whole else iter(())


_SAMPLERS = ("sampler", "batch_sampler")


class Fingerprint:
    """Sums over the samples of a random projection and of its square, in float64.

    Neither sum depends on the order of the samples or on how they are batched. The square ties
    each input to its target. A third sum depends on both.
    """

    def __init__(self) -> None:
        self._count = 0
        self._sums = [0.0, 0.0, 0.0]
        self._batches = 0

    def add(self, batch: Batch) -> None:
        """Account for one batch."""
        self._batches += 1
        by_length: dict[int, Tensor] = {}
        for salt, tensor in enumerate(leaves(batch)):
            if tensor.numel() == 0:
                continue
            rows = tensor.detach().reshape(tensor.shape[0] if tensor.dim() else 1, -1)
            rows = (torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows).double()
            # masks and missing targets: numbers of their own, that compare equal to themselves
            rows = rows.nan_to_num(nan=1.1, posinf=1.3, neginf=-1.7)
            seen = rows @ _direction(rows.shape[1], salt).to(rows.device)
            by_length[len(seen)] = by_length.get(len(seen), 0) + seen.cpu()
        for length, p in by_length.items():
            self._count += length
            self._sums[0] += float(p.sum())
            self._sums[1] += float(p @ p)
            self._sums[2] += self._batches * float(p.sum())

    def matches(self, other: Fingerprint, ordered: bool) -> bool:
        """Whether both saw the same samples (``ordered``: in this order), to rounding."""
        if self._count != other._count:
            return False
        norm = math.sqrt(self._count * max(self._sums[1], other._sums[1]))
        scales = (norm, self._sums[1], norm * self._batches if ordered else math.inf)
        return all(
            abs(a - b) <= 1e-9 * scale
            for a, b, scale in zip(self._sums, other._sums, scales, strict=True)
        )


@functools.lru_cache(maxsize=16)
def _direction(length: int, salt: int) -> Tensor:
    # uniform draws are sequential: samples padded with zeros to another length look the same
    generator = torch.Generator().manual_seed(salt)
    return torch.rand(length, generator=generator, dtype=torch.float64) - 0.5


def source(data: Any, ordered: bool) -> Memory | Stream:
    """Recognise the form of ``data``.

    Raises:
        TypeError: a one-shot iterator, a Dataset, or no known form.
        ValueError: an empty list.
    """
    if not isinstance(data, (Mapping, tuple, list)):
        _check_stream(data)
        return Stream(data, ordered)
    if isinstance(data, list) and not data:
        raise ValueError(f"data is an empty list; pass {FORMS}")
    many = isinstance(data, list) and not isinstance(data[0], Tensor)
    return Memory(data, many)


def _check_stream(data: Any) -> None:
    if hasattr(data, "__next__"):
        raise TypeError(
            f"data is a {type(data).__name__}, which can be read only once; "
            f"pass list(data) or a DataLoader"
        )
    if isinstance(data, Dataset):
        raise TypeError(
            f"data is a dataset ({type(data).__name__}), which yields single samples; "
            f"wrap it in a DataLoader"
        )
    if isinstance(data, (Tensor, str, bytes)) or not hasattr(data, "__iter__"):
        raise TypeError(f"data must be {FORMS}, got {type(data).__name__}")
