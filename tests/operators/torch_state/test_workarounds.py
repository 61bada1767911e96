"""embedding_bag and cdist, which have no second derivative in torch, against dense Hessians."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fasthessian as fh
from fasthessian.operators.torch_state.patches import Patches
from tests.support.models import columns, error, refused

F64 = torch.float64
INDICES = torch.tensor([1, 4, 4, 0, 2, 5, 2, 3, 1])
OFFSETS = torch.tensor([0, 2, 2, 6])  # the second bag is empty


def by_loops(weight, bags, mode, scales=None, padding=None):
    """The reduction of the rows of each bag, by Python loops."""
    out = []
    for bag, scale in zip(bags, scales or [torch.ones(len(bag), dtype=F64) for bag in bags],
                          strict=True):  # fmt: skip
        kept = [s * weight[i] for i, s in zip(bag.tolist(), scale, strict=True) if i != padding]
        rows = torch.stack(kept) if kept else weight.new_zeros(1, weight.shape[1])
        reduced = {"sum": rows.sum(0), "mean": rows.mean(0), "max": rows.max(0).values}
        out.append(reduced[mode])
    return torch.stack(out)


class Bags(nn.Module):
    """Bags of embeddings, followed by a ReLU network."""

    def __init__(self, mode, padding=None, last=False, scaled=False, loops=False):
        super().__init__()
        self.mode, self.padding, self.last, self.loops = mode, padding, last, loops
        self.weight = nn.Parameter(torch.randn(6, 3))
        self.scale = nn.Parameter(torch.randn(9)) if scaled else None
        self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x):
        offsets = torch.cat([OFFSETS, torch.tensor([9])])
        if self.loops:
            sizes = offsets.diff().tolist()
            scales = None if self.scale is None else self.scale.split(sizes)
            bags = by_loops(self.weight, INDICES.split(sizes), self.mode, scales, self.padding)
        else:
            bags = F.embedding_bag(
                INDICES, self.weight, offsets if self.last else OFFSETS, mode=self.mode,
                padding_idx=self.padding, include_last_offset=self.last,
                per_sample_weights=self.scale,
            )  # fmt: skip
        return self.net(bags * x)


def dense(model, criterion, data):
    named = {k: p.detach() for k, p in model.named_parameters()}
    sizes = [p.numel() for p in named.values()]

    def loss(theta):
        parts = theta.split(sizes)
        held = {k: v.view(p.shape) for (k, p), v in zip(named.items(), parts, strict=True)}
        return criterion(functional_call(model, held, data[0]), data[1])

    theta = torch.cat([p.flatten() for p in named.values()])
    return torch.autograd.functional.hessian(loss, theta)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(
    "options", [{}, {"padding": 4}, {"last": True}, {"padding": 2, "last": True}]
)
def test_bags_of_embeddings(mode, options):
    torch.manual_seed(0)
    model, plain = Bags(mode, **options).double(), Bags(mode, loops=True, **options).double()
    plain.load_state_dict(model.state_dict())
    data = torch.randn(4, 1, dtype=F64), torch.tensor([0, 1, 1, 0])
    exact = dense(plain, F.cross_entropy, data)
    for engine in ("retained", "recompute", "forward"):
        assert (
            error(columns(fh.Hessian(model, F.cross_entropy, data, engine=engine)), exact) < 1e-12
        )
    assert fh.Hessian(model, nn.CrossEntropyLoss(), data).check().ok


def test_weighted_bags_and_the_module():
    torch.manual_seed(0)
    model, plain = (Bags("sum", scaled=True, loops=loops).double() for loops in (False, True))
    plain.load_state_dict(model.state_dict())
    data = torch.randn(4, 1, dtype=F64), torch.tensor([0, 1, 1, 0])
    exact = dense(plain, F.cross_entropy, data)
    assert error(columns(fh.Hessian(model, F.cross_entropy, data)), exact) < 1e-12
    net = nn.Sequential(nn.EmbeddingBag(6, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    data = torch.randint(6, (5, 4)), torch.randint(2, (5,))
    A = fh.Hessian(
        net, nn.CrossEntropyLoss(), [tuple(t[:2] for t in data), tuple(t[2:] for t in data)]
    )
    rows = nn.Sequential(nn.Embedding(6, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    rows.load_state_dict(net.state_dict())

    def averaged(weight_of, x):
        return rows[2](F.relu(weight_of[x].mean(1)))

    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = rows

        def forward(self, x):
            return averaged(rows[0].weight, x)

    assert error(columns(A), dense(Averaged(), F.cross_entropy, data)) < 1e-12


class Prototypes(nn.Module):
    """Classifies by the distances from learned points."""

    def __init__(self, mode, plain=False):
        super().__init__()
        self.mode, self.plain = mode, plain
        self.net, self.points = nn.Linear(3, 3), nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        z = torch.relu(self.net(x))
        if self.plain:
            return -torch.linalg.vector_norm(z[:, None] - self.points, dim=-1)
        return -torch.cdist(z, self.points, compute_mode=self.mode)


@pytest.mark.parametrize("mode", ["use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"])
def test_distances(mode):
    torch.manual_seed(0)
    model, plain = Prototypes(mode).double(), Prototypes(mode, plain=True).double()
    plain.load_state_dict(model.state_dict())
    data = torch.randn(6, 3, dtype=F64), torch.randint(4, (6,))
    exact = dense(plain, F.cross_entropy, data)
    for engine in ("retained", "forward"):
        A = fh.Hessian(model, F.cross_entropy, data, engine=engine)
        assert error(columns(A), exact) < 1e-11, engine
        with torch.no_grad():
            value = float(F.cross_entropy(model(data[0]), data[1]))
        assert abs(A.loss() - value) < 1e-12


def test_distances_of_points_to_themselves():
    x = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    H = columns(fh.Hessian.from_closure(lambda: torch.cdist(x, x).square().sum(), [x]))
    want = 4 * torch.kron(5 * torch.eye(5) - torch.ones(5, 5), torch.eye(3)).to(F64)
    assert torch.allclose(H, want, rtol=0, atol=1e-12)


def test_a_function_without_a_workaround_names_an_engine_that_works():
    x = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    there = x.detach() + 1

    def loss():
        return torch.cdist(x, there, p=3.0).square().sum()

    refused(
        lambda: fh.Hessian.from_closure(loss, [x]) @ torch.ones(15, dtype=F64),
        RuntimeError, "_cdist_backward.*engine='difference' needs first ones only",
    )  # fmt: skip
    H = columns(fh.Hessian.from_closure(loss, [x], engine="difference"))

    def plain(x):
        return torch.linalg.vector_norm(x[:, None] - there, ord=3, dim=-1).square().sum()

    exact = torch.autograd.functional.hessian(plain, x.detach()).view(15, 15)
    assert error(H, exact) < 1e-5


def test_values_are_torchs_to_rounding():
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, F64):
        weight, eps = torch.randn(6, 3).to(dtype), torch.finfo(dtype).eps
        for mode in ("sum", "mean", "max"):
            own = F.embedding_bag(INDICES, weight, OFFSETS, mode=mode)
            with Patches():
                made = F.embedding_bag(INDICES, weight, OFFSETS, mode=mode)
            assert made.dtype is dtype and (made - own).abs().max() <= 16 * eps
    x, y = torch.randn(40, 3), torch.randn(30, 3)
    with Patches():
        made = torch.cdist(x, y)
    assert (made - torch.cdist(x.double(), y.double())).abs().max() < 1e-6
    assert (
        torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").sub(made).abs().max() < 1e-6
    )


def test_distances_that_would_fill_the_memory_are_left_to_torch(monkeypatch):
    monkeypatch.setattr("fasthessian.operators.torch_state.workarounds.LARGEST", 5 * 5 * 3 - 1)
    x = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    there = x.detach() + 1

    def loss():
        return torch.cdist(x, there).square().sum()

    with pytest.raises(RuntimeError, match=r"cdist.*engine='difference' needs first ones only"):
        fh.Hessian.from_closure(loss, [x]) @ torch.ones(15, dtype=F64)
    H = columns(fh.Hessian.from_closure(loss, [x], engine="difference"))
    torch.testing.assert_close(H, 10 * torch.eye(15, dtype=F64), rtol=1e-4, atol=1e-4)
