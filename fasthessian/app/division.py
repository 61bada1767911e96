"""The data of a problem, divided over the ranks of a job."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from fasthessian.app.matrix import operator
from fasthessian.app.options import AnalysisOptions
from fasthessian.app.problems import Problem
from fasthessian.distributed.ranks import Group, Ranks, backend_of
from fasthessian.krylov.sharding import is_sharded
from fasthessian.operators.curvature import Curvature
from fasthessian.operators.loss.batches import Batch, is_object, items, piece, samples
from fasthessian.operators.loss.calls import takes_model
from fasthessian.operators.torch_state.random_state import seeded
from fasthessian.results.record import Record


@dataclasses.dataclass(frozen=True, eq=False)
class Distribution(Record):
    """How several ranks shared the work."""

    ranks: int
    backend: str  # of the process group
    division: str  # how the data were divided, in words
    # of each rank: batches (with --microbatch, their pieces), and terms of the loss
    batches: Annotated[tuple[int, ...], "ranks"]
    terms: Annotated[tuple[float, ...], "ranks"]
    sharded: bool  # whether the Lanczos vectors were split over the ranks


def distribution(
    A: Curvature, options: AnalysisOptions, group: Group, division: str
) -> Distribution:
    """How the ranks of ``group`` share the work on ``A``, whose data they divided in this way."""
    terms, batches = zip(*A._shares.of_ranks, strict=True)
    sharded, backend = is_sharded(A, options.sharded), backend_of(group)
    return Distribution(len(terms), backend, division, batches, terms, sharded)


def divided(problem: Problem, options: AnalysisOptions, ranks: Ranks) -> tuple[Problem, str]:
    """The problem with the data of this rank, and in words how the data were divided.

    Each rank calls it with all of the data, and gets about the same number of samples.

    * If the ranks have different data, or a DistributedSampler, these are their shares already.
    * Batches in memory are dealt out in order. If there are fewer than ranks, they are cut, unless
      their samples are coupled or the model is in training mode.
    * A DataLoader reads the batches of this rank alone. Of other loaders each rank takes every
      P-th batch, where P is the number of ranks.
    """
    data = problem.data
    if _is_dealt_out(data):
        return problem, "each rank has a DistributedSampler"
    if len(set(ranks.objects(ranks.together(lambda: _digest(data))))) > 1:
        return problem, "each rank brings data of its own"
    if not _is_in_memory(data):
        share, words = _of_loader(data, ranks)
    elif isinstance(data, list) and _is_batch(data) and takes_model(problem.criterion):
        share = data if ranks.rank == 0 else []
        words = "all on rank 0: a list of tensors may be one batch or several"
    else:
        batches = data if isinstance(data, list) and not _is_batch(data) else [data]
        share, words = _of_batches(batches, problem, options, ranks)
    return dataclasses.replace(problem, data=share), words


# what the data are


def _is_batch(data: Any) -> bool:
    """Whether a list is one batch, as loaders yield it."""
    return bool(data) and isinstance(data[0], Tensor)


def _is_in_memory(data: Any) -> bool:
    """Whether the data are a batch or a list of batches, not a loader."""
    one = isinstance(data, (list, tuple, Mapping, Tensor)) or not hasattr(data, "__iter__")
    return one or (is_object(data) and not hasattr(data, "dataset"))


def _is_dealt_out(data: Any) -> bool:
    sampler = getattr(data, "sampler", None)
    inner = getattr(getattr(data, "batch_sampler", None), "sampler", None)
    return isinstance(sampler, DistributedSampler) or isinstance(inner, DistributedSampler)


def _digest(data: Any) -> str:
    """A digest of the tensors: of all batches in memory, or of the first one of a loader."""
    if _is_in_memory(data):
        return digest(data)
    with seeded(0, _generators(data)):
        return digest(next(iter(data), None))


def digest(batch: Batch) -> str:
    """A digest of all tensors, numbers and texts in a batch, or in a list of batches."""
    state = hashlib.blake2b(digest_size=16)
    for item in items(batch):
        if isinstance(item, Tensor) and item.layout is torch.strided:
            rows = item.detach().cpu().contiguous().reshape(-1)
            state.update(f"{item.dtype} {tuple(item.shape)}".encode())
            state.update(rows.view(torch.uint8).numpy().tobytes())
        elif isinstance(item, (str, int, float)):
            state.update(repr(item).encode())
        else:
            state.update(type(item).__name__.encode())
    return state.hexdigest()


def _generators(loader: Any) -> list[torch.Generator]:
    owners = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    found = {id(g): g for owner in owners if (g := getattr(owner, "generator", None)) is not None}
    return list(found.values())


# batches in memory


def _of_batches(
    batches: list[Batch], problem: Problem, options: AnalysisOptions, ranks: Ranks
) -> tuple[list[Batch], str]:
    """The batches, or pieces of batches, of this rank."""
    sizes = [samples(batch) for batch in batches]
    reason = ""
    if len(batches) < ranks.size:
        reason = _obstacle(problem, options, sizes, ranks)
        if not reason:
            total = sum(sizes)
            low, high = (total * r // ranks.size for r in (ranks.rank, ranks.rank + 1))
            return list(_pieces(batches, sizes, low, high)), "batches cut into shares of samples"
    first, last = (_boundary(sizes, r, ranks.size) for r in (ranks.rank, ranks.rank + 1))
    words = f"whole batches, {len(batches)} in all"
    return batches[first:last], f"{words}, which are not cut: {reason}" if reason else words


def _boundary(sizes: list[int], rank: int, ranks: int) -> int:
    """How many batches come before a rank: so many that their samples are nearest to its share."""
    before = [0, *itertools.accumulate(sizes)]
    return min(range(len(before)), key=lambda i: (abs(before[i] * ranks - before[-1] * rank), -i))


def _pieces(batches: list[Batch], sizes: list[int], low: int, high: int) -> Iterator[Batch]:
    """The samples ``low`` to ``high`` of all batches."""
    before = 0
    for batch, count in zip(batches, sizes, strict=True):
        start, stop = max(low - before, 0), min(high - before, count)
        if start < stop:
            yield batch if stop - start == count else piece(batch, start, stop, count)
        before += count


def _obstacle(problem: Problem, options: AnalysisOptions, sizes: list[int], ranks: Ranks) -> str:
    """Why batches cannot be cut into the shares of the ranks; empty if they can."""
    if options.mode == "train":
        return "in training mode their samples may be coupled"
    most = -(-sum(sizes) // ranks.size)

    def refused() -> str:
        with warnings.catch_warnings():  # the operator of the shares repeats them
            warnings.simplefilter("ignore")
            try:  # an operator with microbatches tests whether samples are coupled
                operator(problem, dataclasses.replace(options, microbatch=most, check=False))
            except Exception as error:
                words = " ".join(str(error).split()) or type(error).__name__
                return words.partition(";")[0]  # the rest is advice about the option
        return ""

    reasons = [reason for reason in ranks.objects(refused()) if reason]
    return reasons[0] if reasons else ""


# loaders


class _Share:
    """The batches of indices of one rank, in an order that does not change.

    Each pass draws the order of all samples from the same seed: so the shares stay apart.
    """

    def __init__(self, batches: Any, generators: list[torch.Generator], ranks: Ranks) -> None:
        self._batches, self._generators = batches, generators
        count = len(batches)
        self._first, self._last = (count * r // ranks.size for r in (ranks.rank, ranks.rank + 1))

    def __len__(self) -> int:
        return self._last - self._first

    def __iter__(self) -> Iterator[list[int]]:
        with seeded(0, self._generators):
            every = list(self._batches)
        yield from every[self._first : self._last]


class _Every:
    """Every P-th batch of a loader."""

    def __init__(self, loader: Any, ranks: Ranks) -> None:
        self._loader, self._ranks = loader, ranks
        self.dataset = getattr(loader, "dataset", loader)

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(self._loader, self._ranks.rank, None, self._ranks.size)


def _of_loader(loader: Any, ranks: Ranks) -> tuple[Any, str]:
    """A loader of the batches of this rank."""
    plain = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
    if not plain or loader.batch_sampler is None:
        words = f"each rank takes one of every {ranks.size} batches of the loader"
        return _Every(loader, ranks), words
    share = _Share(loader.batch_sampler, _generators(loader), ranks)
    own: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_sampler=share,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
    return own, f"whole batches of the DataLoader, {len(loader.batch_sampler)} in all"
