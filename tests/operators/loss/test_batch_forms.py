"""Forms of batches and outputs that are accepted, and the messages for those that are not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasthessian as fh
from tests.support.dense_losses import dense, distance
from tests.support.models import refused

F64 = torch.float64
CE = nn.CrossEntropyLoss()


class Output(dict):
    """Like a model output of Hugging Face: a mapping with attributes."""

    __getattr__ = dict.__getitem__


class Pair(nn.Module):
    """Takes two tensors as one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, inputs: Any) -> Tensor:
        one, two = inputs
        return self.a(torch.tanh(one) + two)


class Either(Pair):
    """Takes two tensors as two arguments."""

    def forward(self, one: Tensor, two: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward((one, two))


class Keys(Pair):
    """Takes a mapping as one argument."""

    def forward(self, batch: Any) -> Tensor:
        return super().forward((batch["one"], batch["two"]))


class Words(Pair):
    """Takes keyword arguments."""

    def forward(self, *, one: Tensor, two: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward((one, two))


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 6, 3, dtype=F64, generator=generator)
    return x, z, torch.randint(3, (6,), generator=generator)


x, z, y = problem()


def by_y(out: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(out, batch["y"])


INPUTS: dict[str, tuple[type[Pair], Any, Any]] = {
    "list as one argument": (Pair, CE, ([x, z], y)),
    "tuple as one argument": (Pair, CE, ((x, z), y)),
    "list in a list of batches": (Pair, CE, [([x[:2], z[:2]], y[:2]), ([x[2:], z[2:]], y[2:])]),
    "list as two arguments": (Either, CE, ([x, z], y)),
    "three entries": (Either, CE, (x, z, y)),
    "mapping as one argument": (Keys, by_y, {"one": x, "two": z, "y": y}),
    "mapping and targets": (Keys, CE, ({"one": x, "two": z}, y)),
    "keywords and targets": (Words, CE, ({"one": x, "two": z}, y)),
}


def linear(layer: nn.Module, reduction: str = "mean") -> Tensor:
    """The loss as a function of the linear layer alone."""
    return F.cross_entropy(layer(torch.tanh(x) + z), y, reduction=reduction)


def made(kind: type[Any]) -> Any:
    torch.manual_seed(1)
    return kind().double()


@pytest.mark.parametrize("engine", ["auto", "forward"])
@pytest.mark.parametrize("name", INPUTS)
def test_forward_gets_the_batch_in_the_form_it_takes(name, engine):
    kind, criterion, batch = INPUTS[name]
    model = made(kind)
    A = fh.Hessian(model, criterion, batch, engine=engine)
    assert distance(A, dense(model.a, linear)) < 1e-12


class WithLogits(Pair):
    def forward(self, inputs: Any) -> Any:
        return Output(logits=super().forward(inputs), hidden=inputs[0])


class LogitsAndLoss(Pair):
    """Returns (logits, loss), as nanoGPT does."""

    def forward(self, inputs: Any, targets: Any = None) -> Any:
        out = super().forward(inputs)
        return out, None if targets is None else F.cross_entropy(out, targets)


class LossAndLogits(Pair):
    """Returns (loss, logits), as models of Hugging Face do for return_dict=False."""

    def forward(self, inputs: Any, targets: Any) -> Any:  # type: ignore[override]
        out = super().forward(inputs)
        return F.cross_entropy(out, targets), out


class Losses(Pair):
    """Returns a dictionary of losses, as detection models do in training."""

    def forward(self, inputs: Any, targets: Any) -> Any:  # type: ignore[override]
        out = super().forward(inputs)
        return {
            "loss_class": F.cross_entropy(out, targets),
            "loss_box": self.a.weight.square().sum(),
        }


def penalised(layer: Any) -> Tensor:
    return linear(layer) + (layer(torch.eye(3).double()) - layer(x[:1] * 0)).square().sum()


OUTPUTS: dict[str, tuple[type[Pair], Any, Any]] = {
    "logits with torch's criterion": (WithLogits, CE, ([x, z], y)),
    "logits with a function": (WithLogits, lambda out, y: CE(out.logits, y), ([x, z], y)),
    "logits and loss": (LogitsAndLoss, None, ([x, z], y)),
    "logits and loss by names": (LogitsAndLoss, None, {"inputs": [x, z], "targets": y}),
    "loss and logits": (LossAndLogits, None, ([x, z], y)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_loss_is_found_in_what_the_model_returns(name):
    kind, criterion, batch = OUTPUTS[name]
    model = made(kind)
    want = dense(model.a, linear)
    assert distance(fh.Hessian(model, criterion, batch), want) < 1e-12
    assert distance(fh.GaussNewton(model, criterion, batch), want) < 1e-12  # linear in theta


def test_ragged_batches_of_logits_and_loss_count_their_targets():
    parts = [([x[:2], z[:2]], y[:2]), ([x[2:], z[2:]], y[2:])]
    model = made(LogitsAndLoss)
    assert distance(fh.Hessian(model, None, parts), dense(model.a, linear)) < 1e-12


def test_a_dictionary_of_losses_is_summed_and_engine_says_so():
    model = made(Losses)
    A = fh.Hessian(model, None, ([x, z], y))
    assert distance(A, dense(model.a, penalised)) < 1e-12
    assert "the loss is the sum of 'loss_class', 'loss_box'" in A.engine


class WithMetrics(Losses):
    def forward(self, inputs: Any, targets: Any) -> Any:
        return {**super().forward(inputs, targets), "class_error": self.a.bias.sum()}


def test_a_dictionary_of_losses_and_metrics_is_refused_with_a_way_out():
    model = made(WithMetrics)
    refused(lambda: fh.Hessian(model, None, ([x, z], y)), ValueError, "model.*batch.*sum")

    def both(model: nn.Module, batch: Any) -> Tensor:
        found = model(*batch)
        return found["loss_class"] + found["loss_box"]

    assert distance(fh.Hessian(model, both, ([x, z], y)), dense(model.a, penalised)) < 1e-12


def alone(model: nn.Linear) -> nn.Linear:
    """A torch layer with the same parameters."""
    layer = nn.Linear(3, 3).double()
    layer.load_state_dict(model.state_dict())
    return layer


class Small(nn.Linear):
    """Returns (logits, loss), as nanoGPT does."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:  # type: ignore[override]
        out = super().forward(idx)
        return out, None if targets is None else F.cross_entropy(out, targets)


def test_a_criterion_that_returns_none_is_refused_with_a_way_out():
    model, batch = Small(3, 3).double(), (torch.tanh(x) + z, y)
    refused(
        lambda: fh.Hessian(model, lambda out, _: out[1], batch),
        TypeError,
        r"criterion must return a tensor, got NoneType.*criterion=None",
    )
    assert distance(fh.Hessian(model, None, batch), dense(alone(model), linear)) < 1e-12


def test_the_last_of_three_entries_is_the_targets_and_the_way_out_works():
    model = nn.Linear(3, 3).double()
    triple = (torch.tanh(x) + z, y, torch.arange(6))
    refused(
        lambda: fh.Hessian(model, CE, triple),
        TypeError,
        r"the last entry is the targets; or pass as criterion a function of \(model, batch\), as "
        r"lambda model, batch: loss\(model\(batch\[0\]\), batch\[1\]\)",
    )
    A = fh.Hessian(model, lambda model, batch: CE(model(batch[0]), batch[1]), triple)
    assert distance(A, dense(model, linear)) < 1e-12


def test_endless_iterators_are_refused_with_a_way_out():
    batches = itertools.cycle([(x, y)])
    refused(
        lambda: fh.Hessian(nn.Linear(3, 3).double(), CE, batches),
        TypeError,
        r"itertools.cycle, which has no end; .*list\(itertools.islice\(data, count\)\)",
    )
    fh.Hessian(nn.Linear(3, 3).double(), CE, list(itertools.islice(batches, 2)))

    def endless() -> Any:
        while True:
            yield x, y

    with pytest.raises(
        TypeError, match=r"list\(itertools.islice\(data, count\)\) if it has no end"
    ):
        fh.Hessian(nn.Linear(3, 3).double(), CE, endless())


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 3:
            raise RuntimeError("at most three samples of any type")
        return super().forward(x)


def test_errors_of_the_users_own_code_are_raised_as_they_are():
    with pytest.raises(RuntimeError, match=r"^at most three samples of any type$"):
        fh.Hessian(Own(3, 3).double(), CE, (x, y))

    def criterion(out: Tensor, y: Tensor) -> Tensor:
        return {"mean": out.mean()}["median"]

    with pytest.raises(KeyError, match="median"):
        fh.Hessian(nn.Linear(3, 3).double(), criterion, (x, y))


def test_errors_raised_inside_torch_describe_the_batch():
    model = nn.Sequential(nn.Linear(3, 3)).double()
    for batch, words in (
        ((x[:, :2], y), r"shapes.*a batch is \(Tensor \(6, 2\), Tensor \(6,\)\).*\(model, batch\)"),
        ((x, y[:4]), r"batch_size.*Tensor \(4,\)"),
        (({"x": x}, y), r"must be Tensor, not dict.*\{'x': Tensor \(6, 3\)\}"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            fh.Hessian(model, CE, batch)


def test_gauss_newton_of_a_loss_of_a_model_that_returns_logits_and_loss():
    model = Small(3, 3).double()
    batch = torch.tanh(x) + z, y
    want = dense(alone(model), linear)  # the model is linear
    for kind in (fh.Hessian, fh.GaussNewton):
        assert distance(kind(model, lambda model, b: model(*b)[1], batch), want) < 1e-12
