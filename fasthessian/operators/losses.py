"""The loss as a weighted sum of parts: one part per batch, or one closure.

A mean over the data is the mean over the terms of the loss, not over batches: the weight of a
batch is its number of terms over the total, so ragged batches give what one batch would.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasthessian.operators.batches import (
    Batch,
    Memory,
    Stream,
    check_batch,
    leaves,
    samples,
    size,
    source,
    to_device,
)
from fasthessian.operators.state import own_buffers, seeded

IGNORED = -100  # what torch and Hugging Face leave out of a loss over tokens


class Part(NamedTuple):
    """One summand of the loss."""

    position: int  # position in the pass; seeds the random numbers of the forward pass
    weight: float
    batch: Batch
    size: int  # numbers in the batch


def option(criterion: Any, name: str, default: Any = None) -> Any:
    """An option of a loss module (attribute) or loss function (default of its signature)."""
    if hasattr(criterion, name):
        return getattr(criterion, name)
    try:
        parameter = inspect.signature(criterion).parameters.get(name)
    except (TypeError, ValueError):
        return default
    empty = parameter is None or parameter.default is inspect.Parameter.empty
    return default if empty or parameter is None else parameter.default


def terms(model: nn.Module, criterion: Any, batch: Batch) -> float:
    """How many terms the criterion averages over in this batch (1 for a sum)."""
    reduction = None if criterion is None else option(criterion, "reduction")
    if reduction == "sum":
        return 1.0
    targets = batch.get("labels") if isinstance(batch, Mapping) else batch[-1]
    if not isinstance(targets, Tensor):
        return float(samples(batch))
    ignored = None if criterion is None else option(criterion, "ignore_index")
    whole = not targets.is_floating_point() and not targets.is_complex()
    if isinstance(batch, Mapping) and whole and ignored is None:
        # causal language models of Hugging Face predict the next label: the first has no term
        if targets.dim() > 1 and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
            targets = targets[:, 1:]
        return float((targets != IGNORED).sum())
    if ignored is not None and whole:
        valid = targets[targets != ignored]
        weight = option(criterion, "weight")
        if reduction is None or not isinstance(weight, Tensor):
            return float(valid.numel())
        return float(weight.detach().double()[valid.to(weight.device)].sum())
    if ignored is not None and targets.dim() > 0:  # class probabilities (C,) or (N, C, ...)
        return float(targets.numel() // targets.shape[min(1, targets.dim() - 1)])
    if reduction in (None, "batchmean"):
        return float(samples(batch))
    return float(targets.numel())


def call(model: nn.Module, criterion: Any, batch: Batch) -> tuple[Any, Any]:
    """Outputs and loss: forward pass and criterion, as the form of the batch asks."""
    if isinstance(batch, Mapping):
        outputs = model(**batch)
        return outputs, _own_loss(outputs) if criterion is None else criterion(outputs, batch)
    if criterion is None:
        outputs = model(*batch)
        return outputs, _own_loss(outputs)
    inputs = batch[:-1]
    if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)):
        inputs = inputs[0]
    outputs = model(*inputs)
    return outputs, criterion(outputs, batch[-1])


def _own_loss(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs
    loss = getattr(outputs, "loss", None)
    if loss is None and isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    if loss is None:
        raise ValueError(
            f"criterion is None, but the model returned {type(outputs).__name__} without a loss; "
            f"pass a criterion, or labels in data"
        )
    return loss


def scalar(loss: Any, origin: str) -> Tensor:
    """The loss as a 0-dimensional tensor.

    Raises:
        TypeError: not a real floating-point tensor.
        ValueError: more than one number.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"{origin} must return a tensor, got {type(loss).__name__}")
    if not loss.is_floating_point():
        raise TypeError(f"{origin} must return a real floating-point loss, got {loss.dtype}")
    if loss.numel() != 1:
        raise ValueError(
            f"{origin} must return a scalar loss, got shape {tuple(loss.shape)}; "
            f"use reduction='mean' or 'sum'"
        )
    return loss.reshape(())


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
    ) -> None:
        if criterion is not None and not callable(criterion):
            raise TypeError(f"criterion must be callable or None, got {type(criterion).__name__}")
        if criterion is None:
            self.origin = "model"
        self._model, self._criterion = model, criterion
        self._device, self._dtype = like.device, like.dtype
        for name, module in model.named_modules():
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
        ordered = mode == "train" or self._weights is not None
        self._source: Memory | Stream = source(data, ordered)
        self.replayable = self._source.replayable
        self.survey()

    def survey(self) -> None:
        """One pass over the data: check the batches, count the terms."""
        counts, self.size = [], 0
        with closing(self._source.one_pass()) as batches:
            for index, batch in enumerate(batches):
                check_batch(batch, self._criterion is not None)
                counts.append(self._terms(index, batch))
                self.size += size(batch)
        if not counts:
            raise ValueError("data is empty: it yielded no batch")
        if isinstance(self._weights, list) and len(self._weights) != len(counts):
            raise ValueError(
                f"weights must have one entry per batch ({len(counts)}), got {len(self._weights)}"
            )
        total = sum(counts)
        if total <= 0:
            raise ValueError("data holds no term of the loss: every target is ignored")
        summed = self._weights is None and option(self._criterion, "reduction") == "sum"
        self._total = 1.0 if summed else total
        self.count = sum(count > 0 for count in counts)
        self.token = self._token()

    def changed(self) -> bool:
        """Whether data in memory, or what weighs its terms, changed since the last survey."""
        return self._token() != self.token

    def _token(self) -> tuple[Any, ...]:
        weight = option(self._criterion, "weight")
        held = tuple(weight.tolist()) if isinstance(weight, Tensor) else None
        how = tuple(option(self._criterion, name) for name in ("reduction", "ignore_index"))
        return self._source.token(), held, how

    def named(self) -> dict[str, Tensor]:
        """The model's parameters now."""
        return dict(self._model.named_parameters())

    def watched(self) -> list[Tensor]:
        """Tensors on which the graphs depend: parameters and buffers, also frozen ones."""
        return [t for root in self.roots for t in (*root.parameters(), *root.buffers())]

    def _terms(self, index: int, batch: Batch) -> float:
        if self._weights is None:
            return terms(self._model, self._criterion, batch)
        if isinstance(self._weights, list):
            value = self._weights[index] if index < len(self._weights) else 0.0
        else:
            value = float(self._weights(batch))
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"weights must be finite and not negative, got {value} for batch {index}"
            )
        return value

    def parts(self) -> Generator[Part, None, None]:
        """One pass over the data; batches without a term of the loss are left out."""
        position = itertools.count()
        with closing(self._source.one_pass()) as batches:
            for index, batch in enumerate(batches):
                count = self._terms(index, batch)
                if count > 0:
                    yield Part(next(position), count / self._total, batch, size(batch))

    def evaluate(self, part: Part) -> tuple[Any, Tensor]:
        """The model's outputs and the scalar loss of one part, with their graph."""
        batch = to_device(part.batch, self._device)
        try:
            with seeded(part.position), own_buffers(self.roots):
                outputs, loss = call(self._model, self._criterion, batch)
        except TypeError as error:
            raise TypeError(f"data does not fit the model and criterion: {error}") from error
        except RuntimeError as error:
            held = {t.dtype for t in leaves(batch) if t.is_floating_point()}
            if "type" in str(error) and held - {self._dtype}:
                raise TypeError(
                    f"data holds {', '.join(map(str, held))} but the parameters are "
                    f"{self._dtype}; convert one of them ({str(error).splitlines()[0]})"
                ) from error
            if self._fits or isinstance(error, torch.OutOfMemoryError):
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

    def evaluate(self, part: Part) -> tuple[Any, Tensor]:
        """No outputs, and the closure's loss with its graph."""
        with seeded(part.position):
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
