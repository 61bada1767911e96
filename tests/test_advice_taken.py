"""What the messages of operators advise is done, and succeeds.

One case per piece of advice: words of the message, the error, what makes it, and what follows the
advice, in as many ways as it names. See test_advice.py for the list of all advice.
"""

import itertools
import re
import warnings
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fasthessian as fh
from fasthessian.study.resnet import resnet

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


CASES = {
    # operators.base
    "return a new tensor instead": (ValueError, lambda: fh.SymmetricOperator(
        lambda v: v.mul_(2), 3) @ torch.ones(3), lambda: THREE @ torch.ones(3)),
    "pass a symmetric one, or check=False": (ValueError,
        lambda: fh.SymmetricOperator(lambda v: v * 2 + v.roll(1), 3) @ torch.ones(3),
        lambda: fh.SymmetricOperator(lambda v: v * 2 + v.roll(1) + v.roll(-1), 3) @ torch.ones(3),
        lambda: fh.SymmetricOperator(lambda v: v * 2 + v.roll(1), 3, check=False) @ torch.ones(3)),
    ".to()": (TypeError, lambda: THREE @ torch.ones(3).double(),
        lambda: THREE @ torch.ones(3).double().to(THREE.dtype)),
    " must have contiguous rows, got strides ": (ValueError,
        lambda: THREE.apply(torch.ones(3, 2).T, torch.ones(2, 3)),
        lambda: THREE.apply(torch.ones(3, 2).T.contiguous(), torch.ones(2, 3))),
    "the tensor for ": (TypeError, lambda: H().flatten([p.double() for p in net().parameters()]),
        lambda: H().flatten([p.double().to(torch.float32) for p in net().parameters()])),
    # operators.batches
    "data is an empty list; pass ": (ValueError, lambda: H(data=[]), H),
    "pass list(data)": ((TypeError, ValueError), lambda: H(data=iter(HALVES)),
        lambda: H(data=list(iter(HALVES))),
        lambda: H(data=DataLoader(TensorDataset(X, Y), batch_size=4))),
    "wrap it in a DataLoader": ((TypeError, ValueError), lambda: H(data=TensorDataset(X, Y)),
        lambda: H(data=DataLoader(TensorDataset(X, Y), batch_size=4))),
    "use a loader without randomness, or fix one pass: data=list(loader)": (
        RuntimeError, lambda: H(data=Augmented()) @ VECTOR[:20].float(),
        lambda: H(data=list(Augmented())), lambda: H(data=HALVES)),
    # operators.blocks
    "give block names and regular expressions": (ValueError, lambda: H().blocks({}),
        lambda: H().blocks({"all": "."})),
    "make one of them narrower": (ValueError, lambda: H().blocks({"a": "0", "b": "weight"}),
        lambda: H().blocks({"a": "0", "b": "3.weight|2.weight"})),
    # operators.calls, operators.sources
    "as lambda model, batch: loss(model(batch[0]), batch[1])": (Exception,
        lambda: H(Named(), CE, (X, Y)),
        lambda: H(Named(), lambda model, batch: CE(model(batch[0]).scores, batch[1]), (X, Y))),
    "without a loss; return the scalar alone": (Exception,
        lambda: H(criterion=lambda model, batch: {"a": CE(model(batch[0]), batch[1])}),
        lambda: H(criterion=lambda model, batch: CE(model(batch[0]), batch[1]))),
    "which has no end; pass a list of batches": (Exception,
        lambda: H(data=itertools.cycle(HALVES)),
        lambda: H(data=list(itertools.islice(itertools.cycle(HALVES), 2)))),
    "or an output with .logits for ": (Exception,
        lambda: H(Pair(), lambda z, y: CE(z[0], y), (X, Y), kind=fh.GaussNewton),
        lambda: H(Pair(), lambda z, y: CE(z[0], y), (X, Y))),
    # operators.counting, operators.passes
    "pass all data as one batch; or check the parameters": (ValueError,
        lambda: H(criterion=per_positive, data=[(X[:4], Y[:4]), (X[4:], Y[4:] * 0)]),
        lambda: H(criterion=per_positive, data=(X, Y)),
        lambda: H(criterion=per_positive, data=HALVES)),
    "check the parameters, the inputs and the targets": (ValueError,
        lambda: H(data=(X / 0, Y)), H),
    "or weights=lambda batch: <its share>": (ValueError,
        lambda: H(criterion=summands, data=[(X[:6], Y[:6]), (X[6:], Y[6:])]),
        lambda: H(criterion=summands), lambda: H(criterion=summands, weights=lambda batch: 1.0,
            data=[(X[:6], Y[:6]), (X[6:], Y[6:])])),
    "the criterion couples the samples of a batch; use microbatch=None": (ValueError,
        lambda: H(net(Call(lambda x: x - x.mean(0))), microbatch=3),
        lambda: H(net(Call(lambda x: x - x.mean(0))), microbatch=None)),
    # operators.criteria
    "pass a criterion, or labels in data": ((TypeError, ValueError),
        lambda: H(criterion=None, model=Hugging(), data={"x": X}),
        lambda: H(criterion=logits_squared, model=Hugging(), data={"x": X}),
        lambda: H(criterion=None, model=Hugging(), data={"x": X, "labels": Y})),
    "the sum of its entries": ((TypeError, ValueError),
        lambda: H(criterion=lambda z, y: {"a": F.cross_entropy(z, y), "b": z.square().mean()}),
        lambda: H(criterion=lambda z, y: F.cross_entropy(z, y) + z.square().mean())),
    "use reduction='mean' or 'sum'": ((TypeError, ValueError),
        lambda: H(criterion=nn.CrossEntropyLoss(reduction="none")),
        lambda: H(criterion=nn.CrossEntropyLoss(reduction="mean")),
        lambda: H(criterion=nn.CrossEntropyLoss(reduction="sum"))),
    # operators.curvature, operators.engines
    "right if that is meant, else let autograd record": (UserWarning,
        lambda: H(criterion=detached), lambda: H(criterion=lambda z, y: F.cross_entropy(z * z, y))),
    "differentiates inside in training only (mode='train')": (ValueError,
        lambda: H(Force(energy=False), nn.MSELoss(), (X, X)),
        lambda: H(Force(energy=False), nn.MSELoss(), (X, X), mode="train")),
    "use mode='train', else let it create_graph": (RuntimeError,
        lambda: H(Force(), nn.MSELoss(), (X, X)),
        lambda: H(Force(), nn.MSELoss(), (X, X), mode="train")),
    "or use engine='difference', which needs first derivatives only": (RuntimeError,
        lambda: H(net(Call(Once.apply))), lambda: H(net(Call(Once.apply)), engine="difference"),
        lambda: H(net(Call(Twice.apply)))),
    "use engine='retained' or 'recompute'": (RuntimeError,
        lambda: H(net(Call(Twice.apply)), engine="forward"),
        lambda: H(net(Call(Twice.apply)), engine="retained"),
        lambda: H(net(Call(Twice.apply)), engine="recompute")),
    "or use engine='difference' with Hessian": (RuntimeError,
        lambda: H(net(Call(Noisy.apply)).double(), data=(X.double(), Y)),
        lambda: H(net(Call(Noisy.apply)).double(), data=(X.double(), Y), engine="difference")),
    # operators.fisher, operators.gaussnewton, operators.outer
    "put the batch first": (ValueError,
        lambda: H(nn.Sequential(net(), Call(torch.t)), turned, kind=fh.EmpiricalFisher),
        lambda: H(net(), lambda z, y: turned(z.T, y), kind=fh.EmpiricalFisher)),
    "GaussNewton is not positive semidefinite; use Hessian": (ValueError,
        lambda: H(criterion=lambda z, y: -z.square().mean(), kind=fh.GaussNewton),
        lambda: H(criterion=lambda z, y: -z.square().mean())),
    "needs a criterion of one output alone, use Hessian": (ValueError,
        lambda: penalised(fh.GaussNewton), lambda: penalised(fh.Hessian)),
    "for a model that returns its loss alone use Hessian": ((TypeError, ValueError),
        lambda: H(Loss(), None, {"x": X, "y": Y}, kind=fh.GaussNewton),
        lambda: H(Loss(), None, {"x": X, "y": Y})),
    # operators.losses, operators.padding
    "use mode='eval', or batches that fit": (ValueError,
        lambda: H(net(nn.BatchNorm1d(3)), mode="train", microbatch=4),
        lambda: H(net(nn.BatchNorm1d(3)), mode="eval", microbatch=4),
        lambda: H(net(nn.BatchNorm1d(3)), mode="train", data=HALVES)),
    "set its max_norm to None": (ValueError, lambda: H(embedded(max_norm=0.1), data=TOKENS),
        lambda: H(embedded(max_norm=None), data=TOKENS)),
    "set its sparse to False": (ValueError, lambda: H(embedded(sparse=True), data=TOKENS),
        lambda: H(embedded(sparse=False), data=TOKENS)),
    "convert one of them": (TypeError, lambda: H(data=(X.double(), Y)),
        lambda: H(data=(X.double().float(), Y)), lambda: H(net().double(), data=(X.double(), Y))),
    # operators.parameters
    "pass the torch.nn.Module it came from": (TypeError,
        lambda: H(scripted()), lambda: H(Scripted())),
    "; use params=[...]": (TypeError,
        lambda: H(params="0.weight"), lambda: H(params=["0.weight"])),
    "pass None for all parameters": (ValueError, lambda: H(params=[]), lambda: H(params=None)),
    "; use [tensor]": (TypeError,
        lambda: from_closure(lambda w: w), lambda: from_closure(lambda w: [w])),
    "pass the tensors that the loss depends on": (ValueError,
        lambda: from_closure(lambda w: []), lambda: from_closure(lambda w: [w])),
    "complex64 and complex128; use ": ((TypeError, ValueError),
        lambda: from_closure(lambda w: [torch.ones(2, dtype=torch.float8_e5m2)]),
        lambda: from_closure(lambda w: [w])),
    "parameters mix dtypes": ((TypeError, ValueError), lambda: H(mixed()),
        lambda: H(mixed().float()), lambda: H(mixed().double(), data=(X.double(), Y))),
    "move them to one": ((TypeError, ValueError),
        lambda: H(net().append(nn.Linear(2, 2, device="meta"))),
        lambda: H(net().append(nn.Linear(2, 2, device="cpu")))),
    "use requires_grad_() or leave it out of params": (ValueError,
        lambda: H(frozen(), params=["0.bias", "0.weight"]),
        lambda: H(frozen().requires_grad_(), params=["0.bias", "0.weight"]),
        lambda: H(frozen(), params=["0.weight"])),
    "is computed from other tensors; pass those": (ValueError,
        lambda: from_closure(lambda w: [w * 2]), lambda: from_closure(lambda w: [w])),
    "for other losses use Hessian.from_closure(closure, params)": (TypeError,
        lambda: H(lambda x: x), lambda: from_closure(lambda w: [w])),
    "is not 6 m + 2; use 8, 14, 20": (ValueError, lambda: resnet(9), lambda: resnet(8)),
}  # fmt: skip


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


@pytest.mark.parametrize("words", CASES)
def test_the_advice_works(words):
    kind, wrong, *right = CASES[words]
    warned = isinstance(kind, type) and issubclass(kind, Warning)
    with (pytest.warns if warned else pytest.raises)(kind, match=re.escape(words)):
        wrong()
    for follow in right:
        follow()


class Broken(fh.Hessian):
    """Products that the engine ``retained`` makes wrong, by ``wrong(V)``."""

    def _apply(self, V, out, trusted):
        super()._apply(V, out, trusted)
        if self.engine.startswith("retained"):
            out.add_(self.wrong(V))


@pytest.mark.parametrize(
    ("wrong", "row", "words"),
    [
        (lambda V: V.roll(1, 1), "symmetry", "products are wrong: use another engine"),
        (lambda V: V, "difference", "try another engine"),
    ],
)
def test_a_check_that_advises_another_engine(wrong, row, words):
    A, B = (Broken(net(), CE, (X, Y), engine=engine) for engine in ("retained", "recompute"))
    Broken.wrong = staticmethod(wrong)
    found = A.check()
    assert not found.ok and words in line(found, row)
    assert B.check().ok


def line(check, row):
    return next(line for line in str(check).splitlines() if line.startswith(row))


def test_a_check_that_advises_to_fix_random_numbers():
    generator = torch.Generator().manual_seed(0)
    noise = [0.0]
    layer = Call(lambda x: x + noise[0] * torch.rand(x.shape, generator=generator))
    A = fh.Hessian(net(layer), CE, (X, Y), engine="recompute")
    noise[0] = 1.0
    assert "fix its random numbers" in line(A.check(), "repetition")
    noise[0] = 0.0
    assert A.check().ok


def test_a_check_of_a_loss_that_detaches():
    with pytest.warns(UserWarning, match="detaches a part of itself"):
        A = fh.Hessian(net(), detached, (X, Y))
    assert "which detaches a part of itself" in line(A.check(), "gradient")
    assert fh.Hessian(net(), lambda z, y: F.cross_entropy(z * z, y), (X, Y)).check().ok


class InTraining(nn.Module):
    """Keeps the graph of a part in training only, where its loss is another one too."""

    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        z = self.inner(x)
        return z * (1.1 * z if self.training else z.detach())


def test_a_check_of_a_model_that_detaches_in_eval_mode():
    with pytest.warns(UserWarning, match="detaches a part of itself"):
        A = fh.Hessian(InTraining(), CE, (X, Y))
    assert "try mode='train'" in line(A.check(), "gradient")
    B = fh.Hessian(InTraining(), CE, (X, Y), mode="train")
    assert " ok" in line(B.check(), "gradient")


def test_a_check_of_samples_that_are_coupled():
    layer = Call(lambda x: x - x.mean(0))
    A = fh.Hessian(net(layer), CE, (X, Y))
    assert "pass weights=, or samples are coupled" in line(A.check(), "weights")
    assert fh.Hessian(net(), CE, (X, Y)).check().ok


class Greedy(nn.Module):
    """Runs out of memory above so many samples."""

    def __init__(self):
        super().__init__()
        self.inner, self.most = net(), 99

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return self.inner(x)


def test_memory_that_smaller_parts_or_no_graphs_would_fit():
    model = Greedy()
    A = fh.Hessian(model, CE, HALVES, engine="retained")
    v, want = torch.linspace(-1, 1, A.n), fh.Hessian(net(), CE, (X, Y))
    with torch.no_grad():  # graphs are made anew
        model.inner[0].bias.add_(0.0)
    model.most = 2
    with pytest.raises(MemoryError) as info:
        A @ v
    message = str(info.value)
    assert "engine='recompute' keeps no graph" in message and "microbatch=1 and more cut" in message
    model.most = 99
    B = fh.Hessian(model, CE, HALVES, microbatch=1)
    C = fh.Hessian(model, CE, HALVES, engine="recompute")
    torch.testing.assert_close(C @ v, want @ v)
    model.most = 2
    torch.testing.assert_close(B @ v, want @ v)


class Outputs:
    def __init__(self, logits):
        self.logits = logits


def test_gauss_newton_of_an_unknown_function_in_the_loss_of_an_output_object():
    model, g = nn.Sequential(net(), Call(Outputs)), torch.ones(8, 1)

    def normed(out, y):
        return F.cross_entropy(torch._weight_norm_interface(out.logits, g, 0)[0], y)

    def plain(out, y):
        z = out.logits
        return F.cross_entropy(z, y) + z.square().mean()

    with pytest.raises(RuntimeError, match="use Hessian, or a criterion of torch's operations"):
        H(model, normed, kind=fh.GaussNewton)
    with pytest.raises(RuntimeError, match="or use engine='difference' with Hessian"):
        H(model, normed)  # which can check it
    H(model, normed, engine="difference")
    H(model, plain, kind=fh.GaussNewton)
