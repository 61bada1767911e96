"""What a criterion is: its options, its number of terms in a batch, and the loss that it gives."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fasthessian.operators.batches import Batch, samples

IGNORED = -100  # what torch and Hugging Face leave out of a loss over tokens


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


def plain(criterion: Any) -> Any:
    """The class of a loss module, or the function under ``functools.partial`` options."""
    while isinstance(criterion, functools.partial) and not criterion.args:
        criterion = criterion.func
    return type(criterion) if isinstance(criterion, nn.Module) else criterion


def is_torchs(criterion: Any) -> bool:
    """Whether this is one of torch's loss modules or functions, with options of its own."""
    kind = plain(criterion)
    home = getattr(kind, "__module__", None)
    return home in ("torch.nn.modules.loss", "torch.nn.functional")


def terms(criterion: Any, batch: Batch) -> float:
    """How many terms the criterion averages over in this batch (1 for a sum).

    Right for torch's own criteria; for others a guess, of the number of valid targets or samples.
    """
    reduction = None if criterion is None else option(criterion, "reduction")
    if reduction == "sum":
        return 1.0
    targets = batch.get("labels") if isinstance(batch, Mapping) else batch[-1]
    if not isinstance(targets, Tensor):
        return float(samples(batch))
    ignored = None if criterion is None else option(criterion, "ignore_index")
    whole = not targets.is_floating_point() and not targets.is_complex()
    if isinstance(batch, Mapping) and whole and ignored is None:
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


def call(model: Callable[..., Any], criterion: Any, batch: Batch) -> tuple[Any, Any]:
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
        way = "; return the sum of its entries" if isinstance(loss, (Mapping, tuple, list)) else ""
        raise TypeError(f"{origin} must return a tensor, got {type(loss).__name__}{way}")
    if not loss.is_floating_point():
        raise TypeError(f"{origin} must return a real floating-point loss, got {loss.dtype}")
    if loss.numel() != 1:
        raise ValueError(
            f"{origin} must return a scalar loss, got shape {tuple(loss.shape)}; "
            f"use reduction='mean' or 'sum'"
        )
    return loss.reshape(())
