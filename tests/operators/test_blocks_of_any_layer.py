"""Blocks of models whose layers are not plain Linear, Conv or Norm modules called once."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

import fasthessian as fh
from tests.support.models import EACH_ENGINE, columns

pytestmark = pytest.mark.slow

F64 = torch.float64


class Quantised(nn.Module):
    """Owns the weight of a Linear and rounds it, with a straight-through gradient."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        w = self.weight
        return F.linear(x, w + (torch.round(w * 64) / 64 - w).detach(), self.bias)


class Squared(nn.Linear):
    """A subclass of Linear that is not linear in its weight."""

    def forward(self, x):
        return F.linear(x, self.weight.square(), self.bias)


class Square(nn.Module):
    """A parametrisation."""

    def forward(self, w):
        return w * w


class Shared(nn.Module):
    """One encoder for two views."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 3)

    def forward(self, x):
        return self.encoder(x) - self.encoder(x.flip(0)).tanh()


class Repeated(nn.Module):
    """A layer called twice, and a bare matrix or a plain layer after it."""

    def __init__(self, plain):
        super().__init__()
        self.layer, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))
        self.head = nn.Linear(4, 3) if plain else None

    def forward(self, x):
        x = F.relu(self.layer(F.relu(self.layer(x))))
        return x @ self.w.T + (self.head(x) if self.head is not None else 0)


class Bare(nn.Module):
    """Parameters that belong to the model itself and to containers."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 4))
        self.rest = nn.ParameterList([torch.randn(3, 5), torch.randn(3)])

    def forward(self, x):
        return torch.relu(x @ self.w.T) @ self.rest[0].T + self.rest[1]


class Cells(nn.Module):
    """A recurrent cell that is called at every step."""

    def __init__(self, kind):
        super().__init__()
        self.cell = kind(2, 3)

    def forward(self, x):
        h = None
        for step in x.unflatten(1, (2, 2)).unbind(1):
            h = self.cell(step, h)
        return h[0] if isinstance(h, tuple) else h


class Recurrent(nn.Module):
    """The last step of an LSTM, with or without a plain layer after it."""

    def __init__(self, plain):
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 3) if plain else nn.Identity()

    def forward(self, x):
        return self.head(self.lstm(x.unflatten(1, (2, 2)))[0][:, -1])


class Frozen(nn.Module):
    """A first layer that gets no gradient, by ``no_grad`` or by ``detach``."""

    def __init__(self, detach, plain):
        super().__init__()
        self.detach = detach
        self.first, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))
        self.head = nn.Linear(4, 3) if plain else None

    def forward(self, x):
        with torch.set_grad_enabled(self.detach):
            x = self.first(x)
        x = F.relu(x.detach())
        return x @ self.w.T + (self.head(x) if self.head is not None else 0)


class Functional(nn.Module):
    """Weights of plain layers, which are used by functions instead of the layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.a.weight)), self.b.weight, self.b.bias)


def two(first, second=None):
    """Two wrapped linear layers. ``first`` wraps both if there is no ``second``."""
    return nn.Sequential(first(nn.Linear(4, 5)), nn.ReLU(), (second or first)(nn.Linear(5, 3)))


def plain(layer):
    return layer


def squared(layer):
    return Squared(layer.in_features, layer.out_features)


def parametrised(layer):
    return parametrize.register_parametrization(layer, "weight", Square())


def pruned(name):
    return lambda layer: prune.l1_unstructured(layer, name, amount=0.3)


spectral, weight_norm = nn.utils.spectral_norm, nn.utils.weight_norm
MODELS = {
    "quantised": lambda: two(Quantised),
    "quantised and plain": lambda: two(Quantised, plain),
    "subclass": lambda: two(squared),
    "spectral_norm": lambda: two(spectral),
    "spectral_norm and plain": lambda: two(spectral, plain),
    "new spectral_norm": lambda: two(parametrizations.spectral_norm),
    "weight_norm": lambda: two(weight_norm),
    "weight_norm and plain": lambda: two(plain, weight_norm),
    "new weight_norm": lambda: two(parametrizations.weight_norm),
    "parametrised": lambda: two(parametrised, plain),
    "pruned weights": lambda: two(pruned("weight")),
    "pruned biases": lambda: two(pruned("bias")),
    "pruned and plain": lambda: two(pruned("weight"), plain),
    "shared": Shared,
    "twice": lambda: Repeated(False),
    "twice and plain": lambda: Repeated(True),
    "bare": Bare,
    "cells": lambda: Cells(nn.GRUCell),
    "cells with two states": lambda: Cells(nn.LSTMCell),
    "lstm": lambda: Recurrent(False),
    "lstm and plain": lambda: Recurrent(True),
    "no_grad": lambda: Frozen(False, False),
    "no_grad and plain": lambda: Frozen(False, True),
    "detached": lambda: Frozen(True, False),
    "detached and plain": lambda: Frozen(True, True),
    "functional": Functional,
}
WAYS = ("layer", "stage", r"weight|bias|\w+$", lambda name: name)
KINDS = (fh.Hessian, fh.GaussNewton, fh.EmpiricalFisher, fh.Fisher)


def problem(build):
    """A float64 model in eval mode, after some passes in training mode, and one batch."""
    torch.manual_seed(0)
    model = build().double()
    x, y = torch.randn(8, 4, dtype=F64), torch.randint(3, (8,))
    with torch.no_grad():
        for _ in range(100):  # so that the vectors of spectral_norm converge
            model.train()(x)
    return model.eval(), nn.CrossEntropyLoss(), (x, y)


def norm_by_formula(v, g, dim=0):
    """weight_norm by its formula, because torch's own second derivative is wrong."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def dense(model, criterion, data, monkeypatch):
    """The Hessian (n, n) by plain torch, without copies, since some models have hooks."""
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def loss(theta):
        pieces = theta.split(sizes)
        held = {k: v.view(p.shape) for (k, p), v in zip(named.items(), pieces, strict=True)}
        return criterion(functional_call(model, held, data[:-1]), data[-1])

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_weight_norm", norm_by_formula)
        patch.setattr(sys.modules["torch.nn.utils.weight_norm"], "_weight_norm", norm_by_formula)
        theta = torch.cat([p.detach().flatten() for p in named.values()])
        return torch.autograd.functional.hessian(loss, theta)


def worst(A, matrix, by):
    """The largest error of a block, relative to the largest entry of the matrix."""
    start, places = 0, {}
    for name, shape in zip(A.layout.names, A.layout.shapes, strict=True):
        places[name] = range(start, start + shape.numel())
        start += shape.numel()
    gaps = [0.0]
    for block in A.blocks(by).values():
        at = [i for name in block.layout.names for i in places[name]]
        gaps.append(float((columns(block) - matrix[at][:, at]).abs().max()))
    return max(gaps) / float(matrix.abs().max())


@pytest.mark.filterwarnings("ignore:the gradient differs:UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_of_the_hessian(name, monkeypatch):
    made = problem(MODELS[name])
    exact = dense(*made, monkeypatch)
    for i, engine in enumerate(EACH_ENGINE):
        if engine == "difference" and "quantised" in name:
            continue  # rounding has jumps, which differences cannot ignore
        A = fh.Hessian(*made, engine=engine)
        for by in WAYS if i == 0 else (WAYS[0], WAYS[i]):
            limit = 1e-5 if engine == "difference" else 1e-11
            assert worst(A, exact, by) < limit, (engine, by)


@pytest.mark.filterwarnings("ignore:the gradient differs:UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_of_outer_products(name):
    made = problem(MODELS[name])
    for kind in KINDS[1:]:
        whole = columns(kind(*made, engine="recompute"))
        for by in WAYS:
            assert worst(kind(*made), whole, by) < 1e-11, (kind, by)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["spectral_norm", "new weight_norm", "pruned weights", "bare"])
def test_algorithms_take_the_blocks(name):
    H = fh.Hessian(*problem(MODELS[name]))
    H_whole = columns(H)
    blocks = H.blocks(lambda parameter: parameter)
    values = fh.eigsh(blocks, 1, tol=1e-8)
    start = 0
    for label, block in blocks.items():
        at = slice(start, start + block.n)
        exact = torch.linalg.eigvalsh(H_whole[at, at])
        largest = exact[exact.abs().argmax()]
        assert abs(values[label].values[0] - largest) < 1e-7 * H_whole.abs().max(), label
        start += block.n


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [lambda output: 2 * output, lambda output: output.mul_(2)])
def test_a_forward_hook_that_changes_the_output(kind, change, monkeypatch):
    model, criterion, data = problem(lambda: two(plain))
    model[0].register_forward_hook(lambda module, inputs, output: change(output))
    model[2].register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],))
    made = model, criterion, data
    whole = columns(kind(*made, engine="recompute"))
    if kind is fh.Hessian:
        assert (whole - dense(*made, monkeypatch)).abs().max() < 1e-12
    assert worst(kind(*made), whole, "layer") < 1e-12


def test_a_global_forward_hook_that_changes_outputs():
    made = problem(lambda: two(plain))

    def doubled(module, inputs, output):
        return 2 * output if isinstance(module, nn.Linear) else None

    handle = nn.modules.module.register_module_forward_hook(doubled)
    try:
        for kind in KINDS:
            whole = columns(kind(*made, engine="recompute"))
            assert worst(kind(*made), whole, "layer") < 1e-12
    finally:
        handle.remove()


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, spectral])
def test_training_mode_does_not_change_the_vectors_of_spectral_norm(wrap):
    model, criterion, data = problem(lambda: two(wrap, plain))
    before = {name: b.clone() for name, b in model.named_buffers()}
    H = fh.Hessian(model, criterion, data, mode="train")
    assert worst(H, columns(H), "layer") < 1e-12
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
