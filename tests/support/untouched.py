"""A model and a criterion that change the state of the process, and a record of that state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Restless(nn.Module):
    """Writes its buffers, draws random numbers, keeps layers in different modes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("nothing", None)
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.scale = self.scale * 2  # another tensor under the same name
        self.register_buffer("scratch", torch.ones(2))
        noise = torch.rand(()) + np.random.rand() + random.random()
        out = self.last(self.drop(torch.tanh(self.norm(self.first(x))))) * noise / self.scale
        if self.fail:
            raise KeyError("from inside the model")
        return out


class RestlessLoss(nn.Module):
    """A criterion with a mode and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        self.seen += 1
        return F.cross_entropy(out, y)


def world(model: nn.Module, criterion: nn.Module) -> list[Any]:
    """Everything that must not change, by identity, by version and by value."""
    seen: list[Any] = [torch.get_rng_state().tolist(), random.getstate(), torch.is_grad_enabled()]
    numpy_state = np.random.get_state()
    seen += [numpy_state[1].tolist(), *numpy_state[2:]]
    seen += [torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()]
    for module in (*model.modules(), *criterion.modules()):
        seen += [module.training, list(module._buffers)]
    tensors = [*model.parameters(), *model.buffers(), *criterion.buffers()]
    for t in tensors:
        seen += [id(t), t.data_ptr(), t._version, t.requires_grad, t.tolist()]
        seen += [id(t.grad), None if t.grad is None else t.grad.tolist()]
    return seen


def restless() -> tuple[Restless, RestlessLoss, Tensor, Tensor]:
    torch.manual_seed(0)
    model, criterion = Restless(), RestlessLoss()
    model.train()
    model.norm.eval()
    model.first.weight.grad = torch.full((8, 4), 3.0)
    return model, criterion, torch.randn(9, 4), torch.randint(3, (9,))
