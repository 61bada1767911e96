"""The empirical Fisher matrix equals its definition, a sum of g g' by plain torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasthessian as fh
from tests.support.cross_entropies import CROSS_ENTROPIES, F64, W3, net
from tests.support.models import EACH_ENGINE, columns, jacobian, mismatch, refused

each_engine = pytest.mark.parametrize("engine", EACH_ENGINE)


def bound(engine: str) -> float:
    """The error bound of test_engine_table.py: of central differences in float64, or rounding."""
    return 1e-6 if engine == "difference" else 1e-10


def of_targets(model: nn.Module, criterion: Any, x: Tensor, y: Tensor) -> Tensor:
    """sum_i w_i g_i g_i' over the valid targets, divided by sum_i w_i for a mean."""
    options = {"ignore_index": criterion.ignore_index, "reduction": "none"}
    g = jacobian(model, (x, y), lambda z: F.cross_entropy(z, y, **options))
    valid = y.flatten() != criterion.ignore_index
    g, label = g[valid], y.flatten()[valid]
    w = torch.ones(len(g), dtype=F64) if criterion.weight is None else criterion.weight[label]
    return g.T @ (w[:, None] * g) / (w.sum() if criterion.reduction == "mean" else 1)


@each_engine
@pytest.mark.parametrize("shape", [(), (4,)], ids=["classes", "sequences"])
@pytest.mark.parametrize("how", CROSS_ENTROPIES)
def test_the_terms_of_a_cross_entropy_are_its_valid_targets(
    how: str, shape: tuple[int, ...], engine: str
) -> None:
    (model, x, y), criterion = net(*shape), CROSS_ENTROPIES[how]
    if how == "ignore 1":
        y[y == -100] = 0
    want = of_targets(model, criterion, x, y)
    cuts = [(x[a:b], y[a:b]) for a, b in ((0, 1), (1, 2), (2, 9))]
    loader = DataLoader(TensorDataset(x, y), 4, shuffle=True)
    for data in (cuts, loader) if engine == "recompute" else ((x, y), cuts):
        A = fh.EmpiricalFisher(model, criterion, data, engine=engine)
        assert mismatch(A, want) < bound(engine)


def mean_of_fourth_powers(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).pow(4).reshape(len(z), -1).sum(1).mean()


SAMPLES: dict[str, tuple[Any, Any]] = {  # criterion, and the loss of each sample
    "mse": (nn.MSELoss(), lambda z, y: (z - y).square().reshape(len(z), -1).mean(1)),
    "mse, sum": (
        nn.MSELoss(reduction="sum"),
        lambda z, y: (z - y).square().reshape(len(z), -1).sum(1),
    ),
    "bce": (
        nn.BCEWithLogitsLoss(),
        lambda z, y: (
            F.binary_cross_entropy_with_logits(z, y, reduction="none").reshape(len(z), -1).mean(1)
        ),
    ),
    "probabilities": (
        nn.CrossEntropyLoss(),
        lambda z, y: F.cross_entropy(z, y, reduction="none").reshape(len(z), -1).mean(1),
    ),
    "own": (mean_of_fourth_powers, lambda z, y: (z - y).pow(4).reshape(len(z), -1).sum(1)),
}


@each_engine
@pytest.mark.parametrize("shape", [(), (4,)], ids=["vectors", "maps"])
@pytest.mark.parametrize("how", SAMPLES)
def test_the_terms_of_other_criteria_are_the_samples(
    how: str, shape: tuple[int, ...], engine: str
) -> None:
    criterion, each = SAMPLES[how]
    model, x, _ = net(*shape)
    y = torch.rand(9, 3, *shape, dtype=F64)
    y = y.softmax(1) if how == "probabilities" else y
    g = jacobian(model, (x, y), lambda z: each(z, y))
    want = g.T @ g / (1 if how.endswith("sum") else 9)
    for data in ((x, y), [(x[:1], y[:1]), (x[1:], y[1:])]):
        A = fh.EmpiricalFisher(model, criterion, data, engine=engine)
        assert mismatch(A, want) < bound(engine)
    if engine == "retained":
        assert torch.linalg.eigvalsh(columns(A)).min() > -1e-12 * want.abs().max()


SMOOTHED = {
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "derived": type("Derived", (nn.CrossEntropyLoss,), {})(),
}


@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("how", SMOOTHED)
def test_ignored_targets_do_not_count_in_other_cross_entropies(how: str, shape: Any) -> None:
    model, x, y = net(*shape)
    criterion = SMOOTHED[how]
    smoothing = criterion.label_smoothing

    def each(z: Tensor) -> Tensor:
        rows, flat = z.movedim(1, -1).reshape(-1, z.shape[1]), y.reshape(-1)
        losses = F.cross_entropy(rows, flat, reduction="none", label_smoothing=smoothing)
        return losses[flat != -100]

    g = jacobian(model, (x, y), each)
    want = g.T @ g / int((y != -100).sum())
    assert int((y == -100).sum()) > 0
    for data in ((x, y), [(x[:3], y[:3]), (x[3:], y[3:])]):
        assert mismatch(fh.EmpiricalFisher(model, criterion, data), want) < 1e-10


def test_class_weights_with_smoothing_are_refused() -> None:
    model, x, y = net()
    both = nn.CrossEntropyLoss(weight=W3, label_smoothing=0.1)
    refused(lambda: fh.EmpiricalFisher(model, both, (x, y)), ValueError, "not both")
