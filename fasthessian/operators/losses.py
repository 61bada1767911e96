"""The loss as a weighted sum of parts: one part per batch, or one closure.

A mean over the data is the mean over the terms of the loss, not over batches: the weight of a
batch is its number of terms over the total, so ragged batches give what one batch would.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from fasthessian.memory import out_of_memory
from fasthessian.operators.batches import (
    Batch,
    Memory,
    Stream,
    check_batch,
    cut,
    leaves,
    samples,
    size,
    source,
    to_device,
)
from fasthessian.operators.counting import SAME, SHARP, SUM, Count, Trials, decide
from fasthessian.operators.criteria import call, is_torchs, option, scalar, terms
from fasthessian.operators.denominators import denominators
from fasthessian.operators.state import own_buffers, seeded, training

REPEATED = 1e-3  # relative; two evaluations of one loss differ by rounding only
ROUNDED = 2e-2  # the same for a loss that is computed in 16 bits


class Part(NamedTuple):
    """One summand of the loss."""

    position: int  # position in the pass; seeds the random numbers of the forward pass
    weight: float
    batch: Batch
    size: int  # numbers in the batch
    first: int = 0  # samples before it in the pass


class ModelLoss:
    """The loss of a model over data."""

    origin = "criterion"

    def __init__(
        self,
        model: nn.Module,
        criterion: Any,
        data: Any,
        weights: Any,
        mode: str,
        like: Tensor,
        microbatch: int | None = None,
        ordered: bool = False,
        scaled: bool = False,
    ) -> None:
        if criterion is not None and not callable(criterion):
            raise TypeError(f"criterion must be callable or None, got {type(criterion).__name__}")
        if criterion is None:
            self.origin = "model"
        self.model, self.criterion = model, criterion
        self.microbatch = microbatch
        self._device, self._dtype = like.device, like.dtype
        for name, module in model.named_modules():
            coupling = mode == "train" or getattr(module, "running_mean", None) is None
            if microbatch is not None and isinstance(module, _BatchNorm) and coupling:
                raise ValueError(
                    f"microbatch must be None for this model: {name!r} normalises over the batch; "
                    f"use mode='eval', or batches that fit"
                )
            if getattr(module, "max_norm", None) is not None:
                raise ValueError(
                    f"model has {name!r} with max_norm, which rewrites its weight in the forward "
                    f"pass; set its max_norm to None"
                )
            if getattr(module, "sparse", False) and isinstance(
                module, (nn.Embedding, nn.EmbeddingBag)
            ):
                raise ValueError(
                    f"model has {name!r} with sparse gradients, which have no second derivative; "
                    f"set its sparse to False"
                )
        self.roots = [root for root in (model, criterion) if isinstance(root, nn.Module)]
        self._weights = _checked(weights)
        self._scaled = scaled  # whether a sum and a mean differ for a single part, too
        self._fits = False  # until the first batch went through
        # batch statistics, dropout masks and given weights depend on the order and the batching
        ordered |= mode == "train" or self._weights is not None
        self._source: Memory | Stream = source(data, ordered)
        self.replayable = self._source.replayable
        self.survey()

    def survey(self) -> None:
        """One pass over the data: check the batches, count the terms as the targets have them."""
        self._way: Count | None = None
        self.size, index, counts, total = 0, -1, [], 0.0
        with closing(self._chunks()) as chunks:
            for number, weight, count, batch in chunks:
                total += weight if number > index else 0.0
                index = number
                counts.append(count)
                self.size += size(batch)
        if not counts:
            raise ValueError("data is empty: it yielded no batch")
        if isinstance(self._weights, list) and len(self._weights) != index + 1:
            raise ValueError(
                f"weights must have one entry per batch ({index + 1}), got {len(self._weights)}"
            )
        self._take(counts, total)
        alone = len(counts) == (1 if self._weights is None else index + 1) and not self._scaled
        self.counted = alone or is_torchs(self.criterion)
        self.note = ""
        self.token = self._token()

    def _take(self, counts: Sequence[float], total: float) -> None:
        if total <= 0:
            raise ValueError("data holds no term of the loss: every target is ignored")
        self._total = 1.0 if self.summed and self._weights is None else total
        self.count = sum(count > 0 for count in counts)

    @property
    def summed(self) -> bool:
        """Whether the loss is a sum over its terms, and not their mean."""
        if self._way is None:
            return bool(option(self.criterion, "reduction") == "sum")
        return self._way.words == SUM

    @property
    def uneven(self) -> bool:
        """Whether some samples are known to have more terms than others."""
        return self._way is not None and self._way.uneven

    def terms_of(self, part: Part, loss: Tensor) -> float:
        """The number of terms of a part whose loss is this."""
        return self._number(part.batch, denominators(loss))

    def count_terms(self, params: Sequence[Tensor], rounded: bool) -> None:
        """Count the terms by the loss itself where the criterion does not say; see ``counting``.

        Costs one evaluation of each part, and three gradients or a few more.
        """
        if self.counted:
            return
        allowed = ROUNDED if rounded else REPEATED
        sharp = allowed if rounded else SHARP[self._dtype]
        trials = Trials(lambda batch: self._gradient(batch, params), sharp, allowed)
        with closing(self._chunks()) as chunks:
            parts = (batch for *_, batch in chunks)
            way = decide(parts, lambda batch: self.evaluate(Part(0, 1.0, batch, 0))[1], trials)
        self._way, self.note, self.counted = way, way.note, True
        if way.words is None:
            self._source.order()  # no other pass has the same batches
        self._take(way.values, self._total if self._weights is not None else sum(way.values))

    def _gradient(
        self, batch: Batch, params: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], list[float]]:
        """The gradient of a batch in eval mode (of dropout no two batches have the same masks)."""
        with training(self.roots, False):
            loss = self.evaluate(Part(0, 1.0, batch, 0))[1]
            found = denominators(loss)
            return torch.autograd.grad(
                loss, params, allow_unused=True, materialize_grads=True
            ), found

    def changed(self) -> bool:
        """Whether data in memory, or what weighs its terms, changed since the last survey."""
        return self._token() != self.token

    def _token(self) -> tuple[Any, ...]:
        weight = option(self.criterion, "weight")
        held = tuple(weight.tolist()) if isinstance(weight, Tensor) else None
        how = tuple(option(self.criterion, name) for name in ("reduction", "ignore_index"))
        return self._source.token(), held, how

    def padded(self) -> Iterator[tuple[str, int, bool]]:
        """Embeddings with a ``padding_idx``, whose row torch leaves out of gradients.

        (name, row, whether another module has the same weight).
        """
        uses = Counter(id(p) for m in self.model.modules() for p in m._parameters.values())
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                row = module.padding_idx
                if row is not None:
                    yield name, row, uses[id(module.weight)] > 1

    def named(self) -> dict[str, Tensor]:
        """The model's parameters now."""
        return dict(self.model.named_parameters())

    def watched(self) -> list[Tensor]:
        """Tensors on which the graphs depend: parameters and buffers, also frozen ones."""
        return [t for root in self.roots for t in (*root.parameters(), *root.buffers())]

    def _weight(self, index: int, batch: Batch) -> float:
        """The weight of a whole batch, as the user says."""
        if isinstance(self._weights, list):
            value = self._weights[index] if index < len(self._weights) else 0.0
        else:
            value = float(cast("Callable[[Batch], float]", self._weights)(batch))
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"weights must be finite and not negative, got {value} for batch {index}"
            )
        return value

    def _counts(self, batch: Batch, chunks: Sequence[Batch]) -> list[float] | None:
        """The numbers of terms of the chunks of a batch by the given weights, if they add up."""
        if self.summed or not callable(self._weights):
            return None
        counts = [float(self._weights(chunk)) for chunk in chunks]
        whole = float(self._weights(batch))
        return counts if abs(sum(counts) - whole) <= SAME * abs(whole) else None

    def _number(self, batch: Batch, found: Sequence[float] = (), position: int = -1) -> float:
        """The number of terms of a batch: by its place in the pass, or by its own ``found``."""
        if self._way is None:
            return terms(self.criterion, batch)
        if self._way.words is None and position >= 0:
            values = self._way.values
            return values[position] if position < len(values) else 0.0
        return self._way.of(batch, found)

    def _chunks(self) -> Generator[tuple[int, float, float, Batch], None, None]:
        """(index of a batch, its weight, that of a microbatch, microbatch) over one pass."""
        position = itertools.count()
        with closing(self._source.one_pass()) as batches:
            for index, batch in enumerate(batches):
                check_batch(batch, self.criterion is not None)
                chunks = list(cut(batch, self.microbatch))
                counts = [self._number(chunk, position=next(position)) for chunk in chunks]
                together = sum(counts)
                if self._weights is None:
                    weight = together
                else:
                    weight = self._weight(index, batch)
                    counts = self._counts(batch, chunks) or counts
                    together = 1.0 if self.summed else sum(counts) or 1.0
                    if len(chunks) == 1:
                        counts, together = [1.0], 1.0
                    counts = [weight * count / together for count in counts]
                for count, chunk in zip(counts, chunks, strict=True):
                    yield index, weight, count, chunk

    def parts(self) -> Generator[Part, None, None]:
        """One pass over the data; batches without a term of the loss are left out."""
        position, first = itertools.count(), 0
        with closing(self._chunks()) as chunks:
            for _, _, count, batch in chunks:
                weight = count / self._total
                if weight > 0:
                    yield Part(next(position), weight, batch, size(batch), first)
                first += samples(batch)

    def coupling(self, params: Sequence[Tensor]) -> tuple[float, int]:
        """Relative change of a batch's gradient when it is cut into microbatches, or in two.

        The largest over the batches that can be cut, and its index; NaN if there is none.
        """
        largest = (math.nan, -1)
        with closing(self._source.one_pass()) as batches:
            for index, batch in enumerate(batches):
                chunks = list(cut(batch, self.microbatch or (samples(batch) + 1) // 2))
                if len(chunks) > 1 and (self._weights is None or self._weight(index, batch)):
                    change = self._change(batch, chunks, params)
                    if not change <= largest[0]:
                        largest = change, index
        return largest

    def _change(self, batch: Batch, chunks: Sequence[Batch], params: Sequence[Tensor]) -> float:
        """How far the gradient of a batch is from what its chunks make up."""
        whole, found = self._gradient(batch, params)
        if not self._number(batch, found):
            return 0.0
        counts, together, total, sizes = self._counts(batch, chunks), None, 0.0, 0.0
        for place, chunk in enumerate(chunks):
            pieces, found = self._gradient(chunk, params)
            count = counts[place] if counts else self._number(chunk, found)
            if count:  # the mean over no term is NaN
                total += count
                sizes += count * _norm(pieces)
                scaled = [count * piece for piece in pieces]
                together = (
                    [a + b for a, b in zip(together, scaled, strict=True)] if together else scaled
                )
        total = 1.0 if self.summed else total
        gap = _norm([a - b / total for a, b in zip(whole, together or whole, strict=True)])
        return gap / (sizes / total or 1.0)

    def evaluate(
        self, part: Part, values: Mapping[str, Tensor] | None = None
    ) -> tuple[Any, Tensor]:
        """The model's outputs and the scalar loss of one part, with their graph.

        ``values`` take the place of the parameters of these names.
        """
        batch = to_device(part.batch, self._device)
        model: Callable[..., Any] = self.model
        if values is not None:
            replaced = dict(values)

            def model(*inputs: Any, **named: Any) -> Any:
                return functional_call(self.model, replaced, inputs, named)

        try:
            with seeded(part.position), own_buffers(self.roots):
                outputs, loss = call(model, self.criterion, batch)
        except TypeError as error:
            if self.criterion is None:
                error = TypeError(f"{error}; criterion is None, so the model gets the whole batch")
            raise TypeError(f"data does not fit the model and criterion: {error}") from error
        except RuntimeError as error:
            held = {t.dtype for t in leaves(batch) if t.is_floating_point()}
            if "type" in str(error) and held - {self._dtype}:
                raise TypeError(
                    f"data holds {', '.join(map(str, held))} but the parameters are "
                    f"{self._dtype}; convert one of them ({str(error).splitlines()[0]})"
                ) from error
            if self._fits or out_of_memory(error):
                raise
            raise ValueError(
                f"data does not fit the model and criterion: {str(error).splitlines()[0]}"
            ) from error
        except IndexError as error:
            raise ValueError(f"data does not fit the model and criterion: {error}") from error
        self._fits = True
        return outputs, scalar(loss, self.origin)


class ClosureLoss:
    """A loss given by a function without arguments: a single part."""

    origin = "closure"
    replayable = True
    size = count = 1
    note = ""

    def __init__(self, closure: Callable[[], Tensor], params: dict[str, Tensor]) -> None:
        if not callable(closure):
            raise TypeError(f"closure must be callable, got {type(closure).__name__}")
        self._closure, self._params = closure, params
        self.roots: list[nn.Module] = []

    def survey(self) -> None:
        """Nothing to count."""

    def count_terms(self, params: Sequence[Tensor], rounded: bool) -> None:
        """Nothing to count."""

    def changed(self) -> bool:
        """A closure's data cannot be watched."""
        return False

    def named(self) -> dict[str, Tensor]:
        """The tensors given as ``params``."""
        return self._params

    def watched(self) -> list[Tensor]:
        """The tensors given as ``params``; others that the closure reads are unknown."""
        return list(self._params.values())

    def parts(self) -> Generator[Part, None, None]:
        """The one part."""
        yield Part(0, 1.0, None, 1)

    def evaluate(
        self, part: Part, values: Mapping[str, Tensor] | None = None
    ) -> tuple[Any, Tensor]:
        """No outputs, and the closure's loss with its graph."""
        with seeded(part.position):
            return None, scalar(self._closure(), self.origin)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def _checked(weights: Any) -> list[float] | Callable[[Batch], float] | None:
    """None for "auto", or the weights in the form that was given."""
    if isinstance(weights, str) and weights == "auto":
        return None
    if callable(weights):
        checked: Callable[[Batch], float] = weights
        return checked
    try:
        return [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise TypeError(
            f"weights must be 'auto', a sequence of numbers or a callable of a batch, "
            f"got {weights!r:.80}"
        ) from None
