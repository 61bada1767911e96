"""Models for tests of fully_shard, and what trains and inspects them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Attention(nn.Module):
    """Causal attention with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x))[:, None].chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


class GPT(nn.Module):
    """Two blocks, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Attention(6), Attention(6)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h).transpose(1, 2).contiguous()  # FSDP warns of views


def problem(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any, list[Any]]:
    """A model, its criterion and three batches of different sizes."""
    torch.manual_seed(0)
    sizes = (5, 3, 4)
    y = [torch.randint(3, (k,)) for k in sizes]
    x = [torch.randn(k, 7) for k in sizes]
    criterion: nn.Module = nn.CrossEntropyLoss()
    if kind == "norm":
        model: nn.Module = nn.Sequential(
            nn.Linear(7, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)
        )
    elif kind == "convolutions":
        x = [torch.randn(k, 2, 5, 5) for k in sizes]
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3),
        )  # fmt: skip
        model.train()(torch.randn(16, 2, 5, 5))  # statistics that are not those of the start
    elif kind == "gpt":
        x = [torch.randint(11, (k, 5)) for k in sizes]
        y = [torch.randint(11, (k, 5)) for k in sizes]
        for number, labels in enumerate(y):  # ragged
            labels[: number + 1, 3:] = -100
        model = GPT()
    else:  # sizes that two ranks cannot divide evenly, and a bias of one number
        model = nn.Sequential(
            nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)
        )
        y = [torch.randn(k, 1).to(dtype) for k in sizes]
        criterion = nn.MSELoss()
    x = [t.to(dtype) if t.is_floating_point() else t for t in x]
    return model.to(dtype), criterion, list(zip(x, y, strict=True))


def divided(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    """A copy of the model after fully_shard: every block, and the root."""
    model = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    kinds = Attention if isinstance(model, GPT) else (nn.Linear, nn.Conv2d, nn.LayerNorm)
    for module in model.modules():
        if isinstance(module, kinds):
            fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def share(batches: list[Any], cut: int) -> list[Any]:
    """The batches of this one of two ranks: before the cut, or from it."""
    return batches[cut:] if dist.get_rank() else batches[:cut]


def trained(model: nn.Module, criterion: Any, batches: list[Any], between: Any = None) -> list[Any]:
    """The bits of shards, gradients and buffers after each of three steps of Adam.

    ``between`` is called before the first step, between a backward pass and its step, and after a
    forward pass without a backward pass, when the root keeps full parameters.
    """
    act = between or (lambda model: None)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen = []
    act(model)
    for number, (x, y) in enumerate(batches[:3]):
        loss = criterion(model(x), y)
        loss.backward()
        if number == 1:
            act(model)
        optimizer.step()
        tensors = [p.to_local() for p in model.parameters()]
        tensors += [p.grad.to_local() for p in model.parameters()]
        seen.append([t.tolist() for t in (*tensors, *model.buffers())])
        optimizer.zero_grad()
    with torch.no_grad():
        seen.append([model(x).tolist()])
    act(model)
    seen.append([model(x).tolist()])
    return seen
