"""Where batches come from: memory, or a loader that is read again and again."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fasthessian.errors import InputError, InputTypeError, UnsupportedError
from fasthessian.operators.loss.batches import Batch, is_object, leaves
from fasthessian.operators.torch_state.random_state import seeded
from fasthessian.operators.torch_state.reachable import DATA, OTHER, Entry, reachable

FORMS = (
    "a batch (inputs, targets), a mapping, an object with .to, a list of batches, or a DataLoader"
)
CHANGED = "data yields different batches at each pass"  # the first words of that error


class Memory:
    """One batch or the user's list of batches; they come in the same order at every pass."""

    fixed_order = True

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
        return reachable("data", self._data, DATA, seen)


class LoaderSource:
    """A re-iterable such as a DataLoader, checked to yield the same samples at every pass.

    The global random states differ at each pass, so random augmentation shows as a change
    instead of being frozen. The order of the samples is free unless ``ordered``.
    """

    fixed_order = False

    def __init__(self, loader: Iterable[Batch], ordered: bool) -> None:
        self._loader = loader
        self._ordered = ordered
        self._passes = 0
        self._first: Fingerprint | None = None

    def one_pass(self) -> Generator[Batch, None, None]:
        """Yield every batch, then compare the pass with the first one.

        Raises:
            RuntimeError: the samples differ from those of the first pass.
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
            raise UnsupportedError(
                f"{CHANGED} (random augmentation, sampling or "
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
        return reachable("data.dataset", held, OTHER, seen) if whole else iter(())


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


def source(
    data: Any, ordered: bool, whole: bool = False, many: bool = False
) -> Memory | LoaderSource:
    """Recognise the form of ``data``.

    Where the loss takes batches ``whole``, a tensor is one, and so is what cannot be iterated. A
    list of tensors is one batch, unless ``many``.

    Raises:
        TypeError: a one-shot iterator, a Dataset, or no known form.
        ValueError: an empty list.
    """
    if isinstance(data, list):
        if not data:
            raise InputError(f"data is an empty list; pass {FORMS}")
        return Memory(data, many or not isinstance(data[0], Tensor))
    one = isinstance(data, (Mapping, tuple))
    # graphs have .to and are iterable; so are loaders that hold a dataset
    one |= is_object(data) and not hasattr(data, "dataset")
    one |= whole and (isinstance(data, Tensor) or not hasattr(data, "__iter__"))
    if one and not (isinstance(data, Dataset) or hasattr(data, "__next__")):
        return Memory(data, False)
    _check_stream(data)
    return LoaderSource(data, ordered)


def _check_stream(data: Any) -> None:
    if isinstance(data, (itertools.cycle, itertools.count, itertools.repeat)):
        raise InputTypeError(
            f"data is an itertools.{type(data).__name__}, which has no end; pass a list of "
            f"batches: list(itertools.islice(data, count))"
        )
    if hasattr(data, "__next__"):
        raise InputTypeError(
            f"data is a {type(data).__name__}, which can be read only once; "
            f"pass list(data), or a DataLoader; list(itertools.islice(data, count)) if it has no "
            f"end"
        )
    if isinstance(data, Dataset):
        raise InputTypeError(
            f"data is a dataset ({type(data).__name__}), which yields single samples; "
            f"wrap it in a DataLoader"
        )
    if isinstance(data, (Tensor, str, bytes)) or not hasattr(data, "__iter__"):
        raise InputTypeError(f"data must be {FORMS}, got {type(data).__name__}")
