"""Detectors: they return a dictionary of losses in training, and take one target per image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fasthessian as fh
from tests.support.dense_losses import dense, distance
from tests.support.models import refused

F64 = torch.float64
SIZES = (3, 1, 2, 4, 3)  # boxes per image; the first image has as many boxes as channels


class Detector(nn.Module):
    """Returns losses in training mode, and detections otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.box, self.kind = nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, images: Any, targets: Any = None) -> Any:
        features = [torch.tanh(image.mean((1, 2)))[None] for image in images]
        if not self.training:
            return [{"boxes": self.box(f)} for f in features]
        boxes, kinds = [], []
        for f, target in zip(features, targets, strict=True):
            count = len(target["labels"])
            boxes.append(F.mse_loss(self.box(f).tanh().expand(count, 4), target["boxes"]))
            kinds.append(F.cross_entropy(self.kind(f).expand(count, 2), target["labels"]))
        return {"loss_box": torch.stack(boxes).mean(), "loss_kind": torch.stack(kinds).mean()}


def problem() -> tuple[Detector, list[Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    images = [torch.randn(3, 4, 5, dtype=F64) for _ in SIZES]
    targets = [
        {"boxes": torch.randn(n, 4, dtype=F64), "labels": torch.randint(2, (n,))} for n in SIZES
    ]
    return Detector().double().train(), images, targets


def paired(batch: Any) -> Any:
    return tuple(zip(*batch, strict=True))


def total(model: nn.Module, batch: Any) -> Tensor:
    return sum(model(*batch).values())


model, images, targets = problem()
FORMS: dict[str, Any] = {
    "one batch": (images, targets),
    "two batches": [(images[:2], targets[:2]), (images[2:], targets[2:])],
    "loader": DataLoader(list(zip(images, targets, strict=True)), batch_size=2, collate_fn=paired),
    "mappings": [
        {"images": images[:1], "targets": targets[:1]},
        {"images": images[1:], "targets": targets[1:]},
    ],
}


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("form", FORMS)
def test_a_detector_has_the_hessian_of_the_sum_of_its_losses(form, microbatch):
    if form == "mappings" and microbatch:
        return  # the mapping has no entry "labels", so nothing says what the targets are
    A = fh.Hessian(model, None, FORMS[form], mode="train", microbatch=microbatch)
    want = dense(model, lambda m: total(m, (images, targets)))
    assert distance(A, want) < 1e-12
    assert "the loss is the sum of 'loss_box', 'loss_kind'" in A.engine
    if form != "mappings":
        assert "weights of batches" not in A.engine
        assert A.check().ok


def test_a_detector_in_eval_mode_is_refused_and_mode_train_works():
    refused(
        lambda: fh.Hessian(model, None, (images, targets)),
        ValueError,
        r"returned list without a loss; .*mode='train'",
    )
    fh.Hessian(model, None, (images, targets), mode="train")


RETURNS: dict[str, Any] = {
    "sum": total,
    "dictionary": lambda model, batch: model(*batch),
    "tuple with a log": lambda model, batch: (total(model, batch), {"step": 1}),
    "output with loss": lambda model, batch: {"loss": total(model, batch), "step": 1},
}


@pytest.mark.parametrize("name", RETURNS)
def test_a_loss_of_the_model_may_return_more_than_the_scalar(name):
    A = fh.Hessian(model, RETURNS[name], FORMS["two batches"], mode="train")
    assert distance(A, dense(model, lambda m: total(m, (images, targets)))) < 1e-12


def test_two_scalars_are_refused():
    def both(model: nn.Module, batch: Any) -> Any:
        return tuple(model(*batch).values())

    refused(
        lambda: fh.Hessian(model, both, (images, targets), mode="train"),
        ValueError,
        r"criterion\(model, batch\) returned tuple without a loss; return the scalar alone",
    )


class Auxiliary(nn.Module):
    """Has a second output in training mode, like GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return (self.a(x), self.b(x)) if self.training else self.a(x)


def with_auxiliary(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], targets) + 0.4 * F.cross_entropy(outputs[1], targets)


@pytest.mark.parametrize("options", [{}, {"microbatch": 4}])
def test_models_with_other_outputs_in_training_are_checked(options):
    torch.manual_seed(0)
    model, x, y = Auxiliary().double(), torch.randn(8, 4, dtype=F64), torch.randint(3, (8,))
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    A = fh.Hessian(model, with_auxiliary, data, mode="train", **options)
    assert distance(A, dense(model.train(), lambda m: _both(model, m, x, y))) < 1e-12
    assert A.check().ok, A.check()


def _both(model: nn.Module, moved: Any, x: Tensor, y: Tensor) -> Tensor:
    return with_auxiliary(moved(x), y)


def test_a_detector_of_one_batch_is_checked():
    A = fh.Hessian(model, total, (images, targets), mode="train")
    check = A.check()
    assert check.ok, check


class LossInTraining(nn.Linear):
    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        out = super().forward(x)
        return {"loss": F.cross_entropy(out, y)} if self.training else out


def test_a_model_with_a_loss_only_in_training_is_refused_in_eval_mode():
    torch.manual_seed(0)
    data = torch.randn(8, 4), torch.randint(3, (8,))
    refused(
        lambda: fh.Hessian(LossInTraining(4, 3), None, data),
        ValueError,
        r"shape \(8, 3\); pass a criterion, or mode='train'",
    )
    fh.Hessian(LossInTraining(4, 3), None, data, mode="train")


def test_a_dictionary_of_losses_and_their_total_is_refused():
    def counted(model: nn.Module, batch: Any) -> Any:
        found = model(*batch)
        return {**found, "total_loss": sum(found.values())}

    refused(
        lambda: fh.Hessian(model, counted, (images, targets), mode="train"),
        ValueError,
        r"returned dict without a loss; return the scalar alone",
    )
