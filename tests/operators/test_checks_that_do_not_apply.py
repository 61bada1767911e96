"""``check()`` if batches cannot be halved: the row says so, and other rows are evaluated."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fasthessian as fh
from tests.support.models import columns, dense, error, refused

F64 = torch.float64
CE = nn.CrossEntropyLoss()


class Convolved(nn.Module):
    """Node classification on a graph, given by edges or by a sparse adjacency matrix."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x, graph):
        h = self.a(x)
        if graph.layout is not torch.strided:
            return self.b(torch.tanh(torch.sparse.mm(graph, h)))
        return self.b(torch.tanh(h + torch.zeros_like(h).index_add(0, graph[1], h[graph[0]])))


class TimeFirst(nn.Module):
    """An LSTM with time in the first dimension (torch's default); outputs the last or all steps."""

    def __init__(self, last):
        super().__init__()
        self.last, self.lstm, self.head = last, nn.LSTM(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        out = self.lstm(x)[0]
        return self.head(out[-1] if self.last else out)


class Graph:
    """A batch of graphs as one object."""

    def __init__(self):
        self.x, self.owner = torch.randn(10, 3, dtype=F64), torch.arange(10) // 2


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, graph):
        return torch.zeros(5, 2, dtype=F64).index_add(0, graph.owner, torch.tanh(self.a(graph.x)))


class Normed(nn.Module):
    """Uses batch statistics in eval mode too. A single sample has none."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)

    def forward(self, x):
        return self.norm(self.a(x))


class Whole(nn.Module):
    """Refuses a batch of one sample."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x):
        if len(x) < 2:
            raise ArithmeticError("one sample has no mean")
        return self.a(x)


class Frames(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 5)

    def forward(self, x):
        return torch.tanh(self.a(x)).log_softmax(-1).transpose(0, 1)


def ctc(z, y):
    return F.ctc_loss(z, y, torch.full((2,), 8), torch.full((2,), 3))


class FixedSizeError(Exception):
    """An exception class of the user, raised without a message."""


def for_four(z, y):
    if len(z) != 4:
        raise FixedSizeError
    return F.cross_entropy(z, y)


def steps(z, y):
    """Cross-entropy over all steps, classes last."""
    return F.cross_entropy(z.flatten(0, -2), y.flatten())


def normal(*shape):
    return torch.randn(shape, dtype=F64)


def classes(*shape):
    return torch.randint(2, shape)


def edges(most):
    return torch.randint(most, (2, 30))


def adjacency():
    return (torch.rand(10, 10) > 0.6).to(F64).to_sparse()


SKIPPED = {  # model, criterion, data, what the row says
    "graph": (Convolved, CE, lambda: (normal(10, 3), edges(10), classes(10)), "out of bounds"),
    "edges in one half": (
        Convolved, CE, lambda: (normal(10, 3), edges(5), classes(10)),
        r"tensor of shape \(2, 30\), which is not cut with 10 samples",
    ),
    "sparse adjacency": (
        Convolved, CE, lambda: (normal(10, 3), adjacency(), classes(10)),
        r"torch.sparse_coo tensor of shape \(10, 10\), which cannot be cut",
    ),
    "graph object": (Pooled, CE, lambda: [(Graph(), classes(5))], "data holds a Graph, which"),
    "ctc": (Frames, ctc, lambda: (normal(2, 8, 3), torch.randint(1, 5, (2, 3))), "batch_size"),
    "batch statistics": (
        Normed, CE, lambda: (normal(2, 3), classes(2)), "more than 1 value per channel",
    ),
    "one batch size": (
        lambda: nn.Linear(3, 2), for_four, lambda: (normal(4, 3), classes(4)), "FixedSizeError",
    ),
    "one sample": (
        lambda: nn.Linear(3, 2), CE, lambda: (normal(1, 3), classes(1)), "a batch of one sample",
    ),
    "one long sequence": (
        lambda: TimeFirst(False), CE, lambda: (normal(8, 3), classes(8)), "lstm has batch_first",
    ),
    "time first, every step": (
        lambda: TimeFirst(False), steps, lambda: (normal(7, 1, 3), classes(7, 1)), "batch_first",
    ),
}  # fmt: skip


def problem(case):
    torch.manual_seed(0)
    model, criterion, data = case[:3]
    return model().double(), criterion, data()


@pytest.mark.parametrize("name", SKIPPED)
def test_the_row_says_why_and_the_other_rows_are_evaluated(name):
    made = problem(SKIPPED[name])
    H = fh.Hessian(*made, engine="difference" if name == "ctc" else "auto")
    check = H.check()
    assert check.ok, str(check)
    assert math.isnan(check.weights)
    for row in (check.symmetry, check.repetition, check.gradient, check.difference):
        assert row < 1e-4
    rows = str(check).splitlines()
    assert [row.split()[0] for row in rows] == [
        "symmetry", "repetition", "gradient", "difference", "weights",
    ]  # fmt: skip
    assert re.match(f"weights +does not apply: .*{SKIPPED[name][3]}", rows[-1]), rows[-1]


@pytest.mark.parametrize("name", ["graph", "sparse adjacency", "one batch size"])
def test_the_products_are_right_where_a_check_does_not_apply(name):
    model, criterion, data = problem(SKIPPED[name])
    exact = dense(model, criterion, data)
    assert error(columns(fh.Hessian(model, criterion, data)), exact) < 1e-12
    two = fh.Hessian(model, criterion, [data, data], weights=[1.0, 3.0])
    assert error(columns(two), exact) < 1e-12 and two.check().ok


@pytest.mark.parametrize("curvature", [fh.GaussNewton, fh.EmpiricalFisher, fh.Fisher])
def test_other_matrices_on_a_graph(curvature):
    check = curvature(*problem(SKIPPED["graph"])).check()
    assert check.ok and "does not apply: index" in str(check)


@pytest.mark.parametrize("steps_in_time", [7, 6])
def test_samples_in_the_second_dimension_are_cut_there(steps_in_time):
    torch.manual_seed(0)
    model, data = TimeFirst(True).double(), (normal(steps_in_time, 6, 3), classes(6))
    H = fh.Hessian(model, CE, data)
    check = H.check()
    assert check.ok and check.weights < 1e-10, str(check)
    assert error(columns(H), dense(model, CE, data)) < 1e-12
    model, data = TimeFirst(False).double(), (normal(7, 4, 3), classes(7, 4))
    check = fh.Hessian(model, steps, data).check()
    assert check.ok and check.weights < 1e-10, str(check)


def each_step(z, y):
    """Root mean squares over the samples of each step, which couple the samples."""
    return (z - y).square().mean((0, 2)).sqrt().mean()


def pairs(z, y):
    """A loss of pairs of samples, which couples them."""
    return (z - z.mean(0)).square().mean() + F.mse_loss(z, y)


def test_the_row_does_not_apply_if_two_dimensions_may_be_the_samples():
    torch.manual_seed(0)
    data = normal(8, 5, 3), normal(8, 5, 2)
    check = fh.Hessian(nn.Linear(3, 2).double(), each_step, data).check()
    assert check.ok and "does not apply: halves along the second dimension" in str(check)


def test_coupled_samples_still_fail_the_check():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    lstm = nn.LSTM(3, 4, batch_first=True).double()

    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm

        def forward(self, x):
            return self.lstm(x)[0][:, -1]

    for model, data in (
        (mlp, (normal(8, 3), normal(8, 2))),
        (Sequences(), (normal(8, 5, 3), normal(8, 4))),
    ):
        check = fh.Hessian(model, pairs, data).check()
        assert not check.ok and check.weights > 1e-3, str(check)
    fine, coupled = (normal(1, 3), normal(1, 2)), (normal(8, 3), normal(8, 2))
    check = fh.Hessian(mlp, pairs, [fine, coupled]).check()  # one sample cannot be cut
    assert not check.ok and "batch 1 is not the mean" in str(check)


def test_a_batch_that_cannot_be_cut_into_microbatches_is_refused():
    model, criterion, data = problem(SKIPPED["sparse adjacency"])
    refused(
        lambda: fh.Hessian(model, criterion, data, microbatch=5),
        ValueError,
        r"microbatch must be None: .*sparse_coo tensor of shape \(10, 10\), which cannot be cut",
    )
    fh.Hessian(model, criterion, data, microbatch=None)  # the advice of the message
    model, data = Whole().double(), (normal(5, 3), classes(5))
    refused(
        lambda: fh.Hessian(model, CE, data, microbatch=4),
        ValueError, "microbatch=4 .* part of batch 0 .*: one sample has no mean; use microbatch=No",
    )  # fmt: skip
    assert error(columns(fh.Hessian(model, CE, data)), dense(model, CE, data)) < 1e-12


class Noisy(nn.Linear):
    """Draws random numbers in eval mode too, like variational autoencoders."""

    def forward(self, x):
        return super().forward(x) + torch.randn_like(x[:, :1])


@pytest.mark.parametrize("weights", ["auto", len])
def test_batches_are_not_cut_if_the_loss_draws_random_numbers(weights):
    model, x = Noisy(3, 3).double(), normal(6, 3)
    A = fh.Hessian(model, lambda model, x: model(x).square().square().mean(), x, weights=weights)
    check = A.check()
    assert check.ok, check
    assert "weights     does not apply: the loss draws random numbers" in check.report
