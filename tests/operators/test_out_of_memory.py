"""Out of memory: the advice of the MemoryError works, and the operator can still be used."""

import operator
import re

import pytest
import torch
from torch import nn

import fasthessian as fh
from tests.support.models import PROBLEMS, dense, each_curvature, error, refused
from tests.support.out_of_memory import Hungry

F64 = torch.float64
WORDS = "memory of cpu: an allocation of .* failed.*microbatch="


class Wide(nn.Module):
    """Allocates 4 PiB if the batch has more than ``most`` samples, or if a graph is kept."""

    def __init__(self, inner, most=2):
        super().__init__()
        self.inner, self.most = inner, most

    def forward(self, x):
        if len(x) > self.most:
            torch.empty(1 << 50)
        return torch.tanh(self.inner(x))


def problem():
    inner, criterion, data = PROBLEMS["mlp"].make()
    return inner, criterion, data


def advised(message):
    """The options that a message names."""
    found = {}
    engine, size = re.search(r"engine='(\w+)'", message), re.search(r"microbatch=(\d+)", message)
    if engine:
        found["engine"] = engine.group(1)
    if size:
        found["microbatch"] = int(size.group(1))
    return found


@each_curvature
@pytest.mark.parametrize("engine", ["auto", "recompute", "forward", "difference"])
def test_while_the_operator_is_built_and_the_advice_works(curvature, engine):
    inner, criterion, data = problem()
    model = Wide(inner)
    build = lambda **given: curvature(model, criterion, data, **given)  # noqa: E731
    refused(lambda: build(engine=engine), MemoryError, f"{curvature.__name__} does not fit")
    with pytest.raises(MemoryError, match=WORDS) as caught:
        build(engine=engine)
    A = build(**{"engine": engine, **advised(str(caught.value))})
    model.most = 99
    want = build(engine=engine)
    v = torch.linspace(-1, 1, A.n, dtype=F64)
    assert error(A @ v, want @ v) < (1e-5 if engine == "difference" else 1e-12)


@each_curvature
@pytest.mark.parametrize("call", ["gradient", "loss", "_evaluation.coupling", "check"])
def test_in_other_calls_and_the_operator_works_again(curvature, call):
    inner, criterion, data = problem()
    model = Hungry(inner)
    A = curvature(model, criterion, data)
    v = torch.linspace(-1, 1, A.n, dtype=F64)
    before = A @ v, A.gradient(), A.loss()
    model.when = "forward"
    refused(operator.attrgetter(call)(A), MemoryError, WORDS)
    assert not A._kept.graphs  # the kept graphs were freed
    model.when = "never"
    assert torch.equal(A @ v, before[0]) and torch.equal(A.gradient(), before[1])
    assert A.loss() == before[2] and A.check().ok


def test_in_the_backward_of_a_gradient():
    inner, criterion, data = problem()
    model = Hungry(inner)
    H = fh.Hessian(model, criterion, data)
    before = H.gradient(0.1 * torch.ones(H.n, dtype=F64))
    held = [p.detach().clone() for p in model.parameters()]
    model.when = "backward"
    refused(lambda: H.gradient(0.1 * torch.ones(H.n, dtype=F64)), MemoryError, "the gradient does")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), held, strict=True))
    model.when = "never"
    assert torch.equal(H.gradient(0.1 * torch.ones(H.n, dtype=F64)), before)


def test_a_closure_is_not_told_to_cut_its_batch():
    inner, criterion, (x, y) = problem()
    model = Hungry(inner)
    params = dict(model.named_parameters())
    H = fh.Hessian.from_closure(lambda: criterion(model(x), y), params)
    exact = H @ torch.eye(H.n, dtype=F64)
    model.when = "forward"
    refused(H.loss, MemoryError, r"the loss does not fit .*; engine='recompute' keeps no graph$")
    R = fh.Hessian.from_closure
    model.when = "never"
    again = R(lambda: criterion(model(x), y), params, engine="recompute")
    model.when = "forward"
    refused(again.gradient, MemoryError, r"use a machine with more memory$")
    model.when = "never"
    assert error(again @ torch.eye(H.n, dtype=F64), exact) < 1e-12


def test_coupling_is_found_in_the_parts_that_fit_into_memory():
    inner, criterion, data = problem()

    def pairs(z, y):
        return criterion(z - z.mean(0), y)

    build = lambda most, loss: fh.Hessian(Wide(inner, most), loss, data, microbatch=1)  # noqa: E731
    refused(lambda: build(2, pairs), ValueError, "microbatch=1 changes the gradient of batch 0")
    assert "couple" not in build(2, criterion).engine
    H = build(1, criterion)
    assert "more than microbatch=1 does not fit, so samples may couple unseen" in H.engine
    exact = dense(Wide(inner, 99), criterion, data)
    assert error(H @ torch.eye(H.n, dtype=F64), exact) < 1e-12


def test_a_batch_of_one_sample_is_not_cut_further():
    inner, criterion, data = problem()
    model = Hungry(inner)
    H = fh.Hessian(model, criterion, data, microbatch=1, engine="recompute")
    model.when = "forward"
    refused(H.loss, MemoryError, "use a machine with more memory$")
    model.when = "never"
    assert error(H @ torch.eye(H.n, dtype=F64), dense(model, criterion, data)) < 1e-12
