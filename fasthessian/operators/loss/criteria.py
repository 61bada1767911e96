"""What a criterion is: its options, and its number of terms in a batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fasthessian.operators.loss.batches import Batch, samples, targets

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


def is_torch_loss(criterion: Any) -> bool:
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
    given = targets(batch)
    if not isinstance(given, Tensor):
        return float(samples(batch))
    ignored = None if criterion is None else option(criterion, "ignore_index")
    whole = not given.is_floating_point() and not given.is_complex()
    if isinstance(batch, Mapping) and whole and ignored is None:
        return float((given != IGNORED).sum())
    if ignored is not None and whole:
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
