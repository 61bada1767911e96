"""Layers in common use: the matrices are those of plain torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasthessian as fh
from tests.support.models import (
    ALL_ENGINES,
    EACH_ENGINE,
    columns,
    dense,
    error,
    gauss_newton,
    mismatch,
)

F64 = torch.float64
each_engine = pytest.mark.parametrize("engine", EACH_ENGINE)


def bound(engine: str) -> float:
    """As in the table of engines: what a central difference in float64 leaves, or rounding."""
    return 1e-6 if engine == "difference" else 1e-10


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


@each_engine
@pytest.mark.parametrize("name", ZOO)
def test_a_layer_gives_the_dense_matrices(name: str, engine: str) -> None:
    model, criterion, data = zoo(name)
    A = fh.Hessian(model, criterion, data, engine=engine)
    assert mismatch(A, dense(model, criterion, data)) < bound(engine)
    G = fh.GaussNewton(model, criterion, data, engine=engine)
    assert mismatch(G, gauss_newton(model, criterion, data)) < bound(engine)


@pytest.mark.parametrize("engine", ["retained", "forward"])
@pytest.mark.parametrize("name", ZOO)
def test_a_layer_gives_the_dense_matrix_in_single_precision(name: str, engine: str) -> None:
    """torch has other kernels there, not all of which it can differentiate."""
    if (name, engine) == ("LSTM", "forward"):
        return  # refused, see the table of engines
    model, criterion, (x, y) = zoo(name)
    want = dense(model, criterion, (x, y))
    data = x.float() if x.is_floating_point() else x, y
    assert mismatch(fh.Hessian(model.float(), criterion, data, engine=engine), want) < 1e-4


@pytest.mark.parametrize("curvature", [fh.Hessian, fh.GaussNewton, fh.EmpiricalFisher])
def test_a_padded_embedding_is_served_where_its_row_stays_out(curvature: Any) -> None:
    """Its row has no gradient by torch's rule, though the loss depends on it."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=0), *tail(12)).double()
    nn.init.normal_(model[0].weight)
    made = model, nn.CrossEntropyLoss(), (torch.randint(6, (6, 3)), torch.randint(3, (6,)))
    exact = columns(curvature(*made))
    if curvature is fh.Hessian:
        assert error(exact, dense(*made)) < 1e-12
    for engine in ALL_ENGINES:
        H = columns(curvature(*made, engine=engine))
        assert not H[:4].any() and not H[:, :4].any()
        assert error(H, exact) < bound(engine)


@each_engine
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_norms_of_the_batch_in_training(norm: Any, engine: str) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv1d(2, 3, 2), norm(3, affine=True, track_running_stats=True), nn.Tanh())
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(9, 2)).double()
    for p in model.parameters():
        nn.init.normal_(p, 0.3, 0.5)
    data = torch.randn(6, 2, 4, dtype=F64), torch.randint(2, (6,))
    plain = copy.deepcopy(model)
    plain[1].track_running_stats = False  # without them eval mode has the batch's statistics
    plain[1].running_mean = plain[1].running_var = None
    want = dense(plain, nn.CrossEntropyLoss(), data)
    statistics = model[1].running_mean.clone()
    A = fh.Hessian(model, nn.CrossEntropyLoss(), data, engine=engine, mode="train")
    assert mismatch(A, want) < bound(engine)
    assert torch.equal(model[1].running_mean, statistics)


class Masked(nn.Module):
    """Dropout that remembers its last mask, times 1 / (1 - p), and can hold to a given one."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.remember, self.masks = nn.Dropout(0.4), False, []
        self.held: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.held is not None:
            return x * self.held
        y = self.dropout(x)
        if self.remember:
            self.masks.append((y / x).detach())
        return y


@each_engine
def test_dropout_in_training_has_one_mask_for_each_batch(engine: str) -> None:
    torch.manual_seed(0)
    masked = Masked()
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), masked, nn.Linear(6, 3)).double()
    x, y = torch.randn(8, 4, dtype=F64), torch.randint(3, (8,))
    batches, criterion = [(x[:5], y[:5]), (x[5:], y[5:])], nn.CrossEntropyLoss()
    state = torch.get_rng_state()
    A = fh.Hessian(model, criterion, batches, mode="train", engine=engine)
    v = torch.linspace(-1, 1, A.n, dtype=F64)
    assert torch.equal(A @ v, A @ v)
    masked.remember = True
    loss = A.loss()
    masked.remember = False
    assert torch.equal(torch.get_rng_state(), state) and len(masked.masks) == 2
    plain = copy.deepcopy(model)
    plain[2].held = torch.cat(masked.masks)
    zeros = int((plain[2].held == 0).sum())
    assert 8 < zeros < 32  # 0.4 of 48
    assert loss == pytest.approx(float(criterion(plain(x), y).detach()), rel=1e-12)
    assert mismatch(A, dense(plain, criterion, (x, y))) < bound(engine)
    nothing = fh.Hessian(model, criterion, batches, engine=engine)  # eval mode: no mask at all
    plain[2].held = torch.ones(8, 6, dtype=F64)
    assert mismatch(nothing, dense(plain, criterion, (x, y))) < bound(engine)


@pytest.mark.parametrize("old", [True, False])
def test_weight_norm_whose_second_derivative_is_wrong_in_torch(old: bool) -> None:
    """Against central differences, since torch's own double backward is what is wrong."""
    norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old one is deprecated
        model = nn.Sequential(norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    made = model, nn.CrossEntropyLoss(), (torch.randn(7, 4, dtype=F64), torch.randint(3, (7,)))
    want = columns(fh.Hessian(*made, engine="difference"))
    for engine in ("retained", "recompute", "forward"):
        assert error(columns(fh.Hessian(*made, engine=engine)), want) < 1e-6
    assert fh.Hessian(*made).check().ok
