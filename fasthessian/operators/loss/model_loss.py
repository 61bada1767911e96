"""The loss of a model over data, as a weighted sum of parts: one part per batch or microbatch.

The weight of a part is its number of terms divided by the total (see ``terms``). So batches of
different sizes give the same loss as one batch of all data.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian.distributed.ranks import ALONE, Ranks
from fasthessian.errors import InputError, InputTypeError
from fasthessian.memory import out_of_memory
from fasthessian.operators.loss.batches import Batch, check_batch, cut, samples, size, to_device
from fasthessian.operators.loss.calls import (
    call,
    call_with_model,
    explanation,
    loss_of,
    scalar,
    takes_model,
    without_loss,
)
from fasthessian.operators.loss.counting import find_rule, totals, ways_to_count
from fasthessian.operators.loss.coupling import Coupling, coupling
from fasthessian.operators.loss.denominators import denominators
from fasthessian.operators.loss.halving import ROUNDING, Gradient, HalvingTrials
from fasthessian.operators.loss.model_checks import check_modules
from fasthessian.operators.loss.part import Part
from fasthessian.operators.loss.sources import LoaderSource, MemorySource, source
from fasthessian.operators.loss.terms import NO_TERMS, Terms
from fasthessian.operators.torch_state.gathered import WHOLE, Gathered, shifted
from fasthessian.operators.torch_state.gradient_hooks import active_hooks
from fasthessian.operators.torch_state.module_state import own_buffers, training
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

STEP = 1e-2  # how far moved parameters are moved, relative to their root mean square


class ModelLoss:
    """The loss of a model over data.

    Args:
        model, criterion, data, weights, mode, microbatch, gathered: see ``Hessian``, ``Gathered``.
        like: a parameter, whose device and dtype the loss has.
        ordered: whether a loader must yield the samples in the same order at every pass.
        scaled: whether a matrix depends on the number of terms even if there is a single part.
        ranks: the ranks that share the data; each of them has its own, possibly none.

    Attributes:
        terms_here: the number of terms, or the sum of the given weights, in the data of this rank.
        samples: the number of samples there.
    """

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
        ranks: Ranks = ALONE,
        gathered: Gathered = WHOLE,
    ) -> None:
        if criterion is not None and not callable(criterion):
            raise InputTypeError(
                f"criterion must be callable or None, got {type(criterion).__name__}"
            )
        if criterion is None:
            self.origin = "model"
        self.model, self.criterion, self.gathered = model, criterion, gathered
        self.takes_model = takes_model(criterion)  # the criterion is a loss of (model, batch)
        self._form = ""  # how the loss is found in what the model returns, if that is a guess
        self.microbatch = microbatch
        self._device, self._dtype, self._mode = like.device, like.dtype.to_real(), mode
        check_modules(model, mode, microbatch)
        self.roots = [root for root in (model, criterion) if isinstance(root, nn.Module)]
        self.terms = Terms(criterion, weights)
        self._ranks, self._scaled = ranks, scaled or ranks.size > 1
        self.terms_here, self._parts_before, self._samples_before = 0.0, 0, 0
        self._evaluated = False  # whether the first evaluation succeeded
        # batch statistics, dropout masks and given weights depend on order and batches
        ordered |= mode == "train" or self.terms.given is not None
        tensors = isinstance(data, list) and all(isinstance(item, Tensor) for item in data)
        many = self.takes_model and tensors and not self._is_batch(data)
        self._source: MemorySource | LoaderSource = source(
            data, ordered, self.takes_model, many, ranks
        )
        self.fixed_order = self._source.fixed_order
        self.survey()

    def _is_batch(self, batch: Batch) -> bool:
        """Whether the loss takes this list of tensors as one batch; if not, it is several."""
        with training(self.roots, "eval"), self.gathered.place(), torch.no_grad():
            try:
                self.loss_in_any_mode(0, batch)
            except Exception as error:
                if out_of_memory(error):
                    raise
                return False
            return True

    def survey(self) -> None:
        """Make one pass over the data: check the batches, count the terms by the criterion."""
        self.terms.rule, self.terms.given_per_chunk = None, True
        self.size, self.samples, index, counts, total = 0, 0, -1, [], 0.0
        self._source.restart()
        with closing(self._chunks()) as chunks:
            for number, weight, count, batch in chunks:
                total += weight if number > index else 0.0
                index = number
                counts.append(count)
                self.size += size(batch)
                self.samples += samples(batch)
        if not (counts or self._ranks):
            raise InputError("data is empty: it yielded no batch")
        given = self.terms.given
        self.terms.check_length(index + 1)
        enough = len(counts) == 1 and total > 0 if given is None else self.terms.given_per_chunk
        self.counted = self.terms.known or (enough and not self._scaled) or not counts
        if self.counted or given is not None:
            self._set_counts(counts, total)

    def _set_counts(self, counts: Sequence[float], total: float) -> None:
        if total <= 0 and not self._ranks:
            raise InputError(NO_TERMS)
        self.terms_here, self.count = total, sum(count > 0 for count in counts)
        self.set_share(total)

    def set_share(self, terms: float, parts: int = 0, samples: int = 0) -> None:
        """See ``Loss``. If the loss is a sum, its parts have the weight 1."""
        self._total = 1.0 if self.terms.summed and self.terms.given is None else terms or 1.0
        self._parts_before, self._samples_before = parts, samples

    @property
    def way_to_count(self) -> str:
        """See ``Loss``."""
        return self.terms.way if self.count and self.terms.given is None else ""

    def totals(self, ways: Sequence[str]) -> list[float]:
        """See ``Loss``."""
        with closing(self._chunks()) as chunks:
            return totals((batch for *_, batch in chunks), ways)

    def count_terms(self, params: Sequence[Tensor], allowed: float) -> None:
        """Count the terms by the loss itself, unless the numbers are known; see ``counting``.

        This costs one evaluation of each part, and two gradients of each of a few batches.
        Gradients count as equal if their relative difference is at most ``allowed``.
        """
        if self.terms.known or not self.size:
            return

        def gradient(batch: Batch, moved: bool) -> Gradient:
            pieces, found = self.gradient(batch, params, moved)
            return pieces, ways_to_count(batch, found)

        trials = HalvingTrials(gradient, max(ROUNDING[self._dtype], allowed / 10), allowed)
        with closing(self._chunks()) as chunks:
            parts = (batch for *_, batch in chunks)
            rule = find_rule(parts, self.loss_in_any_mode, trials)
        self.terms.rule = rule
        if rule.counter is None:
            self._source.require_order()  # the numbers belong to the batches of this pass
        self._set_counts(
            rule.values, sum(rule.values) if self.terms.given is None else self.terms_here
        )
        self.counted = True  # last, so that an interrupted count is repeated

    @property
    def note(self) -> str:
        """What is guessed about the loss, for ``engine``; empty if nothing is."""
        rule = self.terms.rule
        return "; ".join(filter(None, (self._form, rule.note if rule else "")))

    @property
    def terms_vary(self) -> bool:
        """Whether the numbers of terms may change with the parameters."""
        return self.terms.rule is not None and self.terms.rule.counter is None

    def terms_of(self, part: Part, loss: Tensor) -> float:
        """The number of terms of a part that has this loss."""
        return self.terms.number(part.batch, denominators(loss))

    def gradient(
        self, batch: Batch, params: Sequence[Tensor], moved: bool = False
    ) -> tuple[Sequence[Tensor], list[float]]:
        """The gradient of the loss of a batch, and the loss's denominators.

        It is taken in eval mode, since no two batches have the same dropout masks. If the model has
        no loss in eval mode, as a detector, its own modules are in training mode. If ``moved``, the
        parameters are moved a little, so that no gradient is 0 by chance.
        """
        try:
            return self._gradient(batch, params, moved, "eval")
        except Exception as error:
            if self._mode == "eval" or out_of_memory(error):
                raise
        return self._gradient(batch, params, moved, "own")

    def loss_in_any_mode(self, place: int, batch: Batch) -> Tensor:
        """The loss of a batch with the flags as they are; if that fails, in mode "own"."""
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
        """Inside, the model has full parameters; its ``roots`` are protected elsewhere."""
        return self.gathered.place()

    def _gradient(
        self, batch: Batch, params: Sequence[Tensor], moved: bool, mode: str
    ) -> tuple[Sequence[Tensor], list[float]]:
        with training(self.roots, mode), shifted(params, STEP * moved, self.gathered):
            loss = self.evaluate(Part(0, 1.0, batch, 0))[1]
            found = denominators(loss)  # before autograd frees the graph
            pieces = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            return [real(piece) for piece in pieces], found

    def batches(self) -> Generator[tuple[int, Batch], None, None]:
        """(index, batch) of all batches whose weight is not 0."""
        with closing(self._source.one_pass()) as batches:
            for index, batch in enumerate(batches):
                if self.terms.given is None or self.terms.weight(index, batch):
                    yield index, batch

    def entries(self, whole: bool) -> Iterator[Entry]:
        """What the loss depends on; if not ``whole``, only parameters, buffers and batches."""
        seen: set[int] = set()
        yield from self.gathered.entries(seen)
        yield from module_entries("model", self.model, POINT, seen, whole)
        if isinstance(self.criterion, nn.Module):
            yield from module_entries("criterion", self.criterion, DATA, seen, whole)
        yield from self._source.entries(whole, seen)
        if whole:
            yield from reachable("criterion", self.criterion, OTHER, seen)
            if callable(self.terms.given):
                yield from reachable("weights", self.terms.given, OTHER, seen)

    def named_parameters(self) -> dict[str, Tensor]:
        """The model's parameters as they are now."""
        return self.gathered.replaced(dict(self.model.named_parameters()))

    def _chunks(self) -> Generator[tuple[int, float, float, Batch], None, None]:
        """(index of the batch, its weight, the microbatch's weight, microbatch) over one pass."""
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
        """The parts of one pass over the data, except those without a term of the loss."""
        position, first = itertools.count(), self._samples_before
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

        ``values`` replace the parameters of these names.
        """
        batch = to_device(part.batch, self._device)
        evaluation = call_with_model if self.takes_model else call
        try:
            with (
                seeded(self._parts_before + part.position),
                own_buffers(self.roots),
                active_hooks(),
            ):
                outputs, returned = evaluation(self.model, self.criterion, batch, values)
        except Exception as error:
            skip = self._evaluated or out_of_memory(error)
            better = None if skip else explanation(error, batch, self._dtype)
            if better is None:
                raise
            raise better from error
        from_criterion = self.criterion is not None and not self.takes_model
        loss, names = loss_of(returned, from_criterion)
        if loss is None and not from_criterion:
            raise InputError(without_loss(returned, self.takes_model))
        self._form = f"the loss is the sum of {', '.join(map(repr, names))}" if names else ""
        self._evaluated = True
        return outputs, scalar(loss, self.origin)
