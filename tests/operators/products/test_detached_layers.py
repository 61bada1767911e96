"""Rows of the matrix that are zero: padding rows of embeddings, and detached layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasthessian as fh
from tests.support.models import EACH_ENGINE, columns, dense, error, refused

F64 = torch.float64
Read = Callable[[Tensor, Tensor], Tensor]


class Tokens(nn.Module):
    """Looks up rows of ``table`` (6, 4) by a function instead of a module."""

    def __init__(self, read: Read, tied: bool = False) -> None:
        super().__init__()
        self.read, self.tied = read, tied
        self.table = nn.Parameter(torch.randn(6, 4, dtype=F64))
        self.hidden, self.last = nn.Linear(4, 4).double(), nn.Linear(4, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(torch.tanh(self.read(x, self.table)).mean(1)))
        return h @ self.table.T if self.tied else self.last(h)


def made(read: Read, tied: bool = False) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x = torch.randint(6, (5, 3))
    x[0, 0] = 2
    return Tokens(read, tied), nn.CrossEntropyLoss(), (x, torch.randint(6, (5,)))


READ: dict[str, Read] = {
    "plain": lambda x, w: F.embedding(x, w, padding_idx=2),
    "from the end": lambda x, w: F.embedding(x, w, padding_idx=-4),
    "twice": lambda x, w: F.embedding(x, w, padding_idx=2) * F.embedding(x.flip(1), w, 2),
}
# the row has a gradient from another use, so only double backward is right
ELSEWHERE: dict[str, Read] = {
    "two rows": lambda x, w: F.embedding(x, w, padding_idx=2) + F.embedding(x, w, padding_idx=1),
    "and without": lambda x, w: F.embedding(x, w, padding_idx=2) + F.embedding(x, w),
    "computed": lambda x, w: F.embedding(x, w * w, padding_idx=2),
    "and decayed": lambda x, w: F.embedding(x, w, padding_idx=2) * w.square().sum(),
}


@pytest.mark.parametrize("engine", EACH_ENGINE)
@pytest.mark.parametrize("name", READ)
def test_a_padding_row_without_a_module_is_zero(name: str, engine: str) -> None:
    model, criterion, data = made(READ[name])
    want = dense(model, criterion, data)
    params = dict(model.named_parameters())
    operators = [fh.Hessian(model, criterion, data, engine=engine)]
    if engine != "forward":
        closure = lambda: criterion(model(data[0]), data[1])  # noqa: E731
        operators.append(fh.Hessian.from_closure(closure, params, engine=engine))
    for A in operators:
        H = columns(A)
        assert error(H, want) < (1e-6 if engine == "difference" else 1e-12)
        assert not H[8:12].any() and not H[:, 8:12].any()
        assert A.check().ok, str(A.check())


@pytest.mark.parametrize("name", [*ELSEWHERE, "tied"])
def test_a_padding_row_that_is_also_used_elsewhere(name: str) -> None:
    read, tied = ELSEWHERE.get(name, READ["plain"]), name == "tied"
    model, criterion, data = made(read, tied)
    want = dense(model, criterion, data)
    for engine in ("retained", "recompute"):
        A = fh.Hessian(model, criterion, data, engine=engine, params=None)
        assert error(columns(A), want) < 1e-12 and A.check().ok, str(A.check())
    for engine in ("forward", "difference"):
        refused(
            lambda engine=engine: fh.Hessian(model, criterion, data, engine=engine), ValueError,
            "'table' is tied, and its row padding_idx=2|its row padding_idx=1",
        )  # fmt: skip
        fh.Hessian(model, criterion, data, engine=engine, params=["hidden.bias"]).check()


def test_a_bag_has_a_zero_row_where_it_is_supported() -> None:
    def bag(padding: int | None) -> Read:
        return lambda x, w: F.embedding_bag(x, w, padding_idx=padding)[:, None]

    def mean(x: Tensor, w: Tensor) -> Tensor:  # the same result without an embedding bag
        kept = (x != 2).to(w.dtype)[..., None]
        return ((F.embedding(x, w) * kept).sum(1) / kept.sum(1).clamp(min=1))[:, None]

    want = dense(*made(mean))
    for engine in EACH_ENGINE:
        A = fh.Hessian(*made(bag(2)), engine=engine)
        H = columns(A)
        assert error(H, want) < (1e-6 if engine == "difference" else 1e-12)
        assert not H[8:12].any() and A.check().ok


def test_sparse_gradients_without_a_module_are_refused() -> None:
    for engine in ("retained", "difference"):
        refused(
            lambda engine=engine: fh.Hessian(
                *made(lambda x, w: F.embedding(x, w, sparse=True)), engine=engine
            ),
            ValueError, "set its sparse to False",
        )  # fmt: skip


class Frozen(nn.Module):
    """An encoder that gets no gradient in eval mode; ``how`` selects the reason."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        self.head, self.how = nn.Linear(4, 3), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "unused":
            return self.head(torch.cat([x, x[:, :1]], 1))
        with torch.set_grad_enabled(self.training or self.how == "detached"):
            h = self.encoder(x)
        return self.head(h if self.training else h.detach())


@pytest.mark.parametrize("engine", EACH_ENGINE)
@pytest.mark.parametrize("how", ["detached", "no_grad", "unused"])
def test_layers_without_gradient_are_named(how: str, engine: str) -> None:
    torch.manual_seed(0)
    model = Frozen(how).double()
    data = torch.randn(7, 3, dtype=F64), torch.arange(7) % 3
    words = "no gradient reaches encoder.0.weight, encoder.0.bias, encoder.2.weight and 1 more"
    want = dense(model, nn.CrossEntropyLoss(), data)
    A = fh.Hessian(model, nn.CrossEntropyLoss(), data, engine=engine)
    assert f"{words} (zero rows)" in A.engine
    H = columns(A)
    assert error(H, want) < (1e-6 if engine == "difference" else 1e-12) and not H[:36].any()
    check = A.check()
    assert check.ok and str(check).endswith(f"{words} (zero rows)")
    halves = [tuple(t[:4] for t in data), tuple(t[4:] for t in data)]
    B = fh.GaussNewton(model, nn.CrossEntropyLoss(), halves, engine=engine)
    assert f"{words} in the first batch (zero rows)" in B.engine
    if how != "unused":  # with mode="train" these have gradients
        C = fh.Hessian(model, nn.CrossEntropyLoss(), data, mode="train", engine=engine)
        assert "no gradient" not in C.engine and columns(C)[:36].any()


def test_tensors_of_a_closure_without_gradient_are_named() -> None:
    a, b, c = (torch.randn(2, dtype=F64, requires_grad=True) for _ in range(3))
    A = fh.Hessian.from_closure(lambda: (a**4).sum() + c.detach().sum() * a.sum(), [a, b, c])
    assert "no gradient reaches 1, 2 (zero rows)" in A.engine
    B = fh.Hessian.from_closure(lambda: (a * b).sum() + c.prod(), {"a": a, "b": b, "c": c})
    assert "no gradient" not in B.engine and "no gradient" not in str(B.check())
    frozen = torch.nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))
    made: Any = frozen, nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 1))
    assert "no gradient" not in fh.Hessian(*made).engine
