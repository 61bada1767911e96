"""Small models with known Hessians, and objects of the drop-in, for its tests."""

from __future__ import annotations

import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fasthessian.pyhessian import get_params_grad, group_product, hessian

BATCH = 12
TIGHT = {"maxIter": 200, "tol": 1e-6}
MODES = pytest.mark.parametrize("mode", ["data", "dataloader"])
cross_entropy = nn.CrossEntropyLoss()


class Quadratic(nn.Module):
    """Output x'Ax/2, so that with the criterion `output` the Hessian is A."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)  # of the objects' probes, too
        self.x = nn.Parameter(torch.randn(A.shape[0], dtype=A.dtype))
        self.register_buffer("A", A)

    def forward(self, inputs: Tensor) -> Tensor:
        return 0.5 * self.x @ self.A @ self.x + 0.0 * inputs.sum()


def output(outputs: Tensor, targets: Tensor) -> Tensor:
    """Criterion of a model that computes its own loss."""
    return outputs


def quadratic_data() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, 1), torch.zeros(2)


def symmetric(values: list[float] | Tensor, seed: int = 0, dtype=torch.float32) -> Tensor:
    """Symmetric matrix with the given eigenvalues and random eigenvectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator).double())
    return ((Q * values) @ Q.T).to(dtype)


def mlp(seed: int = 0) -> nn.Sequential:
    """83 parameters in 4 tensors, curved everywhere."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 3))


def batches(sizes: tuple[int, ...] = (BATCH,), seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 4, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for size in sizes
    ]


def dense(model: nn.Module, loss, params: list[Tensor] | None = None) -> Tensor:
    """Hessian of loss(call) in float64, where call(*inputs) runs the model."""
    named = {
        name: p.detach().double()
        for name, p in model.named_parameters()
        if p.requires_grad and (params is None or any(p is q for q in params))
    }
    shapes = {name: p.shape for name, p in named.items()}
    double = {
        n: t.detach().double()
        for n, t in (*model.named_parameters(), *model.named_buffers())
        if t.is_floating_point()
    }
    mode = model.training
    model.eval()

    def at(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        theta = {n: x.view(shapes[n]) for n, x in zip(shapes, pieces, strict=True)}
        return loss(lambda *inputs: functional_call(model, {**double, **theta}, inputs))

    flat = torch.cat([p.reshape(-1) for p in named.values()])
    with sdpa_kernel(SDPBackend.MATH):
        H = torch.autograd.functional.hessian(at, flat)
    model.train(mode)
    return H


def mean_loss_hessian(model: nn.Module, data: list[tuple[Tensor, Tensor]], params=None) -> Tensor:
    """Dense Hessian of the cross-entropy averaged over all samples."""
    x = torch.cat([inputs for inputs, _ in data]).double()
    y = torch.cat([targets for _, targets in data])
    return dense(model, lambda call: nn.functional.cross_entropy(call(x), y), params)


def by_magnitude(H: Tensor) -> Tensor:
    """Eigenvalues, the largest in magnitude first."""
    values = torch.linalg.eigvalsh(H)
    return values[values.abs().argsort(descending=True)]


def made(mode: str, model: nn.Module, data: list, criterion=cross_entropy) -> hessian:
    """The object over all batches, or over the first."""
    return hessian(model, criterion, cuda=False, **{mode: data[0] if mode == "data" else data})


def quadratic(values) -> hessian:
    """The object of a Hessian with these eigenvalues."""
    return hessian(Quadratic(symmetric(values)), output, data=quadratic_data(), cuda=False)


def assert_top(h: hessian, H: Tensor, k: int = 3, rtol: float = 1e-4) -> None:
    values, _ = h.eigenvalues(top_n=k, **TIGHT)
    expected = by_magnitude(H)[:k]
    np.testing.assert_allclose(values, expected, atol=rtol * float(expected.abs().max()))


def quick_trace(h: hessian) -> list[float]:
    """Three samples, too few for any tolerance."""
    with pytest.warns(UserWarning, match="trace"):
        return h.trace(maxIter=3, tol=1e-6)


class ByHand(hessian):
    """The product as PyHessian's users write it."""

    def dataloader_hv_product(self, v):
        total = [torch.zeros_like(p) for p in self.params]
        count = 0
        for inputs, targets in self.data:
            loss = self.criterion(self.model(inputs), targets)
            loss.backward(create_graph=True)
            params, grads = get_params_grad(self.model)
            self.model.zero_grad()
            Hv = torch.autograd.grad(grads, params, grad_outputs=v)
            total = [t + x * len(inputs) for t, x in zip(total, Hv, strict=True)]
            count += len(inputs)
        total = [t / count for t in total]
        return group_product(total, v).cpu().item(), total


class Partly(nn.Module):
    """A curved layer, a bias that enters linearly, and a layer that the output never meets."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.zeros(3))
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x)).pow(2).sum(1) + self.shift.sum()


def mean_output(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.mean()


class Token:
    """Something a graph node can hold, to see when the node dies."""


class Marked(torch.autograd.Function):
    tokens: ClassVar[list[weakref.ref]] = []

    @staticmethod
    def forward(ctx, x):
        ctx.token = Token()
        Marked.tokens.append(weakref.ref(ctx.token))
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 1.0 * g


class MarkedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return Marked.apply(self.net(x))
