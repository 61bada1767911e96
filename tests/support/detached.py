"""Models and criteria that detach a part of their loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

F64 = torch.float64


class Forces(nn.Module):
    """Energies and forces; autograd records the forces in training only, unless ``always``."""

    def __init__(self, always: bool = False, energies: bool = True, retain: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 5), nn.SiLU(), nn.Dropout(0.5), nn.Linear(5, 1)
        )  # in eval mode whatever the flag of the model
        self.always, self.energies, self.retain = always, energies, retain

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        energy = self.net(x)
        (slope,) = torch.autograd.grad(
            energy.sum(), x, create_graph=self.always or self.training, retain_graph=self.retain
        )
        return torch.cat([energy, -slope], 1) if self.energies else -slope


class Penalised(nn.Module):
    """A penalty on the slope of the outputs, which is a constant in eval mode."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv1d(1, 4, 2), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.always = always
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None].clone().requires_grad_()
        out = self.last(torch.tanh(self.norm(self.conv(x))).mean(2))
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        size = slope.square().sum((1, 2))[:, None]
        return torch.cat([out, size if self.always or self.training else size.detach()], 1)


class Weighted(nn.Module):
    """A gate that is a constant in eval mode."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.gate, self.last = nn.Linear(3, 2), nn.Linear(3, 2)
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.always or self.training):
            gate = torch.sigmoid(self.gate(x)) * self.last.weight.norm()
        return gate * self.last(x)


MODELS: dict[str, tuple[Callable[[bool], nn.Module], int]] = {
    "forces": (Forces, 4), "penalty": (Penalised, 2), "gate": (Weighted, 2),
}  # fmt: skip


def made(
    name: str, always: bool, dtype: torch.dtype = F64, seed: int = 0
) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(seed)
    build, width = MODELS[name]
    data = torch.randn(8, 3, dtype=F64).to(dtype), torch.randn(8, width, dtype=F64).to(dtype)
    return build(always).to(dtype), nn.MSELoss(), data


def focal(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    return ((1 - torch.exp(-losses)).detach() * losses).mean()


def teacher(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + (z - 2 * z.detach()).square().mean()


def straight_through(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z + (torch.tanh(z) - z).detach(), y)


DETACHED = (focal, teacher, straight_through)


def small(dtype: torch.dtype, seed: int = 0) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    return model, (torch.randn(9, 5, dtype=dtype), torch.randint(3, (9,)))
