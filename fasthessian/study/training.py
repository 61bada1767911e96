"""A repeatable training loop: SGD with momentum and a cosine schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasthessian.errors import InputError

OnStep = Callable[[int, "int | None"], None]  # called with (steps done, steps in all if known)


@dataclasses.dataclass(frozen=True)
class Epoch:
    """Means over the images of one epoch, measured while the weights change."""

    loss: float
    accuracy: float


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch_size: int = 64,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    limit: int | None = None,
    seed: int = 0,
    progress: OnStep | None = None,
) -> list[Epoch]:
    """Minimise the cross-entropy of ``model(x)`` and ``y``; the learning rate falls to zero.

    A generator of its own draws the order of the images, so torch's global generator does not
    change. Afterwards the model is in eval mode and has no gradients.

    Args:
        model: maps (N, ...) inputs to (N, classes) logits; trained in place.
        x: inputs (N, ...).
        y: labels (N,), int64.
        epochs: passes over the images; 0 leaves the model as it is.
        batch_size: images per step.
        lr: learning rate of the first step.
        momentum: momentum of SGD.
        weight_decay: L2 penalty in the optimiser; the reported loss does not include it.
        limit: images per epoch at most, drawn again for each epoch.
        seed: seed of the order.
        progress: called with (steps done, steps in all).

    Raises:
        ValueError: a size is out of range, or the loss is no longer finite.
    """
    for name, size, least in (
        ("epochs", epochs, 0),
        ("batch_size", batch_size, 1),
        ("limit", len(y) if limit is None else limit, 1),
    ):
        if size < least:
            raise InputError(f"{name}={size} is below {least}")
    generator = torch.Generator().manual_seed(seed)
    count = len(y) if limit is None else min(limit, len(y))
    steps = epochs * math.ceil(count / batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay)
    history = []
    done = 0
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(y), generator=generator)[:count]
        loss_sum = 0.0
        right = 0
        for index in torch.split(order, batch_size):
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * lr * (1 + math.cos(math.pi * done / steps))
            logits = model(x[index])
            loss = F.cross_entropy(logits, y[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += loss.item() * len(index)
            right += int((logits.argmax(1) == y[index]).sum())
            done += 1
            if progress is not None:
                progress(done, steps)
        if not math.isfinite(loss_sum):
            raise InputError(f"training diverged at lr={lr}; use a smaller learning rate")
        history.append(Epoch(loss_sum / count, right / count))
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return history


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 256) -> Epoch:
    """Loss and accuracy in eval mode; the training flags of the modules are restored."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        loss = 0.0
        right = 0
        for start in range(0, len(y), batch_size):
            labels = y[start : start + batch_size]
            logits = model(x[start : start + batch_size])
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
    finally:
        for module, flag in flags:
            module.training = flag
    return Epoch(loss / len(y), right / len(y))
