"""Blocks of single layers by kept Jacobians, which are used only if they give the right block."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fasthessian as fh
from tests.support.models import columns, dense, error, gauss_newton

F64 = torch.float64


class ReluNet(nn.Module):
    """Convolution, BatchNorm, pooling, in-place ReLU, a shortcut, two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.again = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.hidden, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        nn.init.normal_(self.norm.running_mean, std=0.3)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        x = F.max_pool2d(F.relu(x + self.again(x)), 2)
        return self.head(F.leaky_relu(self.hidden(x.mean((2, 3)))))


def problem(model, inputs=(6, 1, 8, 8)):
    """The model in float64 with cross-entropy over three classes."""
    data = torch.randn(*inputs, dtype=F64), torch.randint(3, inputs[:1])
    return model.double(), nn.CrossEntropyLoss(), data


def factored(A):
    """Whether the kept graphs hold factors, after one product of a block."""
    block = next(iter(A.blocks("layer").values()))
    block @ torch.ones(block.n, dtype=A.dtype)
    return all(graph.layers is not None for graph in A._kept.graphs)


def assert_blocks(A, matrix, accuracy=1e-12):
    """The block of every layer equals the block of the matrix."""
    start, places = 0, []
    for shape in A.layout.shapes:
        places.append(torch.arange(start, start + shape.numel()))
        start += shape.numel()
    for name, block in A.blocks("layer").items():
        at = torch.cat([places[i] for i in block._places])
        scale = matrix.abs().max()
        found = columns(block)
        assert (found - matrix[at][:, at]).abs().max() < accuracy * scale, name


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")])
def test_the_hessian_of_a_relu_network(criterion):
    torch.manual_seed(0)
    model, _, (x, y) = problem(ReluNet())
    exact = dense(model, criterion, (x, y))
    A = fh.Hessian(model, criterion, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert factored(A)
    assert_blocks(A, exact)
    with torch.no_grad():
        model.hidden.weight.mul_(0.5)
    assert_blocks(A, dense(model, criterion, (x, y)))  # after the change
    assert error(columns(A), dense(model, criterion, (x, y))) < 1e-12


def test_blocks_of_a_part_of_a_layer_and_of_several_layers():
    torch.manual_seed(0)
    made = problem(ReluNet())
    A = fh.Hessian(*made)
    assert factored(A)
    exact = dense(*made)
    for pattern in (r"hidden\.bias", r"conv\.weight", r"(?:hidden|head)\..*"):
        blocks = A.blocks({"block": pattern})
        at, start = [], 0
        for name, shape in zip(A.layout.names, A.layout.shapes, strict=True):
            if name in blocks["block"].layout.names:
                at += range(start, start + shape.numel())
            start += shape.numel()
        assert error(columns(blocks["block"]), exact[at][:, at]) < 1e-12, pattern


@pytest.mark.parametrize("kind", [fh.GaussNewton, fh.EmpiricalFisher, fh.Fisher])
def test_blocks_of_outer_products_for_any_activation(kind):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
    )
    made = problem(net, (7, 5))
    A = kind(*made)
    assert factored(A)
    whole = gauss_newton(*made) if kind is fh.GaussNewton else columns(kind(*made))
    assert_blocks(A, whole)


class Penalised:
    """Cross-entropy with a penalty that has gradient 0 here, but curvature."""

    reduction = "mean"

    def __init__(self, weight):
        self.weight_now, self.at = weight, weight.detach().clone()

    def __call__(self, z, y):
        return F.cross_entropy(z, y) + (self.weight_now - self.at).square().sum()


class Tied(nn.Module):
    """One weight that is used in a layer and as a matrix."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.relu(self.layer(x)) @ self.layer.weight)


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.relu(self.layer(F.relu(self.layer(x)))))


class Coupled(nn.Module):
    """Couples the samples between its layers."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = F.relu(self.layer(x))
        return self.head(h - h.mean(0))


@pytest.mark.parametrize(
    "build", ["smooth", "penalty", "tied", "twice", "coupled", "wide", "budget"]
)
def test_the_graph_is_used_where_factors_would_be_wrong_or_large(build):
    torch.manual_seed(0)
    relu = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    smooth = nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 3))
    models = {"smooth": smooth, "tied": Tied(), "twice": Twice(), "coupled": Coupled(),
              "wide": nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 65))}  # fmt: skip
    model, criterion, data = problem(models.get(build, relu), (6, 4))
    options = {}
    if build == "budget":
        findings = fh.Hessian(model, criterion, data)._evaluation.findings
        options["memory_budget"] = int(findings.graph_bytes) + 500
    if build == "penalty":
        criterion = Penalised(model[0].weight)
    A = fh.Hessian(model, criterion, data, **options)
    if build in ("tied", "twice", "coupled"):  # the other layer has factors
        places = A.blocks("layer")["layer"]._places
        assert factored(A) and not A._kept.graphs[0].layers.serves(places)
    else:
        assert A._kept.graphs and not factored(A)
    if build == "penalty":
        H = dense(model, nn.CrossEntropyLoss(), data)
        H[:20, :20] += 2 * torch.eye(20)
        assert_blocks(A, H)
    else:
        assert_blocks(A, dense(model, criterion, data))


class Gate(nn.Module):
    """Two ReLU branches that multiply."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.relu(self.a(x)) * F.relu(self.b(x)))


class ScaledByBias(nn.Module):
    """A bias that also scales the outputs. At its value 0 this adds curvature but no gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        nn.init.zeros_(self.b.bias)

    def forward(self, x):
        return self.b(F.relu(self.a(x))) * (1 + self.b.bias.square().sum())


class Small(nn.Module):
    """A branch with a tiny factor that couples samples, or uses a weight again."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.inp, self.f, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.inp(x)
        b = F.relu(self.f(h))
        b = F.linear(b, self.f.weight) if self.how == "again" else b - b.mean(0)
        return self.head(F.relu(h + 1e-6 * b))


class Standardised(nn.Linear):
    """A layer that is not linear in its weight."""

    def forward(self, x):
        w = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, w / w.norm(dim=1, keepdim=True), self.bias)


class Named(nn.Module):
    """A layer called by keyword, and one with a bias that it does not use."""

    class Unused(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), Named.Unused(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.a(input=x)))))


ODD = {
    "gate": Gate,
    "scaled by bias": ScaledByBias,
    "again": lambda: Small("again"),
    "coupled": lambda: Small("coupled"),
    "standardised": lambda: nn.Sequential(Standardised(4, 5), nn.ReLU(), nn.Linear(5, 3)),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 3)
    ).eval(),
    "named": Named,
}


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ODD)
def test_blocks_of_unusual_networks_are_right(name, dtype):
    torch.manual_seed(0)
    model, criterion, (x, y) = problem(ODD[name](), (6, 4))
    exact = dense(model, criterion, (x, y))
    scale = exact.abs().max()
    A = fh.Hessian(model.to(dtype), criterion, (x.to(dtype), y))
    start, places = 0, []
    for shape in A.layout.shapes:
        places.append(torch.arange(start, start + shape.numel()))
        start += shape.numel()
    for key, block in A.blocks("layer").items():
        at = torch.cat([places[i] for i in block._places])
        want = exact[at][:, at]
        near = 1e-9 if dtype is F64 else 1e-4
        gap = (columns(block).double() - want).abs().max()
        assert gap <= near * want.abs().max() + 1e-7 * near * scale, key


def test_the_users_hooks_run_in_one_forward_pass_and_are_unchanged():
    torch.manual_seed(0)
    model, criterion, data = problem(ReluNet())
    calls = []
    model.hidden.register_forward_hook(lambda *_: calls.append(1))
    A = fh.Hessian(model, criterion, data)
    calls.clear()
    assert factored(A)
    assert len(calls) == 2  # one for the graph, one for the outputs of the layers
    for block in A.blocks("layer").values():
        block @ torch.ones(block.n, dtype=F64)
    assert len(calls) == 2
    assert all(len(m._forward_hooks) == (m is model.hidden) for m in model.modules())


def test_products_with_all_layers_cost_less_than_one_full_product():
    """Counts the floating point operations of convolutions, which do not depend on the machine."""
    from torch.utils.flop_counter import FlopCounterMode

    from fasthessian.operators.base import multiply
    from fasthessian.operators.request import Request
    from fasthessian.study.resnet import resnet

    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 32, 32), torch.randint(10, (2,))
    A = fh.Hessian(resnet(20, batch_norm=False), nn.CrossEntropyLoss(), (x, y))
    v = torch.randn(A.n)

    def work(call):
        call()  # the first call builds what is kept
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    whole = work(lambda: A @ v)
    blocks = A.blocks("layer").values()
    assert len(blocks) == 22
    requests = [Request(block, torch.ones(1, block.n), torch.empty(1, block.n)) for block in blocks]
    assert work(lambda: multiply(requests)) < 0.5 * whole
    budget = 1.1 * A._evaluation.findings.graph_bytes
    A = fh.Hessian(
        resnet(20, batch_norm=False), nn.CrossEntropyLoss(), (x, y), memory_budget=budget
    )
    blocks = A.blocks("layer").values()
    requests = [Request(block, torch.ones(1, block.n), torch.empty(1, block.n)) for block in blocks]
    assert work(lambda: multiply(requests)) < 4 * whole
    assert A._kept.graphs[0].layers is None
