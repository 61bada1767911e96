"""Checks look at every batch, not only at the first one: missing targets, coupling, summands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasthessian as fh
from tests.support.dense_losses import F64, NAN, dense, distance, known_only
from tests.support.models import columns, refused


def made(outputs: int = 2) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).to(F64)
    return model, torch.randn(12, 3, dtype=F64), torch.randn(12, outputs, dtype=F64)


def thirds(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tuple(t[i : i + 4] for t in tensors) for i in (0, 4, 8)]


def number_known(batch: Any) -> float:
    return float((~batch[1].isnan()).sum())


@pytest.mark.parametrize("microbatch", [None, 1, 2, 3])
@pytest.mark.parametrize("given", ["auto", "callable", "list"])
def test_targets_missing_in_a_later_batch(microbatch: int | None, given: str) -> None:
    model, x, y = made()
    y[5, 0] = y[6] = y[9, 1] = NAN
    batches = thirds(x, y)
    weights: Any = {
        "auto": "auto", "callable": number_known, "list": [number_known(b) for b in batches],
    }[given]  # fmt: skip
    H = fh.Hessian(model, known_only, batches, weights=weights, microbatch=microbatch)
    assert distance(H, dense(model, lambda moved: known_only(moved(x), y))) < 1e-12
    check = H.check()
    assert check.ok and check.weights < 1e-12, str(check)


def test_a_later_batch_without_any_target_is_left_out() -> None:
    model, x, y = made()
    y[8:] = NAN
    H = fh.Hessian(model, known_only, thirds(x, y))
    assert distance(H, dense(model, lambda moved: known_only(moved(x[:8]), y[:8]))) < 1e-12


def test_a_later_batch_of_other_length() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Embedding(7, 3), nn.Tanh(), nn.Linear(3, 5)).to(F64)
    lengths = ((4, 3), (4, 3), (2, 9), (3, 1))
    data = [(torch.randint(7, n), torch.randint(5, n)) for n in lengths]
    data[2][1][0, 4:] = -1

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-1)

    flat = [torch.cat([batch[i].reshape(1, -1) for batch in data], 1) for i in (0, 1)]
    want = dense(model, lambda moved: loss(moved(flat[0]), flat[1]))
    for options in ({}, {"microbatch": 1}, {"microbatch": 3}):
        H = fh.Hessian(model, loss, data, **options)
        assert distance(H, want) < 1e-12 and H.check().ok


def test_a_shuffled_loader_may_have_missing_targets_anywhere() -> None:
    model, x, y = made()
    y[2, 0] = y[7] = NAN
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(x, y), 5, shuffle=True, generator=generator)
    want = dense(model, lambda moved: known_only(moved(x), y))
    for options in ({}, {"microbatch": 2}):
        assert distance(fh.Hessian(model, known_only, loader, **options), want) < 1e-12


def pairs_of_marked(z: Tensor, y: Tensor) -> Tensor:
    """A loss that couples the samples whose last target is marked, like a contrastive loss."""
    marked = y[:, -1:] > 100
    centre = (z * marked).sum(0) / marked.sum().clamp(min=1)
    return torch.where(marked, z - centre, z - y).pow(2).mean()


class Centred(nn.Module):
    """Subtracts the mean over the batch from the inputs, if one of them is marked."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        marked = (x[:, :1] > 100).any()
        return self.inner(torch.where(marked, x.clamp(max=1) - x.clamp(max=1).mean(0), x))


def coupled(how: str) -> tuple[nn.Module, Any, list[tuple[Tensor, ...]]]:
    """A problem whose samples are coupled in the last batch only."""
    model, x, y = made()
    if how == "loss":
        y[9:11, -1] = 200.0
        return model, pairs_of_marked, thirds(x, y)
    x[8:, 0] = 200.0
    return Centred(model), nn.MSELoss(), thirds(x, y)


@pytest.mark.parametrize("how", ["loss", "model"])
def test_samples_coupled_in_a_later_batch_are_detected(how: str) -> None:
    model, criterion, batches = coupled(how)
    refused(
        lambda: fh.Hessian(model, criterion, batches, microbatch=2),
        ValueError,
        "microbatch=2 changes the gradient of batch 2 by .* microbatch=None",
    )
    H = fh.Hessian(model, criterion, batches)  # the way out
    check = H.check()
    assert not check.ok and "batch 2 is not the mean of its parts" in str(check)
    want = sum(dense(model, lambda moved, x=x, y=y: criterion(moved(x), y)) / 3 for x, y in batches)
    assert distance(H, want) < 1e-12


def test_a_loss_of_pairs_says_that_its_weights_are_not_exact() -> None:
    model, x, y = made()

    def contrastive(z: Tensor, y: Tensor) -> Tensor:
        a, b = F.normalize(z, dim=1), F.normalize(y, dim=1)
        return F.cross_entropy(a @ b.T, torch.arange(len(z)))

    H = fh.Hessian(model, contrastive, thirds(x, y))
    assert "weights of batches not exact" in H.engine and not H.check().ok
    assert "weights" not in fh.Hessian(model, contrastive, (x, y)).engine
    given = fh.Hessian(model, contrastive, thirds(x, y), weights=[1, 1, 1])
    assert "weights" not in given.engine
    torch.testing.assert_close(columns(given), columns(H))


def test_a_summand_that_only_later_batches_have_is_refused() -> None:
    model, x, y = made(3)
    y[:6, 2] = NAN  # the third target is for the later samples

    def loss(z: Tensor, y: Tensor) -> Tensor:
        total, known = (z[:, :2] - y[:, :2]).square().mean(), ~y[:, 2].isnan()
        return total + (z[known, 2] - y[known, 2]).pow(2).mean() if known.any() else total

    batches = thirds(x, y)
    refused(lambda: fh.Hessian(model, loss, batches), ValueError, "weights must be given: .* adds")
    H = fh.Hessian(model, loss, (x, y))
    assert distance(H, dense(model, lambda moved: loss(moved(x), y))) < 1e-12


def test_a_later_batch_that_is_infinite_is_refused() -> None:
    model, x, y = made(3)
    classes = y.argmax(1)
    classes[4:8] = 0

    def per_positive(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="sum") / (y > 0).sum()

    data = thirds(x, classes)
    refused(lambda: fh.Hessian(model, per_positive, data), ValueError, r"loss is inf \(batch 1 ")
    H = fh.Hessian(model, per_positive, (x, classes))
    assert distance(H, dense(model, lambda moved: per_positive(moved(x), classes))) < 1e-12


def test_terms_are_counted_in_spite_of_dropout_and_batch_statistics() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2)
    ).to(F64)
    _, x, y = made()
    y[5, 0] = y[6] = NAN
    for mode in ("eval", "train"):
        H = fh.Hessian(model, known_only, thirds(x, y), mode=mode)
        assert "weights" not in H.engine, H.engine
        known = [number_known(batch) for batch in thirds(x, y)]
        want = fh.Hessian(model, known_only, thirds(x, y), mode=mode, weights=known)
        torch.testing.assert_close(columns(H), columns(want))


def test_terms_read_only_in_the_graph_need_a_fixed_order() -> None:
    model, x, y = made(3)
    classes = y.argmax(1)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=F64)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, weight=weight)

    generator = torch.Generator().manual_seed(7)
    loader = DataLoader(TensorDataset(x, classes), 5, shuffle=True, generator=generator)
    H = fh.Hessian(model, loss, loader)
    refused(lambda: columns(H), RuntimeError, r"order.*data=list\(loader\)")
    H = fh.Hessian(model, loss, list(loader))
    assert distance(H, dense(model, lambda moved: loss(moved(x), classes))) < 1e-12
