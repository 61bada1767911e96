"""Models, losses and data whose errors contain advice, for the tests that follow it."""

import warnings
from collections import UserDict
from types import SimpleNamespace

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import fasthessian as fh

X = torch.linspace(-1, 1, 24).reshape(8, 3).sin()
Y = torch.arange(8) % 2
HALVES = [(X[:4], Y[:4]), (X[4:], Y[4:])]
CE = nn.CrossEntropyLoss()


def net(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), *more, nn.Linear(3, 2))


def product(A):
    """A product that is finite and not zero."""
    v = torch.linspace(-1, 1, A.n, dtype=A.dtype)
    out = A @ v
    assert out.isfinite().all() and out.any()
    return A


def H(model=None, criterion=CE, data=(X, Y), kind=fh.Hessian, **options):
    return product(kind(net() if model is None else model, criterion, data, **options))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Twice(Once):
    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Noisy(Twice):  # its backward is no derivative, and its forward cannot be run again
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.detach())
        ctx.factor = torch.rand_like(x)
        return ctx.factor * x**3

    @staticmethod
    def backward(ctx, g):
        return g * 3 * ctx.factor * ctx.saved_tensors[0].detach() ** 2


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Force(nn.Module):
    """Differentiates inside, and keeps the graph in training only."""

    def __init__(self, energy=True):
        super().__init__()
        self.inner, self.energy = net(), energy

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            e = self.inner(x).square().sum(1)
            (f,) = torch.autograd.grad(e.sum(), x, create_graph=self.training)
        return e[:, None] + f if self.energy else f


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return (self.a * x).tanh()[:, :2]


def detached(z, y):
    return F.cross_entropy(z * z.detach(), y)


def frozen():
    model = net()
    model[0].bias.requires_grad_(False)
    return model


def mixed():
    model = net()
    model[0].double()
    return model


def embedded(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(4, 3, **options), nn.Flatten(), nn.Linear(6, 2))


TOKENS = torch.tensor([[0, 1], [2, 3], [1, 3], [0, 2]]), torch.tensor([0, 1, 1, 0])
VECTOR = torch.ones(26, dtype=torch.float64)
THREE = fh.SymmetricOperator(lambda v: 2 * v, 3)


def closure():
    w = nn.Parameter(torch.ones(3))
    return (lambda: (w**4).sum()), w


def from_closure(params):
    loss, w = closure()
    return product(fh.Hessian.from_closure(loss, params(w)))


class Augmented:
    """A loader that yields other inputs at each pass."""

    def __iter__(self):
        for x, y in HALVES:
            yield x + torch.rand(len(x), 1), y


class Hugging(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x, labels=None):
        z = self.inner(x)
        return UserDict(
            logits=z, **({} if labels is None else {"loss": F.cross_entropy(z, labels)})
        )


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return SimpleNamespace(scores=self.inner(x))


class Pair(Named):
    def forward(self, x):
        return self.inner(x), x


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x, y):
        return F.cross_entropy(self.inner(x), y)


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(Scripted())


def per_positive(z, y):
    return F.cross_entropy(z, y, reduction="sum") / (y > 0).sum()


def summands(z, y):
    return F.cross_entropy(z, y) + z[y > 0].square().mean() * (1 if len(y) > 2 else 0)


def turned(z, y):
    return (z.T - y[:, None]).square().mean()


def logits_squared(out, batch):
    return out["logits"].square().mean()


def penalised(kind):
    model = net()
    return H(model, lambda z, y: F.cross_entropy(z, y) + model[0].weight.square().sum(), kind=kind)
