"""Complex parameters are treated as the real numbers of ``torch.view_as_real``."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fasthessian as fh
from tests.support.models import columns, error, refused

F64, C128 = torch.float64, torch.complex128
EXACT = ("retained", "recompute", "forward")


class Fourier(nn.Module):
    """A Fourier layer between linear layers, after an odd number of real parameters."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3))
        self.w = nn.Parameter(torch.randn(1, 4, dtype=torch.cfloat))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        modes = F.pad(torch.fft.rfft(x)[:, :4] * self.w, (0, 1))
        return self.head(torch.tanh(torch.fft.irfft(modes, n=8))) + self.bias


class Magnitudes(nn.Module):
    """The magnitude of a complex linear layer with a bias, with conjugates in between."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3, dtype=torch.cfloat)
        self.scale = nn.Parameter(torch.rand(3, dtype=torch.cfloat))

    def forward(self, x):
        z = self.a(x.to(self.scale.dtype)) * self.scale.conj()
        return torch.cat([z.abs(), z.real * z.imag], 1)


class Unitary(nn.Module):
    """The exponential of a complex matrix, and a complex bias; the output is real."""

    def __init__(self):
        super().__init__()
        self.m, self.b = (
            nn.Parameter(0.3 * torch.randn(s, dtype=torch.cfloat)) for s in ((3, 3), 3)
        )

    def forward(self, x):
        u = torch.linalg.matrix_exp(self.m - self.m.mH)
        return ((x[:, :3] + self.b) @ u).abs().square()


MODELS = {"fourier": (Fourier, 8), "magnitudes": (Magnitudes, 4), "unitary": (Unitary, 4)}


def problem(name, dtype=F64):
    torch.manual_seed(0)
    build, width = MODELS[name]
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data.to(dtype.to_complex() if p.is_complex() else dtype)
    classes = 6 if name == "magnitudes" else 3
    return (
        model,
        nn.CrossEntropyLoss(),
        (torch.randn(7, width, dtype=dtype), torch.arange(7) % classes),
    )


def real_numbers(model):
    """The parameters as one real vector, and a function from such a vector to named parameters."""
    named = dict(model.named_parameters())
    pieces = [torch.view_as_real(p) if p.is_complex() else p for p in named.values()]
    pieces = [p.detach() for p in pieces]

    def held(theta):
        parts = theta.split([p.numel() for p in pieces])
        views = [v.view(p.shape) for v, p in zip(parts, pieces, strict=True)]
        return {
            k: torch.complex(v[..., 0], v[..., 1]) if p.is_complex() else v
            for (k, p), v in zip(named.items(), views, strict=True)
        }

    return torch.cat([p.flatten() for p in pieces]), held


def hessian(model, criterion, data):
    """The Hessian by plain torch."""
    theta, held = real_numbers(model)
    return torch.autograd.functional.hessian(
        lambda t: criterion(functional_call(model, held(t), data[0]), data[1]), theta
    )


def gauss_newton(model, criterion, data):
    """The Gauss-Newton matrix by plain torch."""
    theta, held = real_numbers(model)

    def outputs(theta):
        return functional_call(model, held(theta), data[0])

    z = outputs(theta)
    J = torch.autograd.functional.jacobian(outputs, theta).flatten(0, -2)
    M = torch.autograd.functional.hessian(lambda z: criterion(z, data[1]), z.detach())
    return J.T @ M.reshape(z.numel(), -1) @ J


@pytest.mark.parametrize("name", MODELS)
def test_the_dense_matrices_by_every_engine(name):
    made = problem(name)
    H, G = hessian(*made), gauss_newton(*made)
    for engine in EXACT:
        assert error(columns(fh.Hessian(*made, engine=engine)), H) < 1e-12, engine
        assert error(columns(fh.GaussNewton(*made, engine=engine)), G) < 1e-12, engine
    assert error(columns(fh.Hessian(*made, engine="difference")), H) < 1e-5
    assert error(columns(fh.GaussNewton(*made, engine="difference")), G) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_batches_blocks_checks_and_fishers(name):
    model, criterion, (x, y) = made = problem(name)
    H = hessian(*made)
    A = fh.Hessian(model, criterion, [(x[:3], y[:3]), (x[3:], y[3:])], microbatch=2)
    assert error(columns(A), H) < 1e-12
    assert A.check().ok, str(A.check())
    own = fh.Hessian(model, lambda z, y: F.cross_entropy(z, y), [(x[:3], y[:3]), (x[3:], y[3:])])
    assert error(columns(own), H) < 1e-12
    places = torch.arange(A.n)
    for by in ("layer", lambda name: name):
        for block in fh.Hessian(*made).blocks(by).values():
            at = torch.cat([A.unflatten(places.to(F64))[k].flatten() for k in block.layout.names])
            at = at.long()
            assert error(columns(block), H[at][:, at]) < 1e-11
    theta, held = real_numbers(model)
    slopes = [
        torch.autograd.functional.jacobian(
            lambda t, i=i: criterion(functional_call(model, held(t), x[i : i + 1]), y[i : i + 1]),
            theta,
        )
        for i in range(len(x))
    ]
    g = torch.stack(slopes)
    assert error(columns(fh.EmpiricalFisher(*made)), g.T @ g / len(x)) < 1e-12
    F_columns = columns(fh.Fisher(*made, samples=2))
    assert error(columns(fh.Fisher(*made, samples=2, engine="forward")), F_columns) < 1e-12
    assert all(kind(*made).check().ok for kind in (fh.GaussNewton, fh.EmpiricalFisher, fh.Fisher))


@pytest.mark.parametrize("name", MODELS)
def test_gradient_and_loss_along_a_vector(name):
    model, criterion, data = made = problem(name)
    theta, held = real_numbers(model)
    A = fh.Hessian(*made, weight_decay=0.1)
    assert torch.equal(A.theta(), theta)

    def loss(theta):
        z = functional_call(model, held(theta), data[0])
        return criterion(z, data[1]) + 0.05 * theta.square().sum()

    step = torch.linspace(-0.1, 0.1, A.n, dtype=F64)
    assert abs(A.loss(step) - float(loss(theta + step))) < 1e-12
    want = torch.autograd.functional.jacobian(loss, theta + step)
    assert error(A.gradient(step), want) < 1e-12


def test_vectors_names_and_shapes():
    A = fh.Hessian(*problem("fourier"))
    assert A.n == 3 + 2 * 4 + 27 and A.dtype is F64
    assert A.layout.names[:2] == ("bias", "w") and A.layout.shapes[1] == (1, 4, 2)
    v = torch.randn(A.n, dtype=F64)
    views = A.unflatten(v)
    assert torch.equal(A.flatten(views), v)
    views["w"] = torch.complex(views["w"][..., 0], views["w"][..., 1])
    assert torch.equal(A.flatten(views), v)
    assert torch.equal(A.flatten(list(views.values())), v)
    views["w"] = views["w"].conj()
    assert torch.equal(A.unflatten(A.flatten(views))["w"][..., 1], -A.unflatten(v)["w"][..., 1])
    refused(lambda: A.flatten({**views, "w": views["bias"]}), ValueError, r"\(1, 4, 2\)")


def test_single_precision_and_a_closure():
    model, criterion, data = problem("fourier", torch.float32)
    exact = hessian(*problem("fourier"))
    model.load_state_dict(problem("fourier")[0].state_dict())
    data = problem("fourier")[2][0].float(), data[1]
    A = fh.Hessian(model, criterion, data)
    assert A.dtype is torch.float32 and error(columns(A), exact) < 1e-4
    params = dict(model.named_parameters())
    for engine in ("retained", "recompute", "difference"):
        C = fh.Hessian.from_closure(
            lambda: criterion(model(data[0]), data[1]), params, engine=engine
        )
        assert error(columns(C), exact) < (3e-2 if engine == "difference" else 1e-4)


def test_products_use_the_changed_parameters():
    model, _, _ = made = problem("magnitudes")
    A = fh.Hessian(*made)
    columns(A)
    with torch.no_grad():
        model.scale.imag.add_(0.5)
    assert error(columns(A), hessian(*made)) < 1e-12


def test_complex_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, dtype=C128), nn.Linear(3, 2, dtype=C128))
    data = torch.randn(5, 4, dtype=C128), torch.randn(5, 2, dtype=C128)

    def modulus(z, y):
        return (z - y).abs().square().mean()

    def parts(z, y):
        return F.mse_loss(z, torch.view_as_real(y), reduction="sum") / y.numel()

    class Real(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return torch.view_as_real(self.inner(x))

    H = hessian(model, modulus, data)
    A = fh.Hessian(model, modulus, data)
    assert error(columns(A), H) < 1e-12 and A.check().ok
    block = A.blocks("layer")["0"]
    assert error(columns(block), H[: block.n, : block.n]) < 1e-12
    for kind in (fh.GaussNewton, fh.EmpiricalFisher, fh.Fisher):
        refused(
            lambda kind=kind: kind(model, modulus, data),
            TypeError, r"torch.complex128 for .* needs real outputs; return torch.view_as_real",
        )  # fmt: skip
    made = Real(), parts, data
    assert error(columns(fh.GaussNewton(*made)), gauss_newton(*made)) < 1e-12


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_unsupported_dtypes_and_their_advice():
    model, criterion, data = problem("fourier", torch.float32)
    model.double()  # this does not convert complex parameters
    made = model, criterion, (data[0].double(), data[1])
    refused(
        lambda: fh.Hessian(*made),
        ValueError,
        r"mix dtypes.*use p.data = p.data.to\(torch.complex128\) for the complex ones",
    )
    for p in model.parameters():
        if p.is_complex():
            p.data = p.data.to(C128)
    assert error(columns(fh.Hessian(*made)), hessian(*made)) < 1e-12
    half = nn.Parameter(torch.zeros(2, dtype=torch.complex32))
    refused(
        lambda: fh.Hessian.from_closure(lambda: half.abs().sum(), [half]),
        TypeError, r"torch.complex32; .*use .to\(torch.complex64\)",
    )  # fmt: skip
    whole = nn.Parameter(torch.ones(2).to(torch.complex64))
    H = fh.Hessian.from_closure(lambda: (whole * whole).real.sum(), [whole])
    assert torch.equal(columns(H), torch.diag(torch.tensor([2.0, -2.0, 2.0, -2.0])))
