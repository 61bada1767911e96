"""How many terms a loss has in each part of the data, found out from the loss itself.

Torch's own criteria say how they reduce. For every other loss, a model's own or a function, each
part is evaluated once: the graph holds the number that its sum over terms is divided by
(``denominators``). A few batches are cut in two besides, as ``HalvingTrials``: the gradient of the whole
is the weighted mean of those of the halves, or their sum, for the right weights only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasthessian.errors import InputError
from fasthessian.operators.loss.batches import Batch, is_sequence, leaves, samples
from fasthessian.operators.loss.denominators import denominators
from fasthessian.operators.loss.halving import SAME, SAMPLES, SUM, HalvingTrials, Key, Numbers

LABELS = "valid entries of labels"


class Count(NamedTuple):
    """How the terms of each part are counted."""

    words: str | None  # a name of ``counters``, or SUM; None: by the graph alone
    branch: int = 0  # the summand of the loss whose denominator counts
    values: Sequence[float] = ()  # the number of terms of each part
    note: str = ""  # what is guessed
    uneven: bool = False  # whether samples are known to differ in their number of terms

    def of(self, batch: Batch, found: Sequence[float]) -> float:
        """The number of terms of a batch whose loss has the denominators ``found``."""
        if self.words == SUM:
            return 1.0
        if self.words is not None:
            return counters(batch)[self.words]()
        return found[self.branch] if self.branch < len(found) else math.nan


def counters(batch: Batch, every: bool = True) -> dict[str, Callable[[], float]]:
    """What can be counted in a batch, by name, the likelier first.

    Entries of the targets, or of ``every`` tensor: those that are not negative (labels of -1 or
    -100 are ignored) or not NaN, all, those that are not 0 (masks, padding); of a second dimension
    also from the second entry on, as a language model predicts them.
    """
    found: dict[str, Callable[[], float]] = {}
    for name, tensor in _tensors(batch, every):
        shifted = [(f"{name} from the second on", tensor[:, 1:])] if tensor.dim() > 1 else []
        for place, view in [(name, tensor), *shifted]:
            for adjective, count in _COUNTS.items():
                found[f"{adjective}entries of {place}"] = functools.partial(count, view)
    found[SAMPLES] = lambda: float(samples(batch))
    return found


def _valid(t: Tensor) -> float:
    real = t.is_floating_point() or t.is_complex()
    return float((~t.isnan() if real else t >= 0).sum())


_COUNTS: dict[str, Callable[[Tensor], float]] = {
    "valid ": _valid,
    "": lambda t: float(t.numel()),
    "nonzero ": lambda t: float(t.count_nonzero()),
}


def numbers(batch: Batch, every: bool = True) -> dict[str, float]:
    """The ``counters``, counted."""
    return {name: count() for name, count in counters(batch, every).items()}


def keyed(batch: Batch, found: Sequence[float]) -> Numbers:
    """All ways to count the terms of a batch whose loss has the denominators ``found``."""
    ways: Numbers = {SUM: 1.0}
    ways.update(enumerate(found))
    ways.update(numbers(batch, every=False))
    return ways


def _tensors(batch: Batch, every: bool) -> Iterator[tuple[str, Tensor]]:
    if isinstance(batch, Mapping):
        named = sorted(batch.items(), key=lambda item: item[0] != "labels")
        every |= "labels" not in batch
    elif not is_sequence(batch):
        named, every = [("the batch", [*leaves(batch)])], True
    else:
        named = [("the targets", batch[-1])]
        named += [(f"input {i}", item) for i, item in enumerate(batch[:-1])]
    for name, item in named if every else named[:1]:
        yield from _inside(str(name), item)


def _inside(name: str, item: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(item, Tensor):
        if item.layout is torch.strided and item.dim() > 0:
            yield name, item
    elif isinstance(item, (Mapping, tuple, list)):
        pairs = item.items() if isinstance(item, Mapping) else enumerate(item)
        for key, value in pairs:
            yield from _inside(f"{name}[{key!r}]", value)


class _Seen(NamedTuple):
    """What is known of one part."""

    values: Numbers  # ways that a loss may count
    every: dict[str, float]  # numbers of the batch, to name the one that is the denominator
    branches: Sequence[float]
    told: bool  # whether its loss is finite and not 0


def decide(
    parts: Iterable[Batch], evaluate: Callable[[int, Batch], Tensor], trials: HalvingTrials
) -> Count:
    """How the loss counts its terms, from one evaluation of each part and the trials.

    Raises:
        ValueError: it cannot be told, or no weights are right, and it makes a difference.
    """
    every: list[_Seen] = []
    for place, batch in enumerate(parts):
        loss = evaluate(place, batch)
        value, branches = float(loss.detach()), denominators(loss)
        del loss  # the graph, before halves are evaluated
        if math.isinf(value):
            raise InputError(
                f"the loss is {value} (batch {place} of data): as it divides by 0 there, pass all "
                f"data as one batch; or check the parameters, the inputs and the targets"
            )
        told = value != 0 and not math.isnan(value)
        every.append(_Seen(keyed(batch, branches), numbers(batch), branches, told))
        if not math.isnan(value):
            trials.consider(batch, every[-1].values)
    common = [key for key in every[0].values if all(key in seen.values for seen in every)]
    left, note = _left(every, common, trials)
    if SUM in left:
        return Count(SUM, values=[1.0] * len(every), note=note)
    branch = next((key for key in left if isinstance(key, int)), None)
    if branch is not None:
        _check_summands(every, branch)
        values = [seen.values[branch] for seen in every]
        even = SAMPLES in left or not trials.fits
        uneven = not (even and proportional(values, [seen.every[SAMPLES] for seen in every]))
        words = _named(values, every, left, trials)
        if words is not None:  # which may be in proportion only
            values = [seen.every[words] for seen in every]
        return Count(words, branch, values, note, uneven)
    rows = [[seen.values[key] for seen in every] for key in left]
    for key, row in zip(left, rows, strict=True):
        if not proportional(row, rows[0]):
            raise InputError(
                f"weights must be given: the loss does not tell whether it is a mean over "
                f"{left[0]} or {key}, which differ between batches; pass weights=lambda batch: "
                f"<its number of terms>, or all data as one batch"
            )
    return Count(str(left[0]), values=rows[0], note=note)


def _left(
    every: Sequence[_Seen], common: Sequence[Key], trials: HalvingTrials
) -> tuple[Sequence[Key], str]:
    """The ways to count that are left, never none, and what is guessed about them."""
    read = [key for key in common if isinstance(key, int)]
    ones = read and all(seen.values[0] == 1 for seen in every)
    summed: list[Key] = [SUM] if ones and max(seen.every[SAMPLES] for seen in every) > 1 else []
    if not trials.fits:
        note = "weights of batches not verified, as none could be cut in two"
        return summed or [*read] or [key for key in common if key != SUM], note
    left: list[Key] = [key for key in trials.survivors() if key in common]
    if left and trials.fits[left[0]] <= trials.sharp:
        return left, ""
    if not left:
        ranked = sorted(read, key=lambda key: trials.fits.get(key, math.inf))
        left = summed or [*ranked[:1]] or [LABELS if LABELS in common else SAMPLES]
    miss = trials.fits.get(left[0], math.nan)
    return left, (
        f"weights of batches not exact, as halves of a batch make up its gradient to {miss:.1e} "
        f"only"
    )


def _check_summands(every: Sequence[_Seen], branch: int) -> None:
    """Raise ValueError if summands of the loss are means over numbers that no weights fit.

    A summand of the same denominator in all parts is a term of the parameters: the trials tell.
    """
    alike = len({len(seen.branches) for seen in every}) == 1
    fixed = set.intersection(*(set(seen.branches) for seen in every))
    rows = list(zip(*(seen.branches for seen in every), strict=True)) if alike else []
    for seen in every:
        own = seen.branches[branch]
        for place, value in enumerate(seen.branches):
            if abs(value - own) <= SAME * own or value in fixed:
                continue
            if not (alike and proportional(rows[place], rows[branch])):
                raise InputError(
                    f"weights must be given: the loss adds means over different numbers of terms "
                    f"({own:g} and {value:g} in one batch), whose ratio differs between batches; "
                    f"pass all data as one batch without microbatch, or weights=lambda batch: "
                    f"<its share>"
                )


def _named(
    values: Sequence[float], every: Sequence[_Seen], left: Sequence[Key], trials: HalvingTrials
) -> str | None:
    """The number of entries that is the denominator of each part, or in proportion to it.

    Proportion says nothing of a single part, and where the trials exclude this way to count.
    """
    told = [i for i, seen in enumerate(every) if seen.told]
    want = [values[i] for i in told]
    rows = {
        name: [every[i].every[name] for i in told]
        for name in every[0].every
        if all(name in seen.every for seen in every)
    }
    for name, row in rows.items():
        # where halves make up a gradient exactly, other ways to count agree by chance
        excluded = (
            name in trials.fits
            and name not in left
            and trials.fits.get(left[0], math.inf) <= trials.sharp
        )
        if not excluded and all(abs(a - b) <= SAME * a for a, b in zip(row, want, strict=True)):
            return name
    for name, row in rows.items():
        likely = name in left if name in trials.fits else len(told) > 1
        if likely and proportional(row, want):
            return name
        other = [i for i, (a, b) in enumerate(zip(row, want, strict=True)) if abs(a - b) > SAME * a]
        if other and max(row) > 1 and not any(row[i] for i in other):
            raise InputError(
                f"data must be one batch: the loss is divided by the number of {name}, except in "
                f"batch {told[other[0]]}, which has none and a loss that is not 0"
            )
    return None


def proportional(row: Sequence[float], other: Sequence[float]) -> bool:
    """Whether both give the same shares of their sums."""
    a, b = sum(row) or 1.0, sum(other) or 1.0
    return all(abs(x / a - y / b) <= SAME * (x / a) for x, y in zip(row, other, strict=True))
