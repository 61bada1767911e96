"""The terms of losses that are not torch's are counted from the computation of the loss."""

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

pytestmark = pytest.mark.slow

CUTS = ((0, 3), (3, 4), (4, 9), (9, 11))
CLASS_WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=F64)


def made() -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A network, inputs, and targets: numbers, some of them missing; classes, some ignored."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(F64)
    x, real = torch.randn(11, 3, dtype=F64), torch.randn(11, 3, dtype=F64)
    real[3], real[5, 0], real[6, :2], real[9, 1:] = NAN, NAN, NAN, NAN  # sample 3 is one batch
    classes = torch.tensor([0, 2, -100, 1, 1, 2, -100, -100, 0, 1, 2])
    return model, x, {"real": real, "classes": classes, "all": classes.clamp(min=0)}


def cut(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tuple(t[a:b] for t in tensors) for a, b in CUTS]


class Opaque(torch.autograd.Function):
    """The identity, as a custom function: no denominator can be read through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 1


def squares(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    known = ~y.isnan()
    return torch.where(known, z - y.nan_to_num(), 0.0).square(), known


def own_count(z: Tensor, y: Tensor) -> Tensor:
    total, known = squares(z, y)
    return total.sum() / max(1, int(known.sum()))


def clamped_count(z: Tensor, y: Tensor) -> Tensor:
    total, known = squares(z, y)
    return total.sum() / known.sum().clamp(min=1)


def guarded(z: Tensor, y: Tensor) -> Tensor:
    total, known = squares(z, y)
    return torch.where(known.any(), total.sum() / known.sum().clamp(min=1), 0.0)


def missing_are_zero(z: Tensor, y: Tensor) -> Tensor:
    return squares(z, y)[0].mean()


def mean_of_samples(z: Tensor, y: Tensor) -> Tensor:
    total, known = squares(z, y)
    return (total.sum(1) / known.sum(1).clamp(min=1)).mean()


def one_by_one(z: Tensor, y: Tensor) -> Tensor:
    total, _ = squares(z, y)
    return sum(a.sum() / 3 for a in total) / len(total)  # type: ignore[return-value]


def by_class(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, weight=CLASS_WEIGHT)


def chosen_rows(z: Tensor, y: Tensor) -> Tensor:
    return -z.log_softmax(1)[y >= 0, y[y >= 0]].mean()


def over_positives(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    return (losses * (y > 0)).sum() / (y > 0).sum().clamp(min=1)


def summed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum")


LOSSES: dict[str, tuple[Any, str]] = {
    **{
        f.__name__: (f, "real")
        for f in (known_only, own_count, clamped_count, guarded, missing_are_zero)
    },
    **{f.__name__: (f, "real") for f in (mean_of_samples, one_by_one)},
    **{f.__name__: (f, "classes") for f in (by_class, chosen_rows, summed)},
    "over_positives": (over_positives, "all"),
    "half": (lambda z, y: 0.5 * known_only(z, y), "real"),
    "three times a sum": (lambda z, y: 3 * summed(z, y), "classes"),
    "opaque mean": (lambda z, y: Opaque.apply(known_only(z, y)), "real"),
    "opaque sum": (lambda z, y: Opaque.apply(summed(z, y)), "classes"),
    "opaque classes": (lambda z, y: Opaque.apply(F.cross_entropy(z, y)), "classes"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_batches_and_microbatches_give_what_one_batch_gives(name: str) -> None:
    model, x, targets = made()
    loss, kind = LOSSES[name]
    y = targets[kind]
    want = dense(model, lambda moved: loss(moved(x), y))
    forms = {
        "batches": (cut(x, y), {}),
        "in reverse": (cut(x, y)[::-1], {}),
        "microbatches": ((x, y), {"microbatch": 2}),
        "loader": (DataLoader(TensorDataset(x, y), 4), {}),
    }
    for form, (data, options) in forms.items():
        H = fh.Hessian(model, loss, data, **options)
        assert distance(H, want) < 1e-12, form
        assert abs(H.loss() - float(loss(model(x), y).detach())) < 1e-12, form
        assert "weights" not in H.engine, (form, H.engine)
        check = H.check()
        assert check.ok, (form, str(check))
        if "opaque" not in name:
            G = fh.GaussNewton(model, loss, data, **options)
            one = fh.GaussNewton(model, loss, (x, y))
            assert distance(G, columns(one)) < 1e-12, form


def test_a_penalty_on_parameters_counts_once_next_to_a_mean() -> None:
    model, x, targets = made()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        penalty = sum(p.pow(4).sum() for p in model.parameters())
        return chosen_rows(z, y) + 1e-2 * penalty

    one = fh.Hessian(model, loss, (x, targets["classes"]))
    assert distance(fh.Hessian(model, loss, cut(x, targets["classes"])), columns(one)) < 1e-12


# Fisher matrices


def outer(model: nn.Module, loss: Any, x: Tensor, y: Tensor, rows: Any = None) -> Tensor:
    """The sum of g g' over the samples, where g is the gradient of one sample's loss."""
    total: Any = 0
    for i in range(len(x)) if rows is None else rows:
        pieces = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), model.parameters())
        g = torch.cat([piece.reshape(-1) for piece in pieces])
        total = total + torch.outer(g, g)
    return total


def focal(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    return (1 - torch.exp(-losses)) * losses


FISHERS: dict[str, tuple[Any, str, bool]] = {
    "sum of cross-entropies": (summed, "classes", True),
    "sum of squares": (lambda z, y: (z - y.nan_to_num()).square().sum(), "real", True),
    "sum of focal losses": (lambda z, y: focal(z, y).sum(), "all", True),
    "mean of focal losses": (lambda z, y: focal(z, y).mean(), "all", False),
    "divided by its own count": (
        lambda z, y: focal(z, y).sum() / (y >= 0).sum(), "classes", False,
    ),
    "half a mean": (lambda z, y: 0.5 * F.cross_entropy(z, y), "classes", False),
    "half of squares": (
        lambda z, y: (z - y.nan_to_num()).square().sum() / (2 * len(z)), "real", False,
    ),
    "opaque sum": (lambda z, y: Opaque.apply(focal(z, y).sum()), "all", True),
}  # fmt: skip


@pytest.mark.parametrize("name", FISHERS)
def test_an_empirical_fisher_tells_a_sum_from_a_mean(name: str) -> None:
    model, x, targets = made()
    loss, kind, is_sum = FISHERS[name]
    y = targets[kind]
    rows = [i for i in range(11) if kind != "classes" or y[i] >= 0]
    want = outer(model, loss, x, y, rows) / (1 if is_sum else len(rows))
    for data, options in (((x, y), {}), (cut(x, y), {}), ((x, y), {"microbatch": 3})):
        A = fh.EmpiricalFisher(model, loss, data, **options)
        assert distance(A, want) < 1e-12 and A.check().ok


def test_class_weights_of_a_function_are_those_of_the_criterion() -> None:
    model, x, targets = made()
    y = targets["classes"]
    want = columns(fh.EmpiricalFisher(model, nn.CrossEntropyLoss(weight=CLASS_WEIGHT), (x, y)))
    for data in ((x, y), cut(x, y)):
        assert distance(fh.EmpiricalFisher(model, by_class, data), want) < 1e-12


# Losses whose terms cannot be counted, and what counting costs


def two_means(z: Tensor, y: Tensor) -> Tensor:
    return known_only(z, y) + z.pow(4).mean()


def per_positive(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum") / (y > 0).sum().clamp(min=1)


@pytest.mark.parametrize(
    ("loss", "kind", "words"),
    [
        (two_means, "real", "weights must be given: the loss adds means over different numbers"),
        (per_positive, "all", "data must be one batch: .* nonzero entries of the targets"),
    ],
)
def test_a_loss_that_no_weights_fit_is_refused(loss: Any, kind: str, words: str) -> None:
    model, x, targets = made()
    y = targets[kind]
    x, y = torch.cat([x[:3], x[4:]]), torch.cat([y[:3], y[4:]])  # so that every batch has a target
    batches = [(x[:4], y[:4]), (x[4:7], y[4:7]), (x[7:], y[7:])]
    if kind == "all":
        y[4:7] = 0
    refused(lambda: fh.Hessian(model, loss, batches), ValueError, words)
    want = dense(model, lambda moved: loss(moved(x), y))
    assert distance(fh.Hessian(model, loss, (x, y)), want) < 1e-12  # the way out
    if kind == "real":
        weights = [1.0, 2.0, 3.0]
        want = sum(
            w / 6 * dense(model, lambda moved, a=a, b=b: loss(moved(a), b))
            for w, (a, b) in zip(weights, batches, strict=True)
        )
        assert distance(fh.Hessian(model, loss, batches, weights=weights), want) < 1e-12
        for given in (weights, lambda batch: len(batch[0])):
            H = fh.Hessian(model, loss, batches, weights=given)
            assert not H.check().ok  # but it raises no error


def test_single_samples_of_an_opaque_loss_ask_for_weights() -> None:
    model, x, targets = made()
    x, y = x[4:], targets["real"][4:]
    batches = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    loss = LOSSES["opaque mean"][0]
    refused(
        lambda: fh.Hessian(model, loss, batches),
        ValueError,
        "given: .*=lambda batch",
    )
    H = fh.Hessian(model, loss, batches, weights=lambda batch: (~batch[1].isnan()).sum())
    assert distance(H, dense(model, lambda moved: loss(moved(x), y))) < 1e-12


@pytest.mark.parametrize("noise", [0.0, 1e-16])
def test_terms_are_counted_where_gradients_are_rounding_errors(noise: float) -> None:
    torch.manual_seed(2)
    model, x = nn.Linear(3, 2).to(F64), torch.randn(11, 3, dtype=F64)
    y = model(x).detach() + noise * torch.randn(11, 2, dtype=F64)
    y[5, 0] = y[6] = NAN
    for loss in (known_only, lambda z, y: Opaque.apply(known_only(z, y))):
        want = dense(model, lambda moved, loss=loss: loss(moved(x), y))
        for data, options in ((cut(x, y), {}), ((x, y), {"microbatch": 2})):
            H = fh.Hessian(model, loss, data, **options)
            assert distance(H, want) < 1e-12 and H.check().ok, (H.engine, str(H.check()))


def test_terms_are_counted_again_after_changes_of_data_and_parameters() -> None:
    model, x, targets = made()
    y = targets["real"]
    data = cut(x, y)
    H = fh.Hessian(model, known_only, data)
    y.numpy()[0] = NAN
    assert distance(H, dense(model, lambda moved: known_only(moved(x), y))) < 1e-12

    def hard(z: Tensor, y: Tensor) -> Tensor:  # the parameters decide which samples count
        losses = F.cross_entropy(z, y, reduction="none")
        return losses[losses.detach() > 1].mean()

    y = targets["all"]
    H = fh.Hessian(model, hard, [(x[:6], y[:6]), (x[6:], y[6:])])
    for _ in range(3):
        assert distance(H, dense(model, lambda moved: hard(moved(x), y))) < 1e-12
        with torch.no_grad():
            model[2].bias.add_(torch.tensor([0.5, -0.5, 0.0]))


def test_counting_costs_few_evaluations_and_none_for_one_batch() -> None:
    model, x, targets = made()
    calls: list[int] = []

    def loss(z: Tensor, y: Tensor) -> Tensor:
        calls.append(len(y))
        return known_only(z, y)

    y = targets["real"].nan_to_num()
    many = [(x, y) for _ in range(20)]
    many[13] = x, targets["real"]

    def made_by(criterion: Any, data: Any) -> int:
        calls.clear()
        fh.Hessian(model, criterion, data, engine="recompute")
        return len(calls)

    one = made_by(loss, (x, y))
    # each batch once, and for each of two trials a batch and its halves
    assert made_by(loss, many) <= one + len(many) + 2 * 3
    calls.clear()
    H = fh.Hessian(model, loss, many, engine="recompute")
    calls.clear()
    H @ torch.ones(H.n, dtype=F64)
    assert len(calls) == len(many)
