"""Models whose loss is refused: it has no second derivative, or its batches cannot be cut."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasthessian.errors import InputError


def check_modules(model: nn.Module, mode: str, microbatch: int | None) -> None:
    """Raise ValueError if a module of the model makes that impossible."""
    for name, module in model.named_modules():
        coupled = mode == "train" or getattr(module, "running_mean", None) is None
        if microbatch is not None and isinstance(module, _BatchNorm) and coupled:
            raise InputError(
                f"microbatch must be None for this model: {name!r} normalises over the batch; "
                f"use mode='eval', or batches that fit"
            )
        if getattr(module, "max_norm", None) is not None:
            raise InputError(
                f"model has {name!r} with max_norm, which rewrites its weight in the forward "
                f"pass; set its max_norm to None"
            )
        if getattr(module, "sparse", False) and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise InputError(
                f"model has {name!r} with sparse gradients, which have no second derivative; "
                f"set its sparse to False"
            )
