"""Forms of data, and weights of batches: batches of any size give the matrix of one batch."""

from __future__ import annotations

import functools
from collections import UserDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasthessian as fh
from tests.support.models import ENGINES, PROBLEMS, columns, error

CUTS = ((0, 5), (5, 6), (6, 11))  # ragged, one batch of a single sample


def _classes(*shape: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    x, y = torch.randn(11, 4, *shape), torch.randint(3, (11, *shape))
    layer = nn.Conv1d(4, 3, 1) if shape else nn.Linear(4, 3)
    return nn.Sequential(layer, nn.Tanh()).double(), x.double(), y


def _ignoring(criterion: Any, ignored: int, *shape: int) -> Any:
    model, x, y = _classes(*shape)
    y[0], y[5], y[7:9] = ignored, ignored, ignored  # the batch of one has no term at all
    return model, criterion, x, y


def _elements(criterion: Any, low: float = -1.0, high: float = 1.0) -> Any:
    model, x, _ = _classes()
    return model, criterion, x, torch.empty(11, 3).uniform_(low, high).double()


def _probabilities() -> Any:
    model, criterion, x, y = _elements(nn.CrossEntropyLoss(label_smoothing=0.1))
    return model, criterion, x, y.softmax(-1)


class LogSoftmax(nn.Module):
    """A network for losses that take log-probabilities."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).log_softmax(1)


def _logarithmic(made: Any) -> Any:
    model, criterion, x, y = made
    return LogSoftmax(model), criterion, x, y


class OwnCrossEntropy(nn.Module):
    """A loss with an ``ignore_index`` and no ``reduction``."""

    ignore_index = -1

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, ignore_index=-1)


W3 = torch.tensor([0.2, 1.0, 5.0]).double()
LOSSES: dict[str, Any] = {
    "cross entropy": lambda: _ignoring(nn.CrossEntropyLoss(), -100),
    "cross entropy, sum": lambda: _ignoring(nn.CrossEntropyLoss(reduction="sum"), -100),
    "cross entropy, class weights": lambda: _ignoring(nn.CrossEntropyLoss(weight=W3), -100),
    "cross entropy, smoothed": lambda: _ignoring(
        nn.CrossEntropyLoss(W3, label_smoothing=0.2), -100
    ),
    "cross entropy, ignore 1": lambda: _ignoring(nn.CrossEntropyLoss(ignore_index=1), 1),
    "cross entropy of sequences": lambda: _ignoring(nn.CrossEntropyLoss(), -100, 6),
    "probabilities": _probabilities,
    "nll": lambda: _logarithmic(_ignoring(nn.NLLLoss(weight=W3), -100)),
    "F.cross_entropy": lambda: _ignoring(F.cross_entropy, -100),
    "F.nll_loss": lambda: _logarithmic(_ignoring(F.nll_loss, -100)),
    "partial": lambda: _ignoring(functools.partial(F.cross_entropy, ignore_index=2), 2),
    "partial, sum": lambda: _ignoring(functools.partial(F.cross_entropy, reduction="sum"), -100),
    "own loss, ignore": lambda: _ignoring(OwnCrossEntropy(), -1),
    "own loss, samples": lambda: _elements(lambda out, y: (out - y).pow(4).sum(-1).mean()),
    "mse": lambda: _elements(nn.MSELoss()),
    "mse, sum": lambda: _elements(nn.MSELoss(reduction="sum")),
    "F.mse_loss": lambda: _elements(F.mse_loss),
    "smooth l1": lambda: _elements(nn.SmoothL1Loss(beta=3.0)),
    "huber": lambda: _elements(nn.HuberLoss(delta=3.0)),
    "bce": lambda: _elements(nn.BCEWithLogitsLoss(), 0.0),
    "bce, positive weight": lambda: _elements(nn.BCEWithLogitsLoss(pos_weight=W3), 0.0),
    "kl, batchmean": lambda: _logarithmic(_elements(nn.KLDivLoss(reduction="batchmean"), 0.1)),
    "kl, mean": lambda: _logarithmic(_elements(F.kl_div, 0.1)),
    "poisson": lambda: _elements(nn.PoissonNLLLoss(), 0.0),
    "soft margin": lambda: _elements(nn.SoftMarginLoss()),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.parametrize("name", LOSSES)
def test_ragged_batches_give_what_one_batch_gives(name: str) -> None:
    model, criterion, x, y = LOSSES[name]()
    model.eval()
    loss = criterion(model(x), y)
    (gradient,) = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])]
    one = fh.Hessian(model, criterion, (x, y))
    H = columns(one)
    batches = [(x[a:b], y[a:b]) for a, b in CUTS]
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    assert float(H.abs().max()) > 1e-3
    for data in (batches, loader):
        for engine in ENGINES:
            A = fh.Hessian(model, criterion, data, engine=engine)
            assert A.loss() == pytest.approx(float(loss.detach()), rel=1e-12)
            assert (A.gradient() - gradient).norm() <= 1e-12 * gradient.norm()
            assert error(columns(A), H) < 1e-12


def test_losses_without_a_reduction_count_samples_not_elements() -> None:
    torch.manual_seed(0)
    model, draw = nn.Linear(4, 2).double(), torch.randn(30, 4).double()
    batches = [(draw[:6].view(2, 3, 4), draw[:6, :2].reshape(2, 3, 2)),
               (draw[6:30].view(3, 8, 4), draw[6:30, 2:].reshape(3, 8, 2))]  # fmt: skip

    def per_sample(out: Tensor, y: Tensor) -> Tensor:
        return (out - y).pow(4).flatten(1).sum(1).mean()

    parts = [columns(fh.Hessian(model, per_sample, batch)) for batch in batches]
    H = columns(fh.Hessian(model, per_sample, batches))
    assert error(H, (2 * parts[0] + 3 * parts[1]) / 5) < 1e-14


def test_weights_as_numbers_or_as_a_function_are_terms_of_a_mean() -> None:
    model, criterion, (x, y) = PROBLEMS["mlp"].make()
    batches = [(x[a:b], y[a:b]) for a, b in CUTS]
    parts = [columns(fh.Hessian(model, criterion, batch)) for batch in batches]
    summing = nn.CrossEntropyLoss(reduction="none")
    whole = columns(fh.Hessian(model, criterion, (x, y)))
    for weights in ([1, 2, 5], (1.0, 2.0, 5.0), torch.tensor([1, 2, 5]), [2e3, 4e3, 1e4]):
        A = fh.Hessian(model, criterion, batches, weights=weights)
        assert error(columns(A), (parts[0] + 2 * parts[1] + 5 * parts[2]) / 8) < 1e-14
    A = fh.Hessian(model, criterion, batches, weights=[1, 0, 0])
    assert torch.equal(columns(A), parts[0])
    A = fh.Hessian(model, lambda out, t: summing(out, t).mean(), batches,
                   weights=lambda batch: len(batch[0]))  # fmt: skip
    assert error(columns(A), whole) < 1e-14


class Sum(nn.Module):
    """Takes one input, two positional inputs, or two keyword inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor | float = 0.0) -> Tensor:
        return torch.tanh(self.layer(a + b))


class WithLoss(nn.Module):
    """Like a Hugging Face model: it takes keywords, and returns a loss if there are labels."""

    def __init__(self, inner: nn.Module, wrap: Any) -> None:
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, a: Tensor, b: Tensor | float = 0.0, labels: Tensor | None = None) -> Any:
        out = self.inner(a, b)
        return self.wrap(F.cross_entropy(out, labels)) if labels is not None else out


def _two_inputs() -> tuple[Sum, nn.Module, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    model, a, b, y = Sum().double(), torch.randn(7, 4), torch.randn(7, 4), torch.randint(3, (7,))
    a, b = a.double(), b.double()
    expected = columns(fh.Hessian(model, nn.CrossEntropyLoss(), (a + b, y)))
    return model, nn.CrossEntropyLoss(), a, b, y, expected


def test_every_form_of_a_batch_gives_the_same_hessian() -> None:
    model, criterion, a, b, y, expected = _two_inputs()
    Pair = namedtuple("Pair", "inputs targets")
    forms = (
        (a + b, y), [a + b, y], [(a + b, y)], [[a + b, y]], Pair(a + b, y), [Pair(a + b, y)],
        (a, b, y), [(a, b, y)], ((a, b), y), [([a, b], y)],
        DataLoader([(a + b, y)], batch_size=None),
        DataLoader(TensorDataset(a, b, y), batch_size=3),
    )  # fmt: skip
    for data in forms:
        assert error(columns(fh.Hessian(model, criterion, data)), expected) < 1e-13


@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: {"loss": loss},
                                  lambda loss: SimpleNamespace(loss=loss)])  # fmt: skip
def test_mappings_and_models_that_return_their_loss(wrap: Any) -> None:
    inner, _, a, b, y, expected = _two_inputs()
    model = WithLoss(inner, wrap)
    batch = {"a": a, "b": b, "labels": y}
    cut = [{k: t[i:j] for k, t in batch.items()} for i, j in ((0, 2), (2, 7))]
    for data in (
        batch,
        UserDict(batch),
        cut,
        (a, b, y),
        [(a[:3], b[:3], y[:3]), (a[3:], b[3:], y[3:])],
    ):
        assert error(columns(fh.Hessian(model, None, data)), expected) < 1e-13
    y[2:5] = -100  # labels that the model's own loss leaves out
    expected = columns(fh.Hessian(model, None, batch))
    assert error(columns(fh.Hessian(model, None, cut)), expected) < 1e-13


def test_a_criterion_of_a_mapping_gets_outputs_and_batch() -> None:
    model, _, a, b, y, expected = _two_inputs()

    class Inputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, a: Tensor, b: Tensor, target: Tensor) -> Tensor:
            return self.model(a, b)

    cut = [{"a": a[i:j], "b": b[i:j], "target": y[i:j]} for i, j in ((0, 2), (2, 7))]
    A = fh.Hessian(Inputs(), lambda out, batch: F.cross_entropy(out, batch["target"]), cut)
    assert error(columns(A), expected) < 1e-13


def test_causal_language_models_have_no_term_for_the_first_label() -> None:
    class TinyForCausalLM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.head(torch.tanh(self.embed(input_ids)))
            return {"loss": F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])}

    torch.manual_seed(0)
    model, tokens = TinyForCausalLM().double(), torch.randint(5, (4, 6))
    labels = tokens.clone()
    labels[0, 3:] = labels[2, 1:4] = labels[3, 0] = -100
    whole = {"input_ids": tokens, "labels": labels}
    cut = [{k: t[i:j] for k, t in whole.items()} for i, j in ((0, 1), (1, 4))]
    expected = columns(fh.Hessian(model, None, whole))
    assert error(columns(fh.Hessian(model, None, cut)), expected) < 1e-13


def test_sparse_inputs_and_objects_with_their_own_to() -> None:
    class Graph:
        def __init__(self, edges: Tensor) -> None:
            self.edges = edges

        def to(self, device: torch.device) -> Graph:
            return Graph(self.edges.to(device))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, graph: Any, x: Tensor) -> Tensor:
            edges = graph.edges if isinstance(graph, Graph) else graph
            return torch.tanh(torch.sparse.mm(edges, self.layer(x)))

    torch.manual_seed(0)
    x, y, edges = (
        torch.randn(6, 4).double(),
        torch.randint(3, (6,)),
        torch.rand(6, 6).double().round(),
    )
    model, criterion = Net().double(), nn.CrossEntropyLoss()
    expected = columns(fh.Hessian(model, criterion, (Graph(edges), x, y)))
    for data in (
        (edges.to_sparse(), x, y),
        DataLoader([(edges.to_sparse(), x, y)], batch_size=None),
    ):
        for engine in ENGINES:
            A = fh.Hessian(model, criterion, data, engine=engine)
            assert error(columns(A), expected) < 1e-12
