"""How many terms a loss has in each part of the data, found out from the loss itself.

Torch's own criteria say how they reduce. Any other loss, a model's own or a function, is evaluated
once per part. The graph shows what its sum over terms is divided by (``denominators``). That is
compared with what can be counted in the batch (``counters``), such as the valid entries of the
targets: a number that is counted serves later batches too, without a graph. The candidates must
also explain the gradients of a few batches that are cut in two (``halving``).
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


class CountingRule(NamedTuple):
    """How the terms of each part are counted."""

    counter: str | None  # a name of ``counters``, or SUM; None: only the graph tells
    summand: int = 0  # the summand of the loss whose denominator counts
    values: Sequence[float] = ()  # the number of terms of each part
    note: str = ""  # what is guessed, for ``engine``
    uneven: bool = False  # whether samples are known to differ in their number of terms

    def of(self, batch: Batch, found: Sequence[float]) -> float:
        """The number of terms of a batch whose loss has the denominators ``found``."""
        if self.counter == SUM:
            return 1.0
        if self.counter is not None:
            return counters(batch)[self.counter]()
        return found[self.summand] if self.summand < len(found) else math.nan


def counters(batch: Batch, all_tensors: bool = True) -> dict[str, Callable[[], float]]:
    """What can be counted in a batch, by name, the most likely first.

    In the targets or, with ``all_tensors``, in every tensor: the valid entries (not negative, since
    labels of -1 or -100 are ignored, and not NaN), all entries, and those that are not 0 (masks,
    padding). The same without the first entry of the second dimension, which a language model does
    not predict. And the samples.
    """
    found: dict[str, Callable[[], float]] = {}
    for name, tensor in _tensors(batch, all_tensors):
        views = [(name, tensor)]
        if tensor.dim() > 1:
            views.append((f"{name} from the second on", tensor[:, 1:]))
        for label, view in views:
            for adjective, count in _COUNTS.items():
                found[f"{adjective}entries of {label}"] = functools.partial(count, view)
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


def counted(batch: Batch, all_tensors: bool = True) -> dict[str, float]:
    """The numbers that the ``counters`` give."""
    return {name: count() for name, count in counters(batch, all_tensors).items()}


def totals(batches: Iterable[Batch], ways: Sequence[str]) -> list[float]:
    """The numbers of terms of all batches by each of the ``counters``; NaN for an unknown one."""
    sums = [0.0] * len(ways)
    for batch in batches:
        numbers = counted(batch)
        for i, way in enumerate(ways):
            sums[i] += numbers.get(way, math.nan)
    return sums


def ways_to_count(batch: Batch, found: Sequence[float]) -> Numbers:
    """All ways to count the terms of a batch whose loss has the denominators ``found``."""
    ways: Numbers = {SUM: 1.0}
    ways.update(enumerate(found))
    ways.update(counted(batch, all_tensors=False))
    return ways


def _tensors(batch: Batch, all_tensors: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch by name, the targets first; only these unless ``all_tensors``."""
    if isinstance(batch, Mapping):
        named = sorted(batch.items(), key=lambda item: item[0] != "labels")
        all_tensors |= "labels" not in batch
    elif not is_sequence(batch):
        named, all_tensors = [("the batch", [*leaves(batch)])], True
    else:
        named = [("the targets", batch[-1])]
        named += [(f"input {i}", item) for i, item in enumerate(batch[:-1])]
    for name, item in named if all_tensors else named[:1]:
        yield from _inside(str(name), item)


def _inside(name: str, item: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(item, Tensor):
        if item.layout is torch.strided and item.dim() > 0:
            yield name, item
    elif isinstance(item, (Mapping, tuple, list)):
        pairs = item.items() if isinstance(item, Mapping) else enumerate(item)
        for key, value in pairs:
            yield from _inside(f"{name}[{key!r}]", value)


class _Part(NamedTuple):
    """What is known of one part of the data."""

    numbers: Numbers  # its number of terms by each way to count
    counted: dict[str, float]  # what can be counted in all of its tensors
    denominators: Sequence[float]  # of the summands of its loss
    informative: bool  # whether its loss is neither 0 nor NaN


def find_rule(
    batches: Iterable[Batch], evaluate: Callable[[int, Batch], Tensor], trials: HalvingTrials
) -> CountingRule:
    """How the loss counts its terms, from one evaluation of each part and the trials.

    Raises:
        ValueError: the candidates that are left differ, or no weights are right.
    """
    parts: list[_Part] = []
    for place, batch in enumerate(batches):
        loss = evaluate(place, batch)
        value, divisors = float(loss.detach()), denominators(loss)
        del loss  # free its graph before halves are evaluated
        if math.isinf(value):
            raise InputError(
                f"the loss is {value} (batch {place} of data): as it divides by 0 there, pass all "
                f"data as one batch; or check the parameters, the inputs and the targets"
            )
        informative = value != 0 and not math.isnan(value)
        parts.append(_Part(ways_to_count(batch, divisors), counted(batch), divisors, informative))
        if not math.isnan(value):
            trials.consider(batch, parts[-1].numbers)
    common = [key for key in parts[0].numbers if all(key in part.numbers for part in parts)]
    left, note = _remaining(parts, common, trials)
    if SUM in left:
        return CountingRule(SUM, values=[1.0] * len(parts), note=note)
    summand = next((key for key in left if isinstance(key, int)), None)
    if summand is not None:
        _check_summands(parts, summand)
        values = [part.numbers[summand] for part in parts]
        even = SAMPLES in left or not trials.misses
        uneven = not (even and proportional(values, [part.counted[SAMPLES] for part in parts]))
        counter = _matching_counter(values, parts, left, trials)
        if counter is not None:  # its numbers may differ from the denominators by a factor
            values = [part.counted[counter] for part in parts]
        return CountingRule(counter, summand, values, note, uneven)
    rows = [[part.numbers[key] for part in parts] for key in left]
    for key, row in zip(left, rows, strict=True):
        if not proportional(row, rows[0]):
            raise InputError(
                f"weights must be given: the loss does not tell whether it is a mean over "
                f"{left[0]} or {key}, which differ between batches; pass weights=lambda batch: "
                f"<its number of terms>, or all data as one batch"
            )
    return CountingRule(str(left[0]), values=rows[0], note=note)


def _remaining(
    parts: Sequence[_Part], common: Sequence[Key], trials: HalvingTrials
) -> tuple[Sequence[Key], str]:
    """The candidates that are left, at least one, and a note on what is guessed about them."""
    read = [key for key in common if isinstance(key, int)]
    undivided = read and all(part.numbers[0] == 1 for part in parts)
    several = max(part.counted[SAMPLES] for part in parts) > 1
    summed: list[Key] = [SUM] if undivided and several else []
    if not trials.misses:
        note = "weights of batches not verified, as none could be cut in two"
        return summed or [*read] or [key for key in common if key != SUM], note
    left: list[Key] = [key for key in trials.survivors() if key in common]
    if left and trials.misses[left[0]] <= trials.rounding:
        return left, ""
    if not left:
        ranked = sorted(read, key=lambda key: trials.misses.get(key, math.inf))
        left = summed or [*ranked[:1]] or [LABELS if LABELS in common else SAMPLES]
    miss = trials.misses.get(left[0], math.nan)
    return left, (
        f"weights of batches not exact, as halves of a batch make up its gradient to {miss:.1e} "
        f"only"
    )


def _check_summands(parts: Sequence[_Part], summand: int) -> None:
    """Raise ValueError if summands of the loss are means over numbers that no weights fit.

    A summand with the same denominator in all parts is allowed: it may depend on the parameters
    alone, as a penalty does, and the trials decide about it.
    """
    alike = len({len(part.denominators) for part in parts}) == 1
    constant = set.intersection(*(set(part.denominators) for part in parts))
    rows = list(zip(*(part.denominators for part in parts), strict=True)) if alike else []
    for part in parts:
        own = part.denominators[summand]
        for place, value in enumerate(part.denominators):
            if abs(value - own) <= SAME * own or value in constant:
                continue
            if not (alike and proportional(rows[place], rows[summand])):
                raise InputError(
                    f"weights must be given: the loss adds means over different numbers of terms "
                    f"({own:g} and {value:g} in one batch), whose ratio differs between batches; "
                    f"pass all data as one batch without microbatch, or weights=lambda batch: "
                    f"<its share>"
                )


def _matching_counter(
    values: Sequence[float], parts: Sequence[_Part], left: Sequence[Key], trials: HalvingTrials
) -> str | None:
    """The counter that gives the denominator of each part, or numbers in proportion to it.

    Proportion proves nothing if there is a single part, or if the trials exclude the counter.
    """
    informative = [i for i, part in enumerate(parts) if part.informative]
    want = [values[i] for i in informative]
    rows = {
        name: [parts[i].counted[name] for i in informative]
        for name in parts[0].counted
        if all(name in part.counted for part in parts)
    }
    for name, row in rows.items():
        # if halves explain a gradient exactly, a counter that does not agrees by chance
        excluded = (
            name in trials.misses
            and name not in left
            and trials.misses.get(left[0], math.inf) <= trials.rounding
        )
        if not excluded and all(abs(a - b) <= SAME * a for a, b in zip(row, want, strict=True)):
            return name
    for name, row in rows.items():
        likely = name in left if name in trials.misses else len(informative) > 1
        if likely and proportional(row, want):
            return name
        other = [i for i, (a, b) in enumerate(zip(row, want, strict=True)) if abs(a - b) > SAME * a]
        if other and max(row) > 1 and not any(row[i] for i in other):
            raise InputError(
                f"data must be one batch: the loss is divided by the number of {name}, except in "
                f"batch {informative[other[0]]}, which has none and a loss that is not 0"
            )
    return None


def proportional(row: Sequence[float], other: Sequence[float]) -> bool:
    """Whether both give the same shares of their sums."""
    a, b = sum(row) or 1.0, sum(other) or 1.0
    return all(abs(x / a - y / b) <= SAME * (x / a) for x, y in zip(row, other, strict=True))
