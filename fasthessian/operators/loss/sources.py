"""Where batches come from: memory, or a loader that is read again at each product.

A loader may yield other samples each time: random augmentation, sampling. Products of such data
would belong to different losses. So each pass is compared with the first one by a `Fingerprint`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from fasthessian.distributed.ranks import ALONE, Ranks
from fasthessian.errors import InputError, InputTypeError, UnsupportedError
from fasthessian.operators.loss.batches import Batch, cut, is_object, leaves, samples
from fasthessian.operators.torch_state.random_state import seeded
from fasthessian.operators.torch_state.reachable import DATA, OTHER, Entry, reachable

FORMS = (
    "a batch (inputs, targets), a mapping, an object with .to, a list of batches, or a DataLoader"
)
CHANGED = "data yields different batches at each pass"  # the first words of that error


class MemorySource:
    """One batch, or the user's list of batches, in the same order at every pass."""

    fixed_order = True

    def __init__(self, data: Any, many: bool) -> None:
        self._data, self._many = data, many

    def one_pass(self) -> Generator[Batch, None, None]:
        """Yield every batch."""
        yield from self._data if self._many else [self._data]

    def require_order(self) -> None:
        """Do nothing: the order never changes."""

    def restart(self) -> None:
        """Do nothing: a pass is not compared with others."""

    def entries(self, whole: bool, seen: set[int]) -> Iterator[Entry]:
        """Everything that the batches hold; see ``reachable``."""
        return reachable("data", self._data, DATA, seen)


class LoaderSource:
    """A re-iterable such as a DataLoader, checked to yield the same samples at every pass.

    The global random generators get another seed for each pass, so that random augmentation is
    detected. The order of the samples is free, unless ``ordered``. After ``most`` samples a pass
    ends.
    """

    fixed_order = False

    def __init__(self, loader: Iterable[Batch], ordered: bool, most: int | None = None) -> None:
        self._loader, self._most = loader, most
        self._ordered = ordered
        self._passes = 0
        self._first: Fingerprint | None = None

    def one_pass(self) -> Generator[Batch, None, None]:
        """Yield every batch, and at the end compare this pass with the first one.

        Raises:
            RuntimeError: the samples differ from those of the first pass.
        """
        self._passes += 1
        seen = Fingerprint()
        owners = (self._loader, *(getattr(self._loader, key, None) for key in _SAMPLERS))
        generators = {id(g): g for owner in owners if (g := getattr(owner, "generator", None))}
        with seeded(self._passes, list(generators.values())):
            whole = self._most is None
            for batch in self._loader if whole else first_samples(self._loader, self._most or 0):
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

    def require_order(self) -> None:
        """From now on every pass must yield the same batches in the same order."""
        self._ordered = True

    def restart(self) -> None:
        """Take the next pass as the first one."""
        self._first = None

    def entries(self, whole: bool, seen: set[int]) -> Iterator[Entry]:
        """What the dataset holds in memory: kept graphs depend on it; see ``reachable``."""
        dataset = getattr(self._loader, "dataset", self._loader)
        return reachable("data.dataset", dataset, OTHER, seen) if whole else iter(())


_SAMPLERS = ("sampler", "batch_sampler")


class Fingerprint:
    """Sums over all samples, in float64, by which two passes are compared.

    Each sample is projected onto a random direction. The sum of the projections and the sum of
    their squares do not depend on the order of the samples or on the batches. The squares show if
    targets were exchanged between samples. A third sum depends on the order too.
    """

    def __init__(self) -> None:
        self._count = 0
        self._sums = [0.0, 0.0, 0.0]
        self._batches = 0

    def add(self, batch: Batch) -> None:
        """Add one batch."""
        self._batches += 1
        by_length: dict[int, Tensor] = {}
        for salt, tensor in enumerate(leaves(batch)):
            if tensor.numel() == 0:
                continue
            rows = tensor.detach().reshape(tensor.shape[0] if tensor.dim() else 1, -1)
            rows = (torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows).double()
            # masks and missing targets: replaced by numbers, since NaN does not equal itself
            rows = rows.nan_to_num(nan=1.1, posinf=1.3, neginf=-1.7)
            seen = rows @ _direction(rows.shape[1], salt).to(rows.device)
            by_length[len(seen)] = by_length.get(len(seen), 0) + seen.cpu()
        for length, p in by_length.items():
            self._count += length
            self._sums[0] += float(p.sum())
            self._sums[1] += float(p @ p)
            self._sums[2] += self._batches * float(p.sum())

    def matches(self, other: Fingerprint, ordered: bool) -> bool:
        """Whether both have the same samples to rounding, and if ``ordered`` in the same order."""
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
    # The generator draws one number after another, so the directions of two lengths begin alike:
    # the projection of a sample does not change if it is padded with zeros.
    generator = torch.Generator().manual_seed(salt)
    return torch.rand(length, generator=generator, dtype=torch.float64) - 0.5


def source(
    data: Any,
    ordered: bool,
    takes_model: bool = False,
    many: bool = False,
    ranks: Ranks = ALONE,
) -> MemorySource | LoaderSource:
    """Recognise the form of ``data``.

    For a loss of (model, batch), which ``takes_model``, a tensor is one batch, and so is an object
    that cannot be iterated. A list of tensors is one batch, unless ``many``. One of several
    ``ranks`` may have an empty list.

    Raises:
        TypeError: a one-shot iterator, a Dataset, or no known form.
        ValueError: an empty list.
    """
    if isinstance(data, list):
        if not (data or ranks):
            raise InputError(f"data is an empty list; pass {FORMS}")
        return MemorySource(data, many or not (data and isinstance(data[0], Tensor)))
    one = isinstance(data, (Mapping, tuple))
    # graphs have .to and are iterable; so are loaders that hold a dataset
    one |= is_object(data) and not hasattr(data, "dataset")
    one |= takes_model and (isinstance(data, Tensor) or not hasattr(data, "__iter__"))
    if one and not (isinstance(data, Dataset) or hasattr(data, "__next__")):
        return MemorySource(data, False)
    _check_iterable(data)
    return LoaderSource(data, ordered, own_samples(data, ranks))


def first_samples(batches: Iterable[Batch], most: int) -> Iterator[Batch]:
    """The batches up to ``most`` samples in all; the last one is cut."""
    for batch in batches:
        if most <= 0:
            return
        count = samples(batch)
        yield next(cut(batch, most)) if count > most else batch
        most -= count


def own_samples(loader: Any, ranks: Ranks) -> int | None:
    """How many samples of this rank's pass are not repetitions; None if all of them.

    ``torch.utils.data.DistributedSampler`` deals out the samples in turn, and repeats the first
    ones at the end, so that all ranks get the same number.

    Raises:
        ValueError: the sampler deals the samples out to other ranks than the group has.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return None
    if (sampler.num_replicas, sampler.rank) != (ranks.size, ranks.rank):
        raise InputError(
            f"data has a DistributedSampler for rank {sampler.rank} of {sampler.num_replicas}, but "
            f"group makes this rank {ranks.rank} of {ranks.size}; pass the group to both"
        )
    count = len(sampler.dataset)  # type: ignore[arg-type]
    own = -(-(count - sampler.rank) // sampler.num_replicas)
    return max(own, 0) if own < len(sampler) else None


def _check_iterable(data: Any) -> None:
    """Raise TypeError unless the data can be read again and again."""
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
