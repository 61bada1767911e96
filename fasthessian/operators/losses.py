"""The loss as a weighted sum of parts: one part per batch, or one closure.

A mean over the data is the mean over the terms of the loss, not over batches: the weight of a
batch is its number of terms over the total, so ragged batches give what one batch would.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

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
from fasthessian.operators.criteria import call, option, scalar, terms
from fasthessian.operators.hooks import acting
from fasthessian.operators.state import own_buffers, seeded
from fasthessian.operators.watch import DATA, OTHER, POINT, Entry, of_module, reach

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
        self._fits = False  # until the first batch went through
        # batch statistics, dropout masks and given weights depend on the order and the batching
        ordered |= mode == "train" or self._weights is not None
        self._source: Memory | Stream = source(data, ordered)
        self.replayable = self._source.replayable
        self.survey()

    def survey(self) -> None:
        """One pass over the data: check the batches, count the terms."""
        counts, self.size, index, total = [], 0, -1, 0.0
        self._source.restart()
        with closing(self._chunks()) as chunks:
            for number, weight, share, batch in chunks:
                total += weight if number > index else 0.0
                index = number
                counts.append(weight * share)
                self.size += size(batch)
        if not counts:
            raise ValueError("data is empty: it yielded no batch")
        if isinstance(self._weights, list) and len(self._weights) != index + 1:
            raise ValueError(
                f"weights must have one entry per batch ({index + 1}), got {len(self._weights)}"
            )
        if total <= 0:
            raise ValueError("data holds no term of the loss: every target is ignored")
        summed = self._weights is None and option(self.criterion, "reduction") == "sum"
        self._total = 1.0 if summed else total
        self.count = sum(count > 0 for count in counts)

    def entries(self, whole: bool) -> Iterator[Entry]:
        """What the loss depends on; see ``watch``."""
        seen: set[int] = set()
        yield from of_module("model", self.model, POINT, seen, whole)
        if isinstance(self.criterion, nn.Module):
            yield from of_module("criterion", self.criterion, DATA, seen, whole)
        yield from self._source.entries(whole, seen)
        if whole:
            yield from reach("criterion", self.criterion, OTHER, seen)
            if callable(self._weights):
                yield from reach("weights", self._weights, OTHER, seen)

    def named(self) -> dict[str, Tensor]:
        """The model's parameters now."""
        return dict(self.model.named_parameters())

    def _weight(self, index: int, batch: Batch) -> float:
        """The weight of a whole batch: its number of terms, or what the user says."""
        if self._weights is None:
            return terms(self.model, self.criterion, batch)
        if isinstance(self._weights, list):
            value = self._weights[index] if index < len(self._weights) else 0.0
        else:
            value = float(self._weights(batch))
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"weights must be finite and not negative, got {value} for batch {index}"
            )
        return value

    def _cut(self, batch: Batch, most: int | None) -> list[tuple[float, Batch]]:
        """(share of the weight of the batch, microbatch): of a sum each has it all."""
        chunks = list(cut(batch, most))
        if len(chunks) == 1:
            return [(1.0, batch)]
        whole = terms(self.model, self.criterion, batch) or 1.0
        return [(terms(self.model, self.criterion, chunk) / whole, chunk) for chunk in chunks]

    def _chunks(self) -> Generator[tuple[int, float, float, Batch], None, None]:
        """(index and weight of the batch, share of it, microbatch), over one pass of the data."""
        with closing(self._source.one_pass()) as batches:
            for index, batch in enumerate(batches):
                check_batch(batch, self.criterion is not None)
                weight = self._weight(index, batch)
                for share, chunk in self._cut(batch, self.microbatch):
                    yield index, weight, share, chunk

    def parts(self) -> Generator[Part, None, None]:
        """One pass over the data; batches without a term of the loss are left out."""
        position, first = itertools.count(), 0
        with closing(self._chunks()) as chunks:
            for _, whole, share, batch in chunks:
                weight = whole * share / self._total
                if weight > 0:
                    yield Part(next(position), weight, batch, size(batch), first)
                first += samples(batch)

    def coupling(self) -> float:
        """Relative change of a batch's loss when it is cut into microbatches, or in two.

        That of the first batch which can be cut; NaN if there is none.
        """
        with closing(self._source.one_pass()) as batches:
            for index, batch in enumerate(batches):
                most = self.microbatch or max(1, samples(batch) // 2)
                chunks = self._cut(batch, most)
                if len(chunks) == 1 or not self._weight(index, batch):
                    continue

                def loss_of(part: Batch) -> float:  # a model may differentiate inside
                    return float(self.evaluate(Part(0, 1.0, part, 0))[1].detach())

                whole = loss_of(batch)  # and the mean over no term at all is NaN
                together = sum(share * loss_of(chunk) for share, chunk in chunks if share)
                return abs(together - whole) / (abs(whole) or 1.0)
        return math.nan

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
            with seeded(part.position), own_buffers(self.roots), acting():
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

    def __init__(self, closure: Callable[[], Tensor], params: dict[str, Tensor]) -> None:
        if not callable(closure):
            raise TypeError(f"closure must be callable, got {type(closure).__name__}")
        self._closure, self._params = closure, params
        self.roots: list[nn.Module] = []

    def survey(self) -> None:
        """Nothing to count."""

    def entries(self, whole: bool) -> Iterator[Entry]:
        """The tensors given as ``params``, and what can be reached from the closure."""
        for name, tensor in self._params.items():
            yield f"parameter {name!r}", tensor, POINT
        if whole:
            seen = {id(tensor) for tensor in self._params.values()}
            yield from reach("closure", self._closure, OTHER, seen)

    def named(self) -> dict[str, Tensor]:
        """The tensors given as ``params``."""
        return self._params

    def parts(self) -> Generator[Part, None, None]:
        """The one part."""
        yield Part(0, 1.0, None, 1)

    def evaluate(
        self, part: Part, values: Mapping[str, Tensor] | None = None
    ) -> tuple[Any, Tensor]:
        """No outputs, and the closure's loss with its graph."""
        with seeded(part.position), acting():
            return None, scalar(self._closure(), self.origin)


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
