"""The matrices of models with common layers equal those of plain torch."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasthessian as fh
from tests.support.model_zoo import ZOO, tail, zoo
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
    """The error bound of test_engine_table.py: of central differences in float64, or rounding."""
    return 1e-6 if engine == "difference" else 1e-10


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
    """In float32 torch uses other kernels, and cannot differentiate some of them twice."""
    if (name, engine) == ("LSTM", "forward"):
        return  # it is refused, see test_engine_table.py
    model, criterion, (x, y) = zoo(name)
    want = dense(model, criterion, (x, y))
    data = x.float() if x.is_floating_point() else x, y
    assert mismatch(fh.Hessian(model.float(), criterion, data, engine=engine), want) < 1e-4


@pytest.mark.parametrize("curvature", [fh.Hessian, fh.GaussNewton, fh.EmpiricalFisher])
def test_every_matrix_omits_the_padding_row_of_an_embedding(curvature: Any) -> None:
    """torch gives the padding row no gradient, although the loss depends on it."""
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
def test_batch_normalisation_in_training_mode(norm: Any, engine: str) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv1d(2, 3, 2), norm(3, affine=True, track_running_stats=True), nn.Tanh())
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(9, 2)).double()
    for p in model.parameters():
        nn.init.normal_(p, 0.3, 0.5)
    data = torch.randn(6, 2, 4, dtype=F64), torch.randint(2, (6,))
    plain = copy.deepcopy(model)
    plain[1].track_running_stats = False  # then eval mode uses batch statistics
    plain[1].running_mean = plain[1].running_var = None
    want = dense(plain, nn.CrossEntropyLoss(), data)
    statistics = model[1].running_mean.clone()
    A = fh.Hessian(model, nn.CrossEntropyLoss(), data, engine=engine, mode="train")
    assert mismatch(A, want) < bound(engine)
    assert torch.equal(model[1].running_mean, statistics)


class Masked(nn.Module):
    """Dropout that stores its last mask, times 1 / (1 - p), and can use a given mask."""

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
def test_dropout_in_training_mode_has_one_mask_per_batch(engine: str) -> None:
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
    assert 8 < zeros < 32  # 0.4 of 48 entries are dropped on average
    assert loss == pytest.approx(float(criterion(plain(x), y).detach()), rel=1e-12)
    assert mismatch(A, dense(plain, criterion, (x, y))) < bound(engine)
    nothing = fh.Hessian(model, criterion, batches, engine=engine)  # eval mode has no mask
    plain[2].held = torch.ones(8, 6, dtype=F64)
    assert mismatch(nothing, dense(plain, criterion, (x, y))) < bound(engine)


@pytest.mark.parametrize("old", [True, False])
def test_weight_norm_whose_second_derivative_is_wrong_in_torch(old: bool) -> None:
    """The reference is central differences, because torch's double backward is wrong."""
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
