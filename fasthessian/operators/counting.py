"""How many terms a loss has in each part of the data, found out from the loss itself.

Torch's own criteria say how they reduce. For every other loss, a model's own or a function, each
part is evaluated once: the graph holds the number that its sum over terms is divided by
(``denominators``). One batch is cut in two besides: the gradient of the whole is the weighted mean
of those of the halves, or their sum, and only the right weights make them equal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasthessian.memory import out_of_memory
from fasthessian.operators.batches import Batch, cut, mapped, samples
from fasthessian.operators.denominators import denominators

TRIALS = 4  # batches that are cut in two at most
SAME = 1e-6  # relative; a denominator in float32 against a number of entries
SHARP = {torch.float64: 1e-5, torch.float32: 1e-4}  # some losses are float32 in every model
SUM = "sum"
SAMPLES = "samples"
LABELS = "valid entries of labels"
Key = int | str  # a summand of the loss by its denominator; a number by its words; SUM


class Count(NamedTuple):
    """How the terms of each part are counted."""

    words: str | None  # a key of ``counters``, or SUM; None: by the graph alone
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
    -100 are ignored) or not NaN, those that are not 0 (masks, padding), all; of a second dimension
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
    "nonzero ": lambda t: float(t.count_nonzero()),
    "": lambda t: float(t.numel()),
}


def numbers(batch: Batch, every: bool = True) -> dict[str, float]:
    """The ``counters``, counted."""
    return {name: count() for name, count in counters(batch, every).items()}


def _tensors(batch: Batch, every: bool) -> Iterator[tuple[str, Tensor]]:
    if isinstance(batch, Mapping):
        named = list(batch.items())
        named.sort(key=lambda item: item[0] != "labels")
        every |= "labels" not in batch
    else:
        named = [("the targets", batch[-1])]
        named += [(f"input {i}", item) for i, item in enumerate(batch[:-1])]
    for name, item in named if every else named[:1]:
        if isinstance(item, Tensor) and item.layout is torch.strided and item.dim() > 0:
            yield str(name), item


class Seen(NamedTuple):
    """What is known of one part."""

    values: dict[Key, float]
    loss: float


class Trials:
    """Batches cut in two, and how well each way to count explains their gradients."""

    def __init__(
        self,
        gradient: Callable[[Batch], tuple[Sequence[Tensor], list[float]]],
        sharp: float,
        allowed: float,
    ) -> None:
        self._gradient, self.sharp, self._allowed = gradient, sharp, allowed
        self._left = TRIALS
        self._first: Seen | None = None
        self.fits: dict[Key, float] = {}  # the largest relative miss of each way to count

    def consider(self, batch: Batch, seen: Seen) -> None:
        """Cut the batch in two, if it can tell more than those before it."""
        if not (self._left and seen.loss and math.isfinite(seen.loss)):
            return
        if self._first is not None:
            kept = [key for key in self.survivors() if key in seen.values]
            ratios = [seen.values[key] / (self._first.values[key] or math.nan) for key in kept]
            if not ratios or max(ratios) - min(ratios) <= SAME * abs(ratios[0]):
                return
        self._left -= 1
        try:
            found = self._misses(batch)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if out_of_memory(error):
                raise
            return  # half of the batch is no batch of this model
        if self._first is None:
            self._first, self.fits = seen, found
        else:
            self.fits = {key: max(self.fits[key], found[key]) for key in self.fits if key in found}

    def survivors(self) -> list[Key]:
        """The ways to count that explain the gradients to rounding, or else nearly."""
        best = min(self.fits.values(), default=math.inf)
        most = min(self._allowed, max(10 * best, self.sharp))
        return [key for key, miss in self.fits.items() if miss <= most]

    def _misses(self, batch: Batch) -> dict[Key, float]:
        count = samples(batch)
        pieces = list(cut(batch, (count + 1) // 2)) if count > 1 else [batch, batch]
        whole = batch if count > 1 else twice(batch)
        made = [self._gradient(each) for each in (whole, *pieces)]
        gram = inner_products([gradient for gradient, _ in made])
        of_all: list[dict[Key, float]] = [
            {**dict(enumerate(found)), **numbers(each, every=False)}
            for each, (_, found) in zip((whole, *pieces), made, strict=True)
        ]
        misses = {SUM: miss(gram, [1.0, 1.0])}
        for key, total in of_all[0].items():
            if total > 0 and all(key in each for each in of_all):
                misses[key] = miss(gram, [each[key] / total for each in of_all[1:]])
        return misses


def twice(batch: Batch) -> Batch:
    """The batch with each of its samples a second time."""
    count = samples(batch)

    def doubled(item: Any) -> Any:
        long = isinstance(item, Tensor) and item.dim() > 0 and len(item) == count
        return torch.cat([item, item]) if long else item

    return mapped(batch, doubled)


def inner_products(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """g_i'g_j in float64."""
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for pieces in zip(*gradients, strict=True):
        rows = torch.stack([piece.flatten() for piece in pieces]).double()
        total += (rows @ rows.T).cpu()
    return total


def miss(gram: Tensor, shares: Sequence[float]) -> float:
    """|g_0 - sum_i shares_i g_i| over sum_i shares_i |g_i|, from the inner products."""
    weights = torch.tensor([1.0, *(-share for share in shares)], dtype=torch.float64)
    used = weights != 0  # the mean over no term at all is NaN
    gram, weights = gram[used][:, used], weights[used]
    square = float(weights @ gram @ weights)
    size = float(weights[1:].abs() @ gram.diagonal()[1:].clamp(min=0).sqrt())
    size = size or float(gram[0, 0].clamp(min=0).sqrt())
    return math.sqrt(max(square, 0.0)) / size if size else 0.0


def decide(parts: Iterable[Batch], evaluate: Callable[[Batch], Tensor], trials: Trials) -> Count:
    """How the loss counts its terms, from one evaluation of each part and a few of halves.

    Raises:
        ValueError: it cannot be told, and it makes a difference.
    """
    every: list[Seen] = []
    found: list[dict[str, float]] = []
    for batch in parts:
        loss = evaluate(batch)
        value, branches = float(loss.detach()), denominators(loss)
        del loss  # the graph, before halves are evaluated
        few = numbers(batch, every=False)
        found.append(numbers(batch))
        every.append(Seen({**dict(enumerate(branches)), **few, SUM: 1.0}, value))
        trials.consider(batch, every[-1])
    common = [key for key in every[0].values if all(key in seen.values for seen in every)]
    read = [key for key in common if isinstance(key, int)]
    left = [key for key in trials.survivors() if key in common]
    note = ""
    if not trials.fits:
        note = "weights of batches not verified, as none could be cut in two"
        ones = all(seen.values[0] == 1 for seen in every) if read else False
        left = [SUM] if ones and max(each[SAMPLES] for each in found) > 1 else read
    elif not left or trials.fits[left[0]] > trials.sharp:
        left = left or sorted(read, key=lambda key: trials.fits.get(key, math.inf))[:1]
        left = left or [next((key for key in common if key == LABELS), SAMPLES)]
        note = (
            f"weights of batches not exact, as halves of a batch make up its gradient to "
            f"{trials.fits.get(left[0], math.nan):.1e} only"
        )
    if SUM in left:
        return Count(SUM, values=[1.0] * len(every), note=note)
    branch = next((key for key in left if isinstance(key, int)), None)
    if branch is not None:
        values = [seen.values[branch] for seen in every]
        even = SAMPLES in left or not trials.fits
        uneven = not (even and _proportional(values, [each[SAMPLES] for each in found]))
        return Count(_named(values, found, every), branch, values, note, uneven)
    left = left or [key for key in common if key != SUM]
    rows = [[seen.values[key] for seen in every] for key in left]
    if not all(_proportional(row, rows[0]) for row in rows):
        raise ValueError(
            f"weights must be given: the loss does not tell whether it is a mean over "
            f"{left[0]} or {left[-1]}, which differ between batches; pass weights=lambda batch: "
            f"<its number of terms>, or all data as one batch"
        )
    return Count(str(left[0]), values=rows[0], note=note)


def _named(
    values: Sequence[float], found: Sequence[dict[str, float]], every: Sequence[Seen]
) -> str | None:
    """The number of entries that is the denominator of each part, or goes with it."""
    told = [i for i, seen in enumerate(every) if seen.loss and math.isfinite(seen.loss)]
    want = [values[i] for i in told]
    rows = {
        name: [found[i][name] for i in told]
        for name in found[0]
        if all(name in each for each in found)
    }
    for name, row in rows.items():
        if all(abs(a - b) <= SAME * a for a, b in zip(row, want, strict=True)):
            return name
    return next((name for name, row in rows.items() if _proportional(row, want)), None)


def _proportional(row: Sequence[float], other: Sequence[float]) -> bool:
    """Whether both give the same shares of their sums."""
    a, b = sum(row) or 1.0, sum(other) or 1.0
    return all(abs(x / a - y / b) <= SAME * (x / a) for x, y in zip(row, other, strict=True))
