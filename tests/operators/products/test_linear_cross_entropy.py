"""F.linear_cross_entropy with options is exact, and is computed in chunks of rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fasthessian as fh
from fasthessian.operators.products import linear_cross_entropy as linearloss
from tests.support.models import columns, error, gauss_newton

F64 = torch.float64
captured = getattr(F, "linear_cross_entropy", None)
pytestmark = pytest.mark.skipif(captured is None, reason="this torch has no linear_cross_entropy")


def options() -> Any:
    return nn.LinearCrossEntropyOptions(batch_chunk_size=3)


class Headed(nn.Module):
    """A model that returns the loss of its head."""

    def __init__(self, f: Callable[..., Tensor], bias: bool = True, **named: Any) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 5, bias=bias)
        self.f, self.named = f, named

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h, W, b = torch.tanh(self.body(x)), self.head.weight, self.head.bias
        # squared, so that the gradient that arrives depends on the parameters
        return self.f(h, W, y, linear_bias=b, **self.named).square().sum()


def composed(
    x: Tensor, W: Tensor, y: Tensor, *, linear_bias: Tensor | None, options: Any = None,
    ignore_index: int | None = None, **named: Any,
) -> Tensor:  # fmt: skip
    ignored = -100 if ignore_index is None else ignore_index
    return F.cross_entropy(F.linear(x, W, linear_bias), y, ignore_index=ignored, **named)


def made(f: Callable[..., Tensor], dtype: torch.dtype = F64, **named: Any) -> Any:
    torch.manual_seed(0)
    model = Headed(f, **named).to(dtype)
    x, y = torch.randn(7, 3, dtype=dtype), torch.tensor([0, 1, 4, 2, 1, 0, 3])
    return model, None, (x, y)


@pytest.mark.parametrize("chunk", [1 << 22, 11])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_option_has_the_matrix_of_the_composition(
    reduction: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linearloss, "CHUNK", chunk)
    weights = torch.tensor([0.5, 2.0, 1.0, 0.3, 1.5], dtype=F64)
    ways = itertools.product((True, False), (None, weights), (None, 1), (True, False))
    for bias, weight, ignored, by_name in ways:
        named = {"bias": bias, "weight": weight, "ignore_index": ignored, "reduction": reduction}
        f = captured if by_name else lambda *args, **named: F.linear_cross_entropy(*args, **named)
        H = fh.Hessian(*made(f, options=options(), **named))
        assert error(columns(H), columns(fh.Hessian(*made(composed, **named)))) < 1e-13
        assert "derivative" not in H.engine


@pytest.mark.parametrize("engine", ["retained", "recompute", "difference"])
def test_every_engine_gives_the_matrix_of_the_composition(engine: str) -> None:
    want = columns(fh.Hessian(*made(composed)))
    H = fh.Hessian(*made(captured, options=options()), engine=engine)
    assert error(columns(H), want) < (1e-6 if engine == "difference" else 1e-13)
    assert H.check().difference < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_in_narrow_dtypes_are_those_of_the_composition(dtype: torch.dtype) -> None:
    want = columns(fh.Hessian(*made(composed)))
    plain = error(columns(fh.Hessian(*made(composed, dtype))), want)
    assert error(columns(fh.Hessian(*made(captured, dtype, options=options()))), want) < 2 * plain


def test_options_that_torch_composes_itself_stay_exact() -> None:
    for named in ({}, {"label_smoothing": 0.1}):
        H = fh.Hessian(*made(captured, **named))
        assert error(columns(H), columns(fh.Hessian(*made(composed, **named)))) < 1e-13
    with pytest.warns(UserWarning, match="ignored"):
        H = fh.Hessian(*made(captured, options=options(), label_smoothing=0.1))
    assert error(columns(H), columns(fh.Hessian(*made(composed, label_smoothing=0.1)))) < 1e-13


def test_as_a_criterion_it_has_the_gauss_newton_matrix_of_the_features() -> None:
    torch.manual_seed(0)
    criterion = nn.LinearCrossEntropyLoss(4, 5, bias=True, options=options()).double()
    plain = nn.LinearCrossEntropyLoss(4, 5, bias=True).double()
    plain.load_state_dict(criterion.state_dict())
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    data = torch.randn(7, 3, dtype=F64), torch.arange(7) % 5
    for p in plain.parameters():
        p.requires_grad_(False)
    G = fh.GaussNewton(model, criterion, data)
    assert error(columns(G), gauss_newton(model, plain, data)) < 1e-13


class _Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = function(*args, **(kwargs or {}))
        for y in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(y, Tensor):
                self.size = max(self.size, y.numel())
        return out


def test_no_tensor_has_the_size_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks(f: Callable[..., Tensor], **named: Any) -> Iterator[int]:
        torch.manual_seed(0)
        model = Headed(f, **named)
        model.head = nn.Linear(4, 50)
        for engine in ("retained", "recompute"):
            A = fh.Hessian(model, None, (torch.randn(200, 3), torch.arange(200) % 50),
                           engine=engine)  # fmt: skip
            with _Largest() as largest:
                A @ torch.ones(A.n)
            yield largest.size

    monkeypatch.setattr(linearloss, "CHUNK", 1000)
    assert max(peaks(captured, options=options())) == 1000
    assert min(peaks(composed)) == 200 * 50
