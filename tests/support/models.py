"""Small problems shared by the tests: each with its full batch, and its dense Hessian.

The dense Hessian comes from ``torch.autograd.functional.hessian`` over ``functional_call`` and
shares no code with fasthessian.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fasthessian.errors import Refusal
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.fisher import EmpiricalFisher, Fisher
from fasthessian.operators.gaussnewton import GaussNewton
from fasthessian.operators.hessian import Hessian

F64 = torch.float64
ENGINES = ("retained", "recompute")
EACH_ENGINE = (*ENGINES, "forward", "difference")
ALL_ENGINES = (*EACH_ENGINE, "auto")  # which takes one of the others
CURVATURES = (Hessian, GaussNewton, EmpiricalFisher, Fisher)
each_curvature = pytest.mark.parametrize("curvature", CURVATURES)


def columns(A: SymmetricOperator) -> Tensor:
    """The matrix (n, n) of an operator, by one block product."""
    return A @ torch.eye(A.n, dtype=A.dtype)


def error(H: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest entry."""
    return float((H.double() - exact).abs().max() / exact.abs().max())


def mismatch(A: SymmetricOperator, exact: Tensor) -> float:
    """Relative error of the products of four random vectors: any wrong entry shows in them."""
    V = torch.randn(4, A.n, dtype=F64, generator=torch.Generator().manual_seed(9))
    made, want = A @ V.to(A.dtype), V @ exact
    assert made.dtype is A.dtype
    return float((made.double() - want).norm() / want.norm())


def refused(call: Callable[[], Any], kind: type[Exception], words: str) -> None:
    """``call`` raises the package's error of the built-in ``kind``, one line that has ``words``.

    Errors of files are the built-in ones.
    """
    with pytest.raises(kind, match=words) as caught:
        call()
    if issubclass(kind, OSError):
        assert type(caught.value) is kind
    else:
        assert isinstance(caught.value, Refusal) and kind in type(caught.value).__bases__
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 300, message


class ConvNet(nn.Module):
    """Convolution, BatchNorm with statistics away from 0 and 1, pooling, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm1(self.conv1(x)))
        x = F.silu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """One causal attention block; the output layer is tied to the embedding."""

    def __init__(self, vocabulary: int = 7, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return self.head(x).transpose(1, 2)  # (batch, vocabulary, time), as cross-entropy wants


class Recurrent(nn.Module):
    """A GRU read at its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


def poisson_residual(model: nn.Module) -> Tensor:
    """Mean squared residual of u'' = -sin(x) at fixed points, with u(0) = 0."""
    dtype = next(model.parameters()).dtype
    x = torch.linspace(0, 3, 9, dtype=dtype).unsqueeze(1).requires_grad_()
    u = model(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
    return (ddu + torch.sin(x)).square().mean() + u[0].square().sum()


@dataclass(frozen=True)
class Problem:
    """A model, criterion and full batch; for ``closure`` problems the criterion takes the model."""

    name: str
    build: Callable[[], tuple[nn.Module, Any, Any]]
    closure: bool = False

    def make(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any, Any]:
        """Fresh (model, criterion, data), the same numbers at each call; leaves the RNG alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model, criterion, data = self.build()
        if data is not None:
            data = tuple(t.to(dtype) if t.is_floating_point() else t for t in data)
        return model.to(dtype), criterion, data

    def operator(self, model: nn.Module, criterion: Any, data: Any, **options: Any) -> Hessian:
        """``fh.Hessian`` of the problem."""
        if self.closure:
            params = dict(model.named_parameters())
            return Hessian.from_closure(lambda: criterion(model), params, **options)
        return Hessian(model, criterion, data, **options)

    def dense(self, model: nn.Module, criterion: Any, data: Any) -> Tensor:
        """The Hessian (n, n) in the model's dtype, by plain torch."""
        return dense(model, criterion, data)


def dense(model: nn.Module, criterion: Any, data: Any) -> Tensor:
    """The Hessian (n, n) of the loss in eval mode over one batch, all trainable parameters."""
    model = copy.deepcopy(model).eval()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(*values: Tensor) -> Tensor:
        held = dict(zip(named, values, strict=True))
        if data is None:
            return criterion(_Substituted(model, held))
        return criterion(functional_call(model, held, data[:-1]), data[-1])

    with sdpa_kernel(SDPBackend.MATH):
        blocks = torch.autograd.functional.hessian(loss, tuple(named.values()))
    sizes = [p.numel() for p in named.values()]
    rows = [
        torch.cat([block.reshape(size, -1) for block in row], dim=1)
        for size, row in zip(sizes, blocks, strict=True)
    ]
    return torch.cat(rows)


def jacobian(model: nn.Module, data: Any, of: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The Jacobian (m, n) of the outputs, or of what ``of`` makes of them, in eval mode."""
    model = copy.deepcopy(model).eval()
    named = dict(model.named_parameters())

    def outputs(*values: Tensor) -> Tensor:
        z = functional_call(model, dict(zip(named, values, strict=True)), data[:-1])
        return (z if of is None else of(z)).flatten()

    with sdpa_kernel(SDPBackend.MATH):
        blocks = torch.autograd.functional.jacobian(outputs, tuple(named.values()))
    return torch.cat([block.flatten(1) for block in blocks], dim=1)


def gauss_newton(model: nn.Module, criterion: Any, data: Any) -> Tensor:
    """J' M J (n, n) over one batch in eval mode, M the Hessian of the criterion at the outputs."""
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        z = copy.deepcopy(model).eval()(*data[:-1])
    M = torch.autograd.functional.hessian(lambda t: criterion(t, data[-1]), z)
    J = jacobian(model, data)
    return J.T @ M.reshape(z.numel(), -1) @ J


class _Substituted:
    def __init__(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        self.model, self.values = model, values

    def __call__(self, x: Tensor) -> Tensor:
        return functional_call(self.model, self.values, (x,))

    def parameters(self) -> Any:
        return iter(self.values.values())


def _mlp() -> tuple[nn.Module, Any, Any]:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(11, 5), torch.randint(3, (11,)))


def _cnn() -> tuple[nn.Module, Any, Any]:
    return ConvNet(), nn.CrossEntropyLoss(), (torch.randn(7, 1, 8, 8), torch.randint(4, (7,)))


def _transformer() -> tuple[nn.Module, Any, Any]:
    tokens = torch.randint(7, (5, 6))
    targets = torch.randint(7, (5, 6))
    targets[0, 2:] = targets[3, 4:] = -100  # padding
    return Transformer(), nn.CrossEntropyLoss(ignore_index=-100), (tokens, targets)


def _gru() -> tuple[nn.Module, Any, Any]:
    return Recurrent(), nn.MSELoss(), (torch.randn(6, 5, 3), torch.randn(6, 2))


def _pinn() -> tuple[nn.Module, Any, Any]:
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    return model, poisson_residual, None


def _logistic() -> tuple[nn.Module, Any, Any]:
    data = (torch.randn(13, 4), torch.randint(2, (13, 1)).float())
    return nn.Linear(4, 1, bias=False), nn.BCEWithLogitsLoss(), data


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("mlp", _mlp),
        Problem("cnn", _cnn),
        Problem("transformer", _transformer),
        Problem("gru", _gru),
        Problem("pinn", _pinn, closure=True),
        Problem("logistic", _logistic),
    )
}
