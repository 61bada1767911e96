"""A criterion that is a loss of (model, batch): forms of data, all matrices, weights, errors."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.utils.data import DataLoader, TensorDataset

import fasthessian as fh
from tests.support.dense_losses import dense, distance
from tests.support.models import ALL_ENGINES, columns

F64 = torch.float64
CE = nn.CrossEntropyLoss()


def data(n: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, dtype=F64, generator=generator)
    return x, torch.randint(3, (n,), generator=generator)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch[:2]
    return F.cross_entropy(model(x), y)


class Graph:
    """Like a batch of torch_geometric: iterable over pairs, with attributes and .to."""

    def __init__(self, x: Tensor, graph: Tensor, y: Tensor) -> None:
        self.x, self.graph, self.y = x, graph, y

    def __iter__(self) -> Any:
        return iter(vars(self).items())

    def to(self, device: Any) -> Graph:
        return Graph(*(t.to(device) for t in vars(self).values()))


class Pooled(nn.Module):
    """A linear layer on nodes, summed over each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, g: Graph) -> Tensor:
        h = torch.tanh(self.a(g.x))
        return self.b(h.new_zeros(len(g.y), 4).index_add(0, g.graph, h))


def graphs() -> list[Graph]:
    torch.manual_seed(2)
    return [
        Graph(torch.randn(2 * n, 3, dtype=F64), torch.arange(2 * n) // 2, torch.arange(n) % 3)
        for n in (5, 3)
    ]


@dataclasses.dataclass
class Held:
    """A batch without .to."""

    x: Tensor
    y: Tensor


class Named(NamedTuple):
    x: Tensor
    y: Tensor


class Functional(nn.Module):
    """A loss as a module."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch)


class Trainer:
    """A loss as a method with an option, like that of a trainer."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False) -> Tensor:
        return loss(model, inputs)


def annotated(first: nn.Module, second: Any) -> Tensor:
    return loss(first, second)


FUNCTIONS: dict[str, Any] = {
    "function": loss,
    "lambda": lambda model, batch: loss(model, batch),
    "net": lambda net, b: loss(net, b),
    "m": lambda m, b: loss(m, b),
    "annotated": annotated,
    "module": Functional(),
    "method": Trainer().compute_loss,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loss_of_the_model_is_recognised_by_its_first_parameter(name):
    model = net()
    A = fh.Hessian(model, FUNCTIONS[name], data())
    assert distance(A, dense(model, lambda m: loss(m, data()))) < 1e-12


x, y = data()
FORMS: dict[str, tuple[Any, Any]] = {
    "triple": (loss, (x, y, torch.arange(7))),
    "mapping": (lambda model, b: F.cross_entropy(model(b["x"]), b["y"]), {"x": x, "y": y}),
    "named tuple": (lambda model, b: F.cross_entropy(model(b.x), b.y), Named(x, y)),
    "dataclass": (lambda model, b: F.cross_entropy(model(b.x), b.y), Held(x, y)),
    "list of dataclasses": (
        lambda model, b: F.cross_entropy(model(b.x), b.y), [Held(x[:4], y[:4]), Held(x[4:], y[4:])],
    ),
    "tensor": (lambda model, b: F.cross_entropy(model(b), y), x),
    "nothing": (lambda model, b: F.cross_entropy(model(x), y), None),
    "nested": (lambda model, b: F.cross_entropy(model(b[0]["x"][0]), b[1]), ({"x": [x]}, y)),
    "loader of triples": (loss, DataLoader(TensorDataset(x, y, torch.arange(7)), batch_size=3)),
    "list of triples": (loss, [(x[:5], y[:5], 0), (x[5:], y[5:], 1)]),
    "logits by the sum": (
        lambda model, b: F.cross_entropy(model(b[0]), b[1], reduction="sum") / len(b[1]),
        [(x[:2], y[:2]), (x[2:], y[2:])],
    ),
}  # fmt: skip


@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_a_loss_of_the_model_gets_batches_of_any_form(form, engine):
    function, batches = FORMS[form]
    model = net()
    A = fh.Hessian(model, function, batches, engine=engine)
    error = distance(A, dense(model, lambda m: loss(m, (x, y))))
    assert error < (1e-5 if engine == "difference" else 1e-12)


def test_a_sum_stays_a_sum():
    def total(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    model, (x, y) = net(), data()
    A = fh.Hessian(model, total, [(x[:5], y[:5]), (x[5:], y[5:])])
    assert distance(A, dense(model, lambda m: total(m, (x, y)))) < 1e-12


def test_valid_targets_are_counted():
    def masked(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"], ignore_index=1)

    model, (x, y) = net(), data()
    A = fh.Hessian(model, masked, [{"x": x[:4], "y": y[:4]}, {"x": x[4:], "y": y[4:]}])
    assert (y[:4] != 1).sum() != 4 / 3 * (y[4:] != 1).sum()  # weighting by samples would be wrong
    assert distance(A, dense(model, lambda m: masked(m, {"x": x, "y": y}))) < 1e-12


def test_graphs_of_several_sizes_are_weighted_by_their_targets():
    model, both = Pooled().double(), graphs()
    A = fh.Hessian(model, lambda model, g: F.cross_entropy(model(g), g.y), both)

    def whole(m):
        return sum(F.cross_entropy(m(g), g.y, reduction="sum") for g in both) / 8

    assert distance(A, dense(model, whole)) < 1e-12
    assert "not verified, as none could be cut" in A.engine


@pytest.mark.parametrize("form", ["one", "list"])
def test_a_criterion_may_take_outputs_and_graph(form):
    model, g = Pooled().double(), graphs()[0]
    A = fh.Hessian(model, lambda out, g: F.cross_entropy(out, g.y), g if form == "one" else [g])
    assert distance(A, dense(model, lambda m: F.cross_entropy(m(g), g.y))) < 1e-12


def test_a_graph_cannot_be_cut():
    with pytest.raises(ValueError, match="microbatch must be None: data holds a Graph"):
        fh.Hessian(Pooled().double(), lambda out, g: CE(out, g.y), graphs(), microbatch=2)
    halves = Pooled().double()
    A = fh.Hessian(halves, lambda model, g: CE(model(g), g.y), graphs())
    check = A.check()
    assert check.ok and "weights     does not apply" in check.report


def test_graphs_that_change_at_each_pass_are_noticed():
    class Noisy:
        def __iter__(self):
            return iter([Graph(torch.randn(4, 3).double(), torch.arange(4) // 2, torch.arange(2))])

    with pytest.raises(RuntimeError, match="different batches at each pass"):
        A = fh.Hessian(Pooled().double(), lambda model, g: CE(model(g), g.y), Noisy())
        A @ torch.ones(A.n, dtype=F64)


def test_a_packed_sequence_is_one_input():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(3, 4), nn.Linear(4, 3)

        def forward(self, packed: Any) -> Tensor:
            return self.out(self.lstm(packed)[1][0][-1])

    torch.manual_seed(3)
    model = Reader().double()
    packed = rnn.pack_sequence([torch.randn(n, 3, dtype=F64) for n in (4, 2, 1)])
    y = torch.tensor([0, 2, 1])
    want = dense(model, lambda m: CE(m(packed), y))
    assert distance(fh.Hessian(model, CE, (packed, y)), want) < 1e-12
    assert distance(fh.Hessian(model, lambda m, b: CE(m(b), y), packed), want) < 1e-12


@pytest.mark.parametrize("engine", ["auto", "forward"])
@pytest.mark.parametrize("kind", [fh.GaussNewton, fh.EmpiricalFisher, fh.Fisher])
def test_matrices_of_the_outputs_use_those_of_the_models_call(kind, engine):
    """The matrix of a loss of (model, batch) equals that of the same loss as a criterion."""
    model, (x, y) = net(), data()
    parts = [(x[:5], y[:5]), (x[5:], y[5:])]
    if kind is fh.Fisher:
        with pytest.raises(TypeError, match=r"for Fisher.*GaussNewton takes any convex one"):
            kind(model, loss, parts, engine=engine)
        return
    want = columns(kind(model, CE, parts))
    assert distance(kind(model, loss, parts, engine=engine), want) < 1e-12


def test_a_loss_that_calls_the_model_twice_has_no_gauss_newton_matrix():
    model, (x, y) = net(), data()

    def twice(model, batch):
        return CE(model(batch[0]), batch[1]) + CE(model(batch[0].flip(0)), batch[1])

    assert distance(fh.Hessian(model, twice, (x, y)), dense(model, lambda m: twice(m, (x, y)))) < (
        1e-12
    )
    with pytest.raises(ValueError, match=r"other than through the outputs.*use Hessian"):
        fh.GaussNewton(model, twice, (x, y))
    with pytest.raises(TypeError, match="got no call of it; use Hessian"):
        fh.GaussNewton(model, lambda model, b: CE(model[2](model[1](model[0](b[0]))), b[1]), (x, y))


def test_microbatches_of_a_loss_of_the_model():
    model, (x, y) = net(), data()
    A = fh.Hessian(model, loss, (x, y, torch.arange(7)), microbatch=3)
    assert distance(A, dense(model, lambda m: loss(m, (x, y)))) < 1e-12


def test_layer_blocks_and_landscapes_of_a_loss_of_the_model():
    model, (x, y) = net(), data()
    A = fh.Hessian(model, loss, (x, y))
    H = dense(model, lambda m: loss(m, (x, y)))
    for name, want in {"0": H[:16, :16], "2": H[16:, 16:]}.items():
        block = A.blocks("layer")[name]
        torch.testing.assert_close(columns(block), want)
    surface = fh.landscape(A, fh.eigsh(A, 2).vectors, span=0.1, points=3)
    assert float(surface.losses[1, 1]) == pytest.approx(loss(model, (x, y)).item(), rel=1e-12)


def test_no_hook_stays_on_the_model():
    model = net()
    A = fh.Hessian(model, loss, data())
    A @ torch.ones(A.n, dtype=F64)
    assert not model._forward_hooks


def test_a_loss_of_the_model_that_is_not_recognised_is_told_how_to_name_its_parameter():
    model, batch = net(), data()
    with pytest.raises(TypeError, match=r"name its first parameter model: lambda model, batch:"):
        fh.Hessian(model, lambda a, b: CE(a(b[0]), b[1]), batch)
    A = fh.Hessian(model, lambda model, batch: CE(model(batch[0]), batch[1]), batch)
    assert distance(A, dense(model, lambda m: loss(m, batch))) < 1e-12


def test_an_error_of_the_users_own_loss_is_raised_as_it_is():
    class Strange(RuntimeError):
        pass

    def broken(model, batch):
        raise Strange("the sensor data of March are missing")

    def unpacked(model, batch):
        inputs, targets, _, _ = batch
        return F.cross_entropy(model(inputs), targets)

    with pytest.raises(Strange, match=r"^the sensor data of March are missing$"):
        fh.Hessian(net(), broken, data())
    with pytest.raises(ValueError, match=r"^not enough values to unpack \(expected 4, got 2\)$"):
        fh.Hessian(net(), unpacked, data())


@pytest.mark.parametrize("form", ["loader", "list"])
def test_a_list_of_tensors_that_is_no_batch_is_a_list_of_batches(form):
    model, (x, _) = net(), data()

    def around(model, batch):
        return F.mse_loss(model(batch), batch)

    batches = DataLoader(x, batch_size=4) if form == "loader" else [x[:4], x[4:]]
    A = fh.Hessian(model, around, batches)
    assert distance(A, dense(model, lambda m: around(m, x))) < 1e-12


def test_a_list_of_tensors_that_a_loss_takes_is_one_batch():
    model, (x, y) = net(), data()
    A = fh.Hessian(model, loss, [x, y])
    assert distance(A, dense(model, lambda m: loss(m, (x, y)))) < 1e-12


@pytest.mark.parametrize("microbatch", [None, 2])
def test_batches_of_samples_that_are_not_collated(microbatch):
    """The list of sequences of one length is cut, and not the time dimension."""
    torch.manual_seed(0)
    pairs = [(torch.randn(6, 3, dtype=F64), torch.tensor(i % 3)) for i in range(5)]

    def sequences(model, batch):
        outputs = torch.stack([model(s).mean(0).tanh() for s, _ in batch])
        return F.cross_entropy(outputs, torch.stack([y for _, y in batch]))

    model = net()
    loader = DataLoader(pairs, batch_size=3, collate_fn=list)
    A = fh.Hessian(model, sequences, loader, microbatch=microbatch)
    assert distance(A, dense(model, lambda m: sequences(m, pairs))) < 1e-12
    assert A.check().ok, A.check()
