"""One small model for each kind of layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

F64 = torch.float64


class Last(nn.Module):
    """A recurrent or attention layer, read at its last step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        attends = isinstance(self.layer, nn.MultiheadAttention)
        out = self.layer(x, x, x) if attends else self.layer(x)
        return (out if isinstance(out, Tensor) else out[0])[:, -1]


class Pair(nn.Module):
    """A bilinear form of two views of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.form = nn.Linear(4, 2), nn.Linear(4, 3), nn.Bilinear(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(torch.tanh(self.left(x)), self.right(x))


def tail(width: int) -> list[nn.Module]:
    return [nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)]


FLAT, SEQUENCE, IMAGE = (4,), (5, 4), (4, 5, 5)


ZOO: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "LayerNorm": (FLAT, lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), *tail(6))),
    "RMSNorm": (FLAT, lambda: nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), *tail(6))),
    "GroupNorm": (
        IMAGE, lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), *tail(54)),
    ),
    "InstanceNorm": (
        IMAGE,
        lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.InstanceNorm2d(3, affine=True), *tail(27)),
    ),
    "PReLU": (FLAT, lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 3))),
    "Bilinear": (FLAT, Pair),
    "Conv1d": (
        SEQUENCE,
        lambda: nn.Sequential(
            nn.Conv1d(5, 4, 3, padding=1), nn.GELU(), nn.Conv1d(4, 2, 2, stride=2), *tail(4)
        ),
    ),
    "Conv2d, grouped and dilated": (
        IMAGE,
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, groups=2, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 2, dilation=2),
            nn.AvgPool2d(2), *tail(2),
        ),
    ),
    "ConvTranspose2d": (
        IMAGE, lambda: nn.Sequential(nn.ConvTranspose2d(4, 2, 2, stride=2), *tail(200)),
    ),
    "Conv2d last": (
        IMAGE,
        lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.Tanh(), nn.Conv2d(3, 3, 3), nn.Flatten()),
    ),
    "a head of 1x1 convolution": (IMAGE, lambda: nn.Sequential(nn.Tanh(), nn.Conv2d(4, 3, 1))),
    "LSTM": (SEQUENCE, lambda: nn.Sequential(Last(nn.LSTM(4, 3, batch_first=True)), *tail(3))),
    "GRU, two layers": (
        SEQUENCE, lambda: nn.Sequential(Last(nn.GRU(4, 3, 2, batch_first=True)), *tail(3)),
    ),
    "attention": (
        SEQUENCE,
        lambda: nn.Sequential(Last(nn.MultiheadAttention(4, 2, batch_first=True)), *tail(4)),
    ),
    "encoder": (
        SEQUENCE,
        lambda: nn.Sequential(
            Last(nn.TransformerEncoderLayer(4, 2, 8, 0.1, "gelu", batch_first=True)), *tail(4)
        ),
    ),
    "Embedding": ((), lambda: nn.Sequential(nn.Embedding(6, 4), *tail(12))),
}  # fmt: skip


def zoo(name: str) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    shape, build = ZOO[name]
    torch.manual_seed(3)
    model = build().double()
    for p in model.parameters():  # no norm at its identity
        nn.init.normal_(p, 0.3, 0.5)
    x = torch.randn(6, *shape, dtype=F64) if shape else torch.randint(6, (6, 3))
    y = torch.randint(3, (6, *model.eval()(x).shape[2:]))
    return model, nn.CrossEntropyLoss(), (x, y)
