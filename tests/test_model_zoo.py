"""Layers, wrappers and dtypes that people have: the matrix is that of plain torch all the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ALL_ENGINES, PROBLEMS, columns, dense, error, gauss_newton, mismatch, refused
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fasthessian as fh

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
# torch scripts a few decompositions at its first forward derivative, and warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
each_engine = pytest.mark.parametrize("engine", ALL_ENGINES)


def bound(engine: str) -> float:
    """As in the table of engines: what a central difference in float64 leaves, or rounding."""
    return 1e-6 if engine == "difference" else 1e-10


class Last(nn.Module):
    """A recurrent or attention layer, read at its last step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        attends = isinstance(self.layer, nn.MultiheadAttention)
        out = self.layer(x, x, x) if attends else self.layer(x)
        return (out if isinstance(out, Tensor) else out[0])[:, -1]


class Pair(nn.Module):
    """A bilinear form of two views of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.form = nn.Linear(4, 2), nn.Linear(4, 3), nn.Bilinear(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(torch.tanh(self.left(x)), self.right(x))


def tail(width: int) -> list[nn.Module]:
    return [nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)]


FLAT, SEQUENCE, IMAGE = (4,), (5, 4), (4, 5, 5)
ZOO: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "LayerNorm": (FLAT, lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), *tail(6))),
    "RMSNorm": (FLAT, lambda: nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), *tail(6))),
    "GroupNorm": (
        IMAGE, lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), *tail(54)),
    ),
    "InstanceNorm": (
        IMAGE,
        lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.InstanceNorm2d(3, affine=True), *tail(27)),
    ),
    "PReLU": (FLAT, lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 3))),
    "Bilinear": (FLAT, Pair),
    "Conv1d": (
        SEQUENCE,
        lambda: nn.Sequential(
            nn.Conv1d(5, 4, 3, padding=1), nn.GELU(), nn.Conv1d(4, 2, 2, stride=2), *tail(4)
        ),
    ),
    "Conv2d, grouped and dilated": (
        IMAGE,
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, groups=2, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 2, dilation=2),
            nn.AvgPool2d(2), *tail(2),
        ),
    ),
    "ConvTranspose2d": (
        IMAGE, lambda: nn.Sequential(nn.ConvTranspose2d(4, 2, 2, stride=2), *tail(200)),
    ),
    "Conv2d last": (
        IMAGE,
        lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.Tanh(), nn.Conv2d(3, 3, 3), nn.Flatten()),
    ),
    "a head of 1x1 convolution": (IMAGE, lambda: nn.Sequential(nn.Tanh(), nn.Conv2d(4, 3, 1))),
    "LSTM": (SEQUENCE, lambda: nn.Sequential(Last(nn.LSTM(4, 3, batch_first=True)), *tail(3))),
    "GRU, two layers": (
        SEQUENCE, lambda: nn.Sequential(Last(nn.GRU(4, 3, 2, batch_first=True)), *tail(3)),
    ),
    "attention": (
        SEQUENCE,
        lambda: nn.Sequential(Last(nn.MultiheadAttention(4, 2, batch_first=True)), *tail(4)),
    ),
    "encoder": (
        SEQUENCE,
        lambda: nn.Sequential(
            Last(nn.TransformerEncoderLayer(4, 2, 8, 0.1, "gelu", batch_first=True)), *tail(4)
        ),
    ),
    "Embedding": ((), lambda: nn.Sequential(nn.Embedding(6, 4), *tail(12))),
    "Embedding, padded": ((), lambda: nn.Sequential(nn.Embedding(6, 4, padding_idx=0), *tail(12))),
}  # fmt: skip


def zoo(name: str) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    shape, build = ZOO[name]
    torch.manual_seed(3)
    model = build().double()
    for p in model.parameters():  # no norm at its identity
        nn.init.normal_(p, 0.3, 0.5)
    x = torch.randn(6, *shape, dtype=F64) if shape else torch.randint(6, (6, 3))
    y = torch.randint(3, (6, *model.eval()(x).shape[2:]))
    return model, nn.CrossEntropyLoss(), (x, y)


@each_engine
@pytest.mark.parametrize("name", ZOO)
def test_a_layer_gives_the_dense_matrices(name: str, engine: str) -> None:
    model, criterion, data = zoo(name)
    A = fh.Hessian(model, criterion, data, engine=engine)
    assert mismatch(A, dense(model, criterion, data)) < bound(engine)
    G = fh.GaussNewton(model, criterion, data, engine=engine)
    assert mismatch(G, gauss_newton(model, criterion, data)) < bound(engine)


@each_engine
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_norms_of_the_batch_in_training(norm: Any, engine: str) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv1d(2, 3, 2), norm(3, affine=True, track_running_stats=True), nn.Tanh())
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(9, 2)).double()
    for p in model.parameters():
        nn.init.normal_(p, 0.3, 0.5)
    data = torch.randn(6, 2, 4, dtype=F64), torch.randint(2, (6,))
    plain = copy.deepcopy(model)
    plain[1].track_running_stats = False  # without them eval mode has the batch's statistics
    plain[1].running_mean = plain[1].running_var = None
    want = dense(plain, nn.CrossEntropyLoss(), data)
    statistics = model[1].running_mean.clone()
    A = fh.Hessian(model, nn.CrossEntropyLoss(), data, engine=engine, mode="train")
    assert mismatch(A, want) < bound(engine)
    assert torch.equal(model[1].running_mean, statistics)


class Masked(nn.Module):
    """Dropout that remembers its last mask, times 1 / (1 - p), and can hold to a given one."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.remember, self.masks = nn.Dropout(0.4), False, []
        self.held: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.held is not None:
            return x * self.held
        y = self.dropout(x)
        if self.remember:
            self.masks.append((y / x).detach())
        return y


@each_engine
def test_dropout_in_training_has_one_mask_for_each_batch(engine: str) -> None:
    torch.manual_seed(0)
    masked = Masked()
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), masked, nn.Linear(6, 3)).double()
    x, y = torch.randn(8, 4, dtype=F64), torch.randint(3, (8,))
    batches, criterion = [(x[:5], y[:5]), (x[5:], y[5:])], nn.CrossEntropyLoss()
    state = torch.get_rng_state()
    A = fh.Hessian(model, criterion, batches, mode="train", engine=engine)
    v = torch.linspace(-1, 1, A.n, dtype=F64)
    assert torch.equal(A @ v, A @ v)
    masked.remember = True
    loss = A.loss()
    masked.remember = False
    assert torch.equal(torch.get_rng_state(), state) and len(masked.masks) == 2
    plain = copy.deepcopy(model)
    plain[2].held = torch.cat(masked.masks)
    zeros = int((plain[2].held == 0).sum())
    assert 8 < zeros < 32  # 0.4 of 48
    assert loss == pytest.approx(float(criterion(plain(x), y).detach()), rel=1e-12)
    assert mismatch(A, dense(plain, criterion, (x, y))) < bound(engine)
    nothing = fh.Hessian(model, criterion, batches, engine=engine)  # eval mode: no mask at all
    plain[2].held = torch.ones(8, 6, dtype=F64)
    assert mismatch(nothing, dense(plain, criterion, (x, y))) < bound(engine)


# Wrappers


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="aot_eager")  # has no double backward


WRAPPERS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "DataParallel": ("module.", nn.DataParallel),
    "compiled": ("_orig_mod.", compiled),
    "DistributedDataParallel": ("module.", DistributedDataParallel),
    "compiled DistributedDataParallel": (
        "_orig_mod.module.", lambda model: compiled(DistributedDataParallel(model)),
    ),
    "DataParallel of a compiled one": (
        "module._orig_mod.", lambda model: nn.DataParallel(compiled(model)),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_gives_the_matrix_of_the_module_inside(name: str) -> None:
    prefix, wrap = WRAPPERS[name]
    model, criterion, data = PROBLEMS["mlp"].make()
    want, plain = dense(model, criterion, data), fh.Hessian(model, criterion, data)
    wrapped = wrap(model)
    for engine in ALL_ENGINES:
        A = fh.Hessian(wrapped, criterion, data, engine=engine)
        assert mismatch(A, want) < bound(engine)
        assert "unwrapped" in A.engine and "unwrapped" not in plain.engine
        assert A.layout.names == plain.layout.names
        assert list(A.blocks("layer")) == ["0", "2"]
        G = fh.GaussNewton(wrapped, criterion, data, engine=engine)
        assert mismatch(G, gauss_newton(model, criterion, data)) < bound(engine)
    for chosen in ([f"{prefix}2.weight"], ["2.weight"], [model[2].weight]):
        A = fh.Hessian(wrapped, criterion, data, params=chosen)
        assert list(A.unflatten(torch.zeros(18, dtype=F64))) == ["2.weight"]
        assert error(columns(A), want[36:54, 36:54]) < 1e-12


# Dtypes


class Mixed(nn.Module):
    """A first layer in another precision than the last."""

    def __init__(self, first: torch.dtype, last: torch.dtype) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6).to(first), nn.Linear(6, 3).to(last)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        return self.last(x.to(self.last.weight.dtype))


@each_engine
@pytest.mark.parametrize("last", [BF16, F32], ids=str)
def test_half_precision_parameters_have_operators_in_float32(
    last: torch.dtype, engine: str
) -> None:
    """bfloat16 has 8 bits: rounding of each factor is 4e-3, of a product of several a few of it."""
    torch.manual_seed(0)
    model = Mixed(BF16, last)
    x, y = torch.randn(12, 5).bfloat16(), torch.randint(3, (12,))
    double = copy.deepcopy(model).double()
    for curvature, exact in ((fh.Hessian, dense), (fh.GaussNewton, gauss_newton)):
        A = curvature(model, nn.CrossEntropyLoss(), (x, y), engine=engine)
        assert A.dtype is F32 and A.n == 57
        made = mismatch(A, exact(double, nn.CrossEntropyLoss(), (x.double(), y)))
        assert made < (0.1 if engine == "difference" else 0.02)
        assert A.theta().dtype is F32
        assert {p.dtype for p in model.parameters()} == {BF16, last}
        assert all(B.dtype is F32 for B in A.blocks("layer").values())


def test_double_and_single_precision_do_not_mix() -> None:
    data = torch.randn(4, 5), torch.randint(3, (4,))
    for curvature in (fh.Hessian, fh.GaussNewton, fh.EmpiricalFisher, fh.Fisher):
        refused(
            lambda c=curvature: c(Mixed(F64, F32), nn.CrossEntropyLoss(), data),
            ValueError, "parameters mix dtypes",
        )  # fmt: skip
