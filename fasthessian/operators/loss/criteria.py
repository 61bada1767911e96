"""The options of a criterion, and how many terms it has in a batch according to them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fasthessian.operators.loss.batches import Batch, samples, targets

IGNORED = -100  # the label that torch and Hugging Face leave out of a loss over tokens


def option(criterion: Any, name: str, default: Any = None) -> Any:
    """An option of a loss module (an attribute) or a loss function (a default argument)."""
    if hasattr(criterion, name):
        return getattr(criterion, name)
    try:
        parameter = inspect.signature(criterion).parameters.get(name)
    except (TypeError, ValueError):
        return default
    if parameter is None or parameter.default is inspect.Parameter.empty:
        return default
    return parameter.default


def class_or_function(criterion: Any) -> Any:
    """The class of a loss module; the function inside ``functools.partial`` with options."""
    while isinstance(criterion, functools.partial) and not criterion.args:
        criterion = criterion.func
    return type(criterion) if isinstance(criterion, nn.Module) else criterion


def is_torch_loss(criterion: Any) -> bool:
    """Whether this is one of torch's own loss modules or functions."""
    home = getattr(class_or_function(criterion), "__module__", None)
    return home in ("torch.nn.modules.loss", "torch.nn.functional")


def number_of_terms(criterion: Any, batch: Batch) -> float:
    """How many terms the criterion averages over in this batch (1 for a sum).

    Exact for torch's own criteria. For others it is a guess: the valid targets, or the samples.
    """
    reduction = None if criterion is None else option(criterion, "reduction")
    if reduction == "sum":
        return 1.0
    given = targets(batch)
    if not isinstance(given, Tensor):
        return float(samples(batch))
    ignored = None if criterion is None else option(criterion, "ignore_index")
    integer = not given.is_floating_point() and not given.is_complex()
    if isinstance(batch, Mapping) and integer and ignored is None:
        return float((given != IGNORED).sum())
    if ignored is not None and integer:
        valid = given[given != ignored]
        weight = option(criterion, "weight")
        if reduction is None or not isinstance(weight, Tensor):
            return float(valid.numel())
        return float(weight.detach().double()[valid.to(weight.device)].sum())
    if ignored is not None and given.dim() > 0:  # class probabilities (C,) or (N, C, ...)
        return float(given.numel() // given.shape[min(1, given.dim() - 1)])
    if reduction in (None, "batchmean"):
        return float(samples(batch))
    return float(given.numel())
