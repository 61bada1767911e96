"""A problem in which all can be changed: data, criterion, attributes of the model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

F64 = torch.float64


class Net(nn.Module):
    """A network whose outputs depend on attributes of every form."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)
        self.temperature = 1.0
        self.config = SimpleNamespace(gain=1.0)
        self.scales = {"input": [1.0, 1.0, 1.0]}
        self.shift = torch.zeros(4, dtype=F64)  # no buffer
        self.mask = np.ones(4)
        self.gate: Callable[[Tensor], Tensor] = torch.sigmoid

    power = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = (OFFSET + self.power * x) * torch.tensor(self.scales["input"], dtype=x.dtype)
        h = self.act(self.a(x) + self.shift) * torch.from_numpy(self.mask.copy())
        return self.b(self.gate(h)) * self.config.gain / self.temperature


class Penalised:
    """A criterion that is no module."""

    def __init__(self) -> None:
        self.strength = 0.1

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + self.strength * z.square().mean()


STRENGTH = 0.1


OFFSET = 0.0


def by_global(z: Tensor, y: Tensor) -> Tensor:
    """A criterion that reads a global variable."""
    return F.cross_entropy(z, y) + STRENGTH * z.square().mean()


def problem(criterion: Any = None) -> SimpleNamespace:
    """A network, its criterion, and data whose inputs share memory with a NumPy array."""
    torch.manual_seed(0)
    a = np.random.default_rng(0).standard_normal((6, 3))
    return SimpleNamespace(
        model=Net().double(),
        criterion=criterion or nn.CrossEntropyLoss(),
        array=a,
        x=torch.from_numpy(a),
        y=torch.randint(2, (6,)),
    )


def set_global(p: Any) -> None:
    globals()["STRENGTH"] += 0.7


def set_offset(p: Any) -> None:
    globals()["OFFSET"] += 0.7


def reset() -> None:
    """Undo what the functions above and a test of ``Net.power`` changed."""
    globals().update(STRENGTH=0.1, OFFSET=0.0)
    Net.power = 1.0
