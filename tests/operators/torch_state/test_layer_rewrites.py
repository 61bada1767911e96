"""The rewritten convolution and batch normalisation equal torch's, derivatives included."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fasthessian as fh
from fasthessian.operators.torch_state.convolution import Convolution
from fasthessian.operators.torch_state.patches import Patches
from tests.support.models import dense

F64 = torch.float64


class Net(nn.Module):
    """Batch normalisation after a convolution whose output may be changed or used twice."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a = nn.Conv2d(2, 4, 3, padding=1, bias=kind != "nobias", stride=2)
        self.b = nn.Conv2d(4, 4, 3, groups=2, padding=(1, 0), dilation=(1, 2))
        self.n = nn.BatchNorm2d(4, affine=kind != "plain")
        self.m = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        for norm in (self.n, self.m):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x):
        x = x * 1
        y = self.a(x)
        if self.kind == "input written":  # allowed if a.weight needs no gradient
            x.zero_()
        if self.kind == "written":
            y.mul_(2)
        z = self.n(y)
        if self.kind == "shared":
            z = z + y
        if self.kind == "alone":
            z = torch.tanh(z)
        y = self.m(self.b(torch.tanh(z)))
        return self.head(torch.tanh(y).mean((2, 3)))


KINDS = ["usual", "nobias", "plain", "written", "shared", "alone", "input written"]


def made(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net(kind).double().eval()
        model.a.requires_grad_(kind != "input written")
        return (
            model,
            nn.CrossEntropyLoss(),
            (torch.randn(5, 2, 12, 12).double(), torch.arange(5) % 3),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_is_that_of_the_model_as_written(kind):
    model, criterion, data = made(kind)
    A = fh.Hessian(model, criterion, data)
    H = A @ torch.eye(A.n, dtype=F64)
    torch.testing.assert_close(H, dense(model, criterion, data), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "folded"), [("usual", 2), ("written", 1), ("input written", 1), ("alone", 2)]
)
def test_only_the_unmodified_result_of_a_convolution_is_folded(kind, folded, monkeypatch):
    model, _, (x, _) = made(kind)
    calls, original = [], Convolution.forward

    def counting(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(Convolution, "forward", staticmethod(counting))
    with Patches():
        out = model(x)
    assert len(calls) == 2 + folded
    torch.testing.assert_close(out, model(x), rtol=1e-12, atol=1e-12)


def test_train_mode_statistics_are_not_folded():
    model, criterion, (x, y) = made("usual")
    A = fh.Hessian(model, criterion, (x, y), mode="train")
    train = copy.deepcopy(model).train()
    params = list(train.parameters())
    grads = torch.autograd.grad(criterion(train(x), y), params, create_graph=True)
    v = torch.randn(A.n, dtype=F64, generator=torch.Generator().manual_seed(1))
    want = torch.autograd.grad(grads, params, A.layout.views(v))
    torch.testing.assert_close(A @ v, A.flatten(list(want)), rtol=1e-9, atol=1e-11)


CASES = [
    (F.conv1d, (2, 4, 9), (6, 2, 3), {"stride": 2, "padding": 1, "groups": 2}),
    (F.conv2d, (2, 3, 7, 6), (4, 3, 3, 2), {"padding": (1, 0), "dilation": 2}),
    (F.conv2d, (2, 4, 5, 5), (4, 1, 3, 3), {"groups": 4, "padding": 1}),
    (F.conv3d, (1, 2, 4, 5, 4), (3, 2, 2, 3, 2), {"stride": (1, 2, 1)}),
    (F.conv2d, (3, 7, 6), (4, 3, 3, 2), {}),  # no batch dimension: torch's own function serves
    (F.conv2d, (2, 3, 7, 6), (4, 3, 3, 3), {"padding": "same"}),  # likewise
]


@pytest.mark.parametrize(("conv", "shape", "kernel", "options"), CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_convolution_derivatives(conv, shape, kernel, options, bias):
    generator = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=generator, dtype=F64).requires_grad_()  # noqa: E731
    tensors = [make(*shape), make(*kernel)] + ([make(kernel[0])] if bias else [])

    def rewritten(*args):
        with Patches():
            return conv(*args, **options)

    torch.testing.assert_close(rewritten(*tensors), conv(*tensors, **options))
    assert torch.autograd.gradcheck(rewritten, tensors)
    assert torch.autograd.gradgradcheck(rewritten, tensors)


def test_frozen_inputs_get_no_gradients():
    x, w = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3, requires_grad=True)
    with Patches():
        y = F.conv2d(x, w)
    (gw,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
    (hv,) = torch.autograd.grad(gw, w, torch.ones_like(w))
    expected = torch.autograd.functional.hvp(
        lambda w: F.conv2d(x, w).square().sum(), w.detach(), torch.ones_like(w)
    )[1]
    torch.testing.assert_close(hv, expected)


def test_functions_are_restored_after_overlapping_contexts():
    original = F.conv2d, F.batch_norm
    first, second = Patches(), Patches()
    first.__enter__()
    second.__enter__()
    assert F.conv2d is not original[0]
    first.__exit__()
    assert F.conv2d is not original[0]
    second.__exit__()
    assert (F.conv2d, F.batch_norm) == original


def test_checkpointed_layers_use_the_same_rewrites_when_they_run_again():
    model, criterion, data = made("usual")
    inner = model.forward

    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(inner, x, use_reentrant=False)

    want = fh.Hessian(model, criterion, data)
    for engine in ("retained", "recompute"):
        A = fh.Hessian(Again(), criterion, data, engine=engine)
        v = torch.ones(A.n, dtype=F64)
        torch.testing.assert_close(A @ v, want @ v, rtol=1e-10, atol=1e-12)


class Odd(nn.Module):
    """A convolution and a batch normalisation, with a hook, vmap or a checkpoint between them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 3)

    def forward(self, x):
        if self.kind == "vmap":
            w = torch.stack((self.conv.weight, 2 * self.conv.weight))
            y = torch.vmap(lambda w: self.norm(F.conv2d(x, w)))(w).sum(0)
        else:
            y = self.conv(x)
            if self.kind == "hook":
                y.register_hook(lambda grad: 2 * grad)
            rest = lambda y: torch.tanh(self.norm(y))  # noqa: E731
            split = self.kind == "split segment"
            y = checkpoint(rest, y, use_reentrant=False) if split else rest(y)
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("kind", ["hook", "vmap", "split segment"])
@pytest.mark.parametrize("engine", ["retained", "recompute"])
def test_hooks_vmap_and_checkpoints_between_layers_are_respected(kind, engine):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Odd(kind).double().eval()
        x, y = torch.randn(4, 2, 6, 6, dtype=F64), torch.arange(4) % 3
    criterion, params = nn.CrossEntropyLoss(), list(model.parameters())
    A = fh.Hessian(model, criterion, (x, y), engine=engine)
    found, products = A.gradient(), A @ torch.ones(A.n, dtype=F64)
    if kind == "hook":  # it acts neither in gradients nor in products
        model.kind = "no hook"
    grads = torch.autograd.grad(
        criterion(model(x), y), params, create_graph=True, allow_unused=True, materialize_grads=True
    )
    want = A.flatten([g.detach() for g in grads])
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    v = torch.ones(A.n, dtype=F64)
    curved = [(g, u) for g, u in zip(grads, A.layout.views(v), strict=True) if g.requires_grad]
    exact = torch.autograd.grad(
        [g for g, _ in curved], params, [u for _, u in curved], allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    torch.testing.assert_close(products, A.flatten(list(exact)), rtol=1e-10, atol=1e-12)
