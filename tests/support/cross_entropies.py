"""Cross-entropies of every form, and a model whose targets have any shape."""

from __future__ import annotations

import torch
from torch import Tensor, nn

F64 = torch.float64


W3 = torch.tensor([0.2, 1.0, 5.0], dtype=F64)


class Pointwise(nn.Module):
    """Classes in the second dimension, as cross-entropy wants; the same layers at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.movedim(1, -1)))).movedim(-1, 1)


def net(*shape: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(2)
    model, x, y = Pointwise(), torch.randn(9, 4, *shape, dtype=F64), torch.randint(3, (9, *shape))
    y.view(-1)[[1, 4, 5]] = -100
    if shape:
        y[1] = -100  # a whole sequence, and below a whole batch
    return model.double(), x, y


CROSS_ENTROPIES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights": nn.CrossEntropyLoss(W3),
    "weights, sum": nn.CrossEntropyLoss(W3, reduction="sum"),
    "ignore 1": nn.CrossEntropyLoss(ignore_index=1),
}
