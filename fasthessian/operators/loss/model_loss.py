"""The loss as a weighted sum of parts: one part per batch, or one closure.

A mean over the data is the mean over the terms of the loss, not over batches: the weight of a
batch is its number of terms over the total, so ragged batches give what one batch would.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasthessian.errors import InputError, InputTypeError
from fasthessian.memory import out_of_memory
from fasthessian.operators.loss.batches import Batch, check_batch, cut, samples, size, to_device
from fasthessian.operators.loss.calls import (
    call,
    call_whole,
    explained,
    loss_of,
    scalar,
    takes_model,
    without_loss,
)
from fasthessian.operators.loss.counting import decide, keyed
from fasthessian.operators.loss.coupling import Coupling, coupling
from fasthessian.operators.loss.denominators import denominators
from fasthessian.operators.loss.halving import SHARP, Gradient, HalvingTrials
from fasthessian.operators.loss.sources import LoaderSource, Memory, source
from fasthessian.operators.loss.terms import Terms
from fasthessian.operators.torch_state.gradient_hooks import active_hooks
from fasthessian.operators.torch_state.module_state import own_buffers, shifted, training
from fasthessian.operators.torch_state.random_state import seeded
from fasthessian.operators.torch_state.reachable import (
    DATA,
    OTHER,
    POINT,
    Entry,
    module_entries,
    reachable,
)
from fasthessian.operators.torch_state.scopes import Scope
from fasthessian.vectors import real

REPEATED = 1e-3  # relative; two evaluations of one loss differ by rounding only
ROUNDED = 2e-2  # the same for a loss that is computed in 16 bits
MOVED = 1e-2  # a step of parameters over their root mean square


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
    freed_graph_advice = (
        "the model frees its graph where it differentiates inside; if it keeps it in "
        "training (create_graph=self.training) use mode='train', else let it create_graph"
    )

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
            raise InputTypeError(
                f"criterion must be callable or None, got {type(criterion).__name__}"
            )
        if criterion is None:
            self.origin = "model"
        self.model, self.criterion = model, criterion
        self.takes_model = takes_model(criterion)  # criterion is a loss of (model, batch)
        self._form = ""  # how the loss is made of the outputs, if that is a guess
        self.microbatch = microbatch
        self._device, self._dtype, self._mode = like.device, like.dtype.to_real(), mode
        for name, module in model.named_modules():
            coupling = mode == "train" or getattr(module, "running_mean", None) is None
            if microbatch is not None and isinstance(module, _BatchNorm) and coupling:
                raise InputError(
                    f"microbatch must be None for this model: {name!r} normalises over the batch; "
                    f"use mode='eval', or batches that fit"
                )
            if getattr(module, "max_norm", None) is not None:
                raise InputError(
                    f"model has {name!r} with max_norm, which rewrites its weight in the forward "
                    f"pass; set its max_norm to None"
                )
            if getattr(module, "sparse", False) and isinstance(
                module, (nn.Embedding, nn.EmbeddingBag)
            ):
                raise InputError(
                    f"model has {name!r} with sparse gradients, which have no second derivative; "
                    f"set its sparse to False"
                )
        self.roots = [root for root in (model, criterion) if isinstance(root, nn.Module)]
        self.terms = Terms(criterion, weights)
        self._scaled = scaled  # whether a sum and a mean differ for a single part, too
        self._fits = False  # until the first batch went through
        # batch statistics, dropout masks and given weights depend on the order and the batching
        ordered |= mode == "train" or self.terms.given is not None
        many = self.takes_model and _tensors(data) and not self._serves(data)
        self._source: Memory | LoaderSource = source(data, ordered, self.takes_model, many)
        self.fixed_order = self._source.fixed_order
        self.survey()

    def _serves(self, batch: Batch) -> bool:
        """Whether a list of tensors is a batch of the loss, as loaders yield them, or several."""
        with training(self.roots, "eval"), torch.no_grad():
            try:
                self._either(0, batch)
            except Exception as error:
                if out_of_memory(error):
                    raise
                return False
            return True

    def survey(self) -> None:
        """One pass over the data: check the batches, count the terms as the criterion says."""
        self.terms.way, self.terms.told_all = None, True
        self.size, index, counts, total = 0, -1, [], 0.0
        self._source.restart()
        with closing(self._chunks()) as chunks:
            for number, weight, count, batch in chunks:
                total += weight if number > index else 0.0
                index = number
                counts.append(count)
                self.size += size(batch)
        if not counts:
            raise InputError("data is empty: it yielded no batch")
        given = self.terms.given
        if isinstance(given, list) and len(given) != index + 1:
            raise InputError(
                f"weights must have one entry per batch ({index + 1}), got {len(given)}"
            )
        enough = len(counts) == 1 and total > 0 if given is None else self.terms.told_all
        self.counted = self.terms.known or (enough and not self._scaled)
        if self.counted or given is not None:
            self._take(counts, total)

    def _take(self, counts: Sequence[float], total: float) -> None:
        if total <= 0:
            raise InputError("data holds no term of the loss: every target is ignored")
        self._total = 1.0 if self.terms.summed and self.terms.given is None else total
        self.count = sum(count > 0 for count in counts)

    def count_terms(self, params: Sequence[Tensor], allowed: float) -> None:
        """Count the terms by the loss itself; see ``counting``.

        Costs one evaluation of each part, and two gradients of each of a few batches. Gradients
        that differ by no more than ``allowed``, relative, count as equal.
        """
        if self.terms.known:
            return

        def gradient(batch: Batch, moved: bool) -> Gradient:
            pieces, found = self.gradient(batch, params, moved)
            return pieces, keyed(batch, found)

        trials = HalvingTrials(gradient, max(SHARP[self._dtype], allowed / 10), allowed)
        with closing(self._chunks()) as chunks:
            parts = (batch for *_, batch in chunks)
            way = decide(parts, self._either, trials)
        self.terms.way = way
        if way.words is None:
            self._source.order()  # no other pass has the same batches
        self._take(way.values, sum(way.values) if self.terms.given is None else self._total)
        self.counted = True  # last: an interrupted count is made anew

    @property
    def note(self) -> str:
        """What is guessed."""
        way = self.terms.way
        return "; ".join(filter(None, (self._form, way.note if way else "")))

    @property
    def terms_vary(self) -> bool:
        """Whether the numbers of terms may depend on the parameters."""
        return self.terms.way is not None and self.terms.way.words is None

    def terms_of(self, part: Part, loss: Tensor) -> float:
        """The number of terms of a part whose loss is this."""
        return self.terms.number(part.batch, denominators(loss))

    def gradient(
        self, batch: Batch, params: Sequence[Tensor], moved: bool = False
    ) -> tuple[Sequence[Tensor], list[float]]:
        """The gradient of the loss of a batch, and its denominators.

        In eval mode, since no two batches have the same dropout masks; where a model has no loss
        then, as detectors, with its own modules in training. Those ``moved`` are at parameters a
        little off, where no gradient is 0 by chance.
        """
        try:
            return self._gradient(batch, params, moved, "eval")
        except Exception as error:
            if self._mode == "eval" or out_of_memory(error):
                raise
        return self._gradient(batch, params, moved, "own")

    def _either(self, place: int, batch: Batch) -> Tensor:
        """The loss of a batch as the flags are, or else as in ``gradient``."""
        part = Part(place, 1.0, batch, 0)
        try:
            return self.evaluate(part)[1]
        except Exception as error:
            if self._mode == "eval" or out_of_memory(error):
                raise
        with training(self.roots, "own"):
            return self.evaluate(part)[1]

    def coupling(self, params: Sequence[Tensor], allowed: float) -> Coupling:
        """See ``coupling.coupling``."""
        return coupling(self, params, allowed)

    def protected(self) -> Scope[None]:
        """A scope that does nothing: only the ``roots`` need protection."""
        return Scope(lambda undo: None)

    def varies(self, batch: Batch) -> bool:
        """Whether the loss of a batch depends on the random numbers that it draws."""
        with torch.no_grad():
            first, other = (float(self._either(place, batch)) for place in (0, 1))
        return abs(first - other) > REPEATED * abs(first)

    def _gradient(
        self, batch: Batch, params: Sequence[Tensor], moved: bool, mode: str
    ) -> tuple[Sequence[Tensor], list[float]]:
        with training(self.roots, mode), shifted(params, MOVED if moved else 0.0):
            loss = self.evaluate(Part(0, 1.0, batch, 0))[1]
            found = denominators(loss)  # before the graph is freed
            pieces = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            return [real(piece) for piece in pieces], found

    def batches(self) -> Generator[tuple[int, Batch], None, None]:
        """(index, batch) of those that have a weight."""
        with closing(self._source.one_pass()) as batches:
            for index, batch in enumerate(batches):
                if self.terms.given is None or self.terms.weight(index, batch):
                    yield index, batch

    def entries(self, whole: bool) -> Iterator[Entry]:
        """What the loss depends on; see ``watch``."""
        seen: set[int] = set()
        yield from module_entries("model", self.model, POINT, seen, whole)
        if isinstance(self.criterion, nn.Module):
            yield from module_entries("criterion", self.criterion, DATA, seen, whole)
        yield from self._source.entries(whole, seen)
        if whole:
            yield from reachable("criterion", self.criterion, OTHER, seen)
            if callable(self.terms.given):
                yield from reachable("weights", self.terms.given, OTHER, seen)

    def named_parameters(self) -> dict[str, Tensor]:
        """The model's parameters now."""
        return dict(self.model.named_parameters())

    def _chunks(self) -> Generator[tuple[int, float, float, Batch], None, None]:
        """(index of a batch, its weight, that of a microbatch, microbatch) over one pass."""
        position = 0
        with closing(self._source.one_pass()) as batches:
            for index, batch in enumerate(batches):
                if not self.takes_model:
                    check_batch(batch, self.criterion is not None)
                chunks = list(cut(batch, self.microbatch))
                weight, counts = self.terms.of_chunks(index, batch, chunks, position)
                position += len(chunks)
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

    def evaluate(
        self, part: Part, values: Mapping[str, Tensor] | None = None
    ) -> tuple[Any, Tensor]:
        """The model's outputs and the scalar loss of one part, with their graph.

        ``values`` take the place of the parameters of these names.
        """
        batch = to_device(part.batch, self._device)
        called = call_whole if self.takes_model else call
        try:
            with seeded(part.position), own_buffers(self.roots), active_hooks():
                outputs, returned = called(self.model, self.criterion, batch, values)
        except Exception as error:
            known = self._fits or out_of_memory(error)
            better = None if known else explained(error, batch, self._dtype)
            if better is None:
                raise
            raise better from error
        alone = self.criterion is not None and not self.takes_model
        loss, names = loss_of(returned, alone)
        if loss is None and not alone:
            raise InputError(without_loss(returned, self.takes_model))
        self._form = f"the loss is the sum of {', '.join(map(repr, names))}" if names else ""
        self._fits = True
        return outputs, scalar(loss, self.origin)


def _tensors(data: Any) -> bool:
    return isinstance(data, list) and all(isinstance(item, Tensor) for item in data)
