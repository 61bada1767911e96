"""Repeatable training with SGD and momentum, and the accuracy on other images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

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
    per_epoch = math.ceil(count / batch_size)
    steps = epochs * per_epoch
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay)
    history: list[Epoch] = []

    def rate(done: int) -> float:
        return 0.5 * lr * (1 + math.cos(math.pi * (done + per_epoch * len(history)) / steps))

    def on_step(done: int) -> None:
        if progress is not None:
            progress(done + per_epoch * len(history), steps)

    for _ in range(epochs):
        order = torch.split(torch.randperm(len(y), generator=generator)[:count], batch_size)
        history.append(descend(model, optimizer, x, y, order, rate, on_step=on_step))
        if not math.isfinite(history[-1].loss):
            raise InputError(f"training diverged at lr={lr}; use a smaller learning rate")
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return history


def descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    batches: Iterable[Tensor],
    rate: Callable[[int], float],
    *,
    augment: Callable[[Tensor], Tensor] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Epoch:
    """One epoch in training mode: one step for each batch of indices.

    Args:
        model: trained in place.
        optimizer: of the model's parameters.
        x: inputs (N, ...).
        y: labels (N,), int64.
        batches: indices of the images of each step.
        rate: learning rate by the number of steps that are done.
        augment: changes the inputs of a batch.
        on_step: called with the number of steps that are done.

    Returns:
        The means over the images. They are NaN if the loss of a batch was not finite, after which
        no more steps are made.
    """
    model.train()
    loss_sum = 0.0
    right = count = 0
    for done, index in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(done)
        images = x[index] if augment is None else augment(x[index])
        logits = model(images)
        loss = F.cross_entropy(logits, y[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss_sum += loss.item() * len(index)
        right += int((logits.argmax(1) == y[index]).sum())
        count += len(index)
        if not math.isfinite(loss_sum):
            return Epoch(math.nan, math.nan)
        if on_step is not None:
            on_step(done + 1)
    return Epoch(loss_sum / count, right / count)


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
