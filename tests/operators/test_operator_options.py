"""Options of the operators: weight decay, microbatches and low precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasthessian as fh
from tests.support.models import (
    CURVATURES,
    EACH_ENGINE,
    PROBLEMS,
    columns,
    dense,
    each_curvature,
    error,
    gauss_newton,
    mismatch,
    refused,
)

F32, F64 = torch.float32, torch.float64
each_engine = pytest.mark.parametrize("engine", EACH_ENGINE)


def ragged() -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """The mlp with its data in three batches, some targets ignored."""
    model, criterion, (x, y) = PROBLEMS["mlp"].make()
    y[[2, 6, 7]] = -100
    return model, criterion, [(x[a:b], y[a:b]) for a, b in ((0, 5), (5, 6), (6, 11))]


# weight_decay, and the loss, gradient and parameters as vectors


@each_engine
@each_curvature
def test_weight_decay_is_a_multiple_of_the_identity(curvature: Any, engine: str) -> None:
    made = ragged()
    bare = curvature(*made, engine=engine)
    A = curvature(*made, engine=engine, weight_decay=0.3)
    theta, v = A.theta(), torch.linspace(-1, 1, A.n, dtype=F64)
    torch.testing.assert_close(A @ v, bare @ v + 0.3 * v, rtol=1e-7, atol=1e-9)
    assert A.loss() == pytest.approx(bare.loss() + 0.15 * float(theta @ theta), rel=1e-12)
    torch.testing.assert_close(A.gradient(), bare.gradient() + 0.3 * theta, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        A.gradient(v), bare.gradient(v) + 0.3 * (theta + v), rtol=1e-12, atol=1e-14
    )
    assert A.loss(v) == pytest.approx(
        bare.loss(v) + 0.15 * float((theta + v) @ (theta + v)), rel=1e-12
    )
    for key, B in A.blocks("layer").items():
        same = bare.blocks("layer")[key]
        w = torch.linspace(0, 1, B.n, dtype=F64)
        torch.testing.assert_close(B @ w, same @ w + 0.3 * w, rtol=1e-7, atol=1e-9)


def test_weight_decay_with_chosen_parameters_with_closures_and_bad_values() -> None:
    model, criterion, batches = ragged()
    A = fh.Hessian(model, criterion, batches, params=["2.weight"], weight_decay=2.0)
    bare = fh.Hessian(model, criterion, batches, params=["2.weight"])
    assert error(columns(A), columns(bare) + 2 * torch.eye(18, dtype=F64)) < 1e-14
    own = float(model[2].weight.detach().square().sum())
    assert A.loss() == pytest.approx(bare.loss() + own, rel=1e-12)
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    B = fh.Hessian.from_closure(lambda: w.pow(3).sum(), [w], weight_decay=0.5)
    assert torch.equal(B @ torch.ones(2), torch.tensor([6.5, 12.5]))
    assert B.loss() == pytest.approx(9 + 0.25 * 5)
    for bad in (-1.0, float("nan"), float("inf"), "x"):
        refused(
            lambda c=bad: fh.Hessian(model, criterion, batches, weight_decay=c),
            ValueError, "weight_decay",
        )  # fmt: skip


def test_loss_and_gradient_are_those_at_theta_plus_an_offset() -> None:
    model, criterion, batches = ragged()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    A = fh.Hessian(model, criterion, batches)
    theta = A.theta()
    assert torch.equal(theta, torch.cat([p.detach().flatten() for p in model.parameters()]))
    offset = torch.linspace(-0.5, 0.5, A.n, dtype=F64)
    for step in (None, offset):
        moved, _, _ = ragged()
        with torch.no_grad():
            nn.utils.vector_to_parameters(theta if step is None else theta + step,
                                          moved.parameters())  # fmt: skip
        loss = criterion(moved(x), y)
        want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, moved.parameters())])
        assert A.loss(step) == pytest.approx(float(loss.detach()), rel=1e-13)
        torch.testing.assert_close(A.gradient(step), want, rtol=1e-12, atol=1e-15)
    assert torch.equal(A.theta(), theta)
    with torch.no_grad():
        model[0].bias.add_(1)
    assert not torch.equal(A.theta(), theta)


# microbatch


class Named(nn.Module):
    """Accepts its inputs by name, and returns a loss if there are labels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, a: Tensor, labels: Tensor | None = None) -> Any:
        out = self.inner(a)
        return out if labels is None else {"loss": F.cross_entropy(out, labels), "logits": out}


@each_engine
@pytest.mark.parametrize("curvature", CURVATURES[:3])
def test_microbatches_give_the_same_matrix(curvature: Any, engine: str) -> None:
    model, mean, batches = ragged()
    for criterion in (mean, nn.CrossEntropyLoss(reduction="sum")):
        want = columns(curvature(model, criterion, batches))
        for m in (1, 2, 3, 100):
            A = curvature(model, criterion, batches, engine=engine, microbatch=m)
            assert mismatch(A, want) < (1e-6 if engine == "difference" else 1e-12), m


@pytest.mark.parametrize(("engine", "passes"), [("recompute", 1), ("retained", 0)])
def test_microbatches_are_not_larger_than_requested(engine: str, passes: int) -> None:
    model, criterion, (x, y) = PROBLEMS["mlp"].make()
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    cut = [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])]
    A = fh.Hessian(model, criterion, cut, engine=engine, microbatch=2)
    A @ torch.ones(A.n, dtype=F64)
    sizes.clear()
    A @ torch.ones(A.n, dtype=F64)
    handle.remove()
    assert sorted(sizes) == [1, 1, 1, 2, 2, 2, 2] * passes


def test_microbatches_draw_the_same_targets() -> None:
    model, criterion, batches = ragged()
    want = columns(fh.Fisher(model, criterion, batches))
    for m in (1, 2, 3, 100):
        assert mismatch(fh.Fisher(model, criterion, batches, microbatch=m), want) < 1e-12, m


def test_drawn_targets_keep_their_expectation_in_microbatches() -> None:
    model, criterion, batches = ragged()
    many = fh.Fisher(model, criterion, batches, samples=1000, microbatch=2)
    assert mismatch(many, columns(fh.GaussNewton(model, criterion, batches))) < 0.15


@pytest.mark.parametrize("own", [True, False])
def test_mappings_and_loaders_are_cut_too(own: bool) -> None:
    inner, criterion, batches = ragged()
    model = Named(inner)
    data = [{"a": x, "labels": y} for x, y in batches]

    def loss(out: Any, batch: Any) -> Tensor:
        return criterion(out["logits"], batch["labels"])

    loader = torch.utils.data.DataLoader(data, batch_size=None)
    want = columns(fh.Hessian(inner, criterion, batches))
    for cut in (data, loader):
        for engine in ("retained", "recompute"):
            A = fh.Hessian(model, None if own else loss, cut, microbatch=2, engine=engine)
            assert mismatch(A, want) < 1e-12


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)).roll(1))


def test_batches_that_cannot_be_cut_are_refused_with_the_reason() -> None:
    model, criterion, data = PROBLEMS["cnn"].make()
    refused(
        lambda: fh.Hessian(model, criterion, data, mode="train", microbatch=2),
        ValueError, "norm1|BatchNorm",
    )  # fmt: skip
    fh.Hessian(model, criterion, data, microbatch=2)  # in eval mode the statistics are fixed
    model, _, (x, y) = PROBLEMS["mlp"].make()
    for bad in (0, -1, 1.5, "2"):
        refused(
            lambda m=bad: fh.Hessian(model, criterion, (x, y), microbatch=m),
            ValueError, "microbatch must be",
        )  # fmt: skip


@pytest.mark.parametrize("how", ["whole", "first batch small", "train", "weights"])
def test_a_criterion_that_couples_the_samples_is_refused(how: str) -> None:
    model, _, (x, y) = PROBLEMS["mlp"].make()
    data: Any = [(x[:3], y[:3]), (x[3:], y[3:])] if how == "first batch small" else (x, y)
    options = {"train": {"mode": "train"}, "weights": {"weights": [1.0]}}.get(how, {})
    for engine in EACH_ENGINE:
        refused(
            lambda e=engine: fh.Hessian(
                model, contrastive, data, microbatch=4, engine=e, **options
            ),
            ValueError, "microbatch",
        )  # fmt: skip
    fh.Hessian(model, contrastive, data, **options)


def test_rounding_of_a_loss_in_bfloat16_is_not_reported_as_coupling() -> None:
    _, criterion, (x, y) = PROBLEMS["mlp"].make(torch.bfloat16)
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).bfloat16()
        want = columns(fh.Hessian(copy.deepcopy(model).double(), criterion, (x.double(), y)))
        assert mismatch(fh.Hessian(model, criterion, (x, y), microbatch=2), want) < 0.03


# precision


@each_curvature
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_bf16_products_are_within_the_error_that_the_engine_states(
    name: str, curvature: Any
) -> None:
    model, criterion, data = PROBLEMS[name].make(F32)
    A = curvature(model, criterion, data, precision="bf16")
    assert A.dtype is F32
    if curvature in (fh.Hessian, fh.GaussNewton):
        exact = dense if curvature is fh.Hessian else gauss_newton
        relative = mismatch(A, exact(*PROBLEMS[name].make()))
    else:  # other tests compare these with their definitions
        relative = mismatch(A, columns(curvature(model, criterion, data)).double())
    assert 1e-5 < relative < 0.05
    assert "bf16" in A.engine and "relative error" in A.engine
    stated = float(A.engine.split("relative error ")[1].split()[0])
    # the stated error is from one vector, this one from four
    assert stated / 5 < relative < 5 * stated
    assert all(p.dtype is F32 for p in model.parameters())


def test_unsupported_precisions_are_refused_in_one_line() -> None:
    made = PROBLEMS["mlp"].make(F32)
    for curvature in CURVATURES:
        refused(lambda c=curvature: c(*made, precision="tf32"), ValueError, "tf32")
        refused(lambda c=curvature: c(*made, precision="fp8"), ValueError, "precision must be")


def test_weights_are_those_of_whole_batches_for_sums_and_callables() -> None:
    model, criterion, batches = ragged()
    summed = nn.CrossEntropyLoss(reduction="sum", ignore_index=criterion.ignore_index)
    for loss, weights in ((summed, [3.0, 1.0, 2.0]), (criterion, lambda batch: 1.0)):
        weights = weights[: len(batches)] if isinstance(weights, list) else weights
        want = columns(fh.Hessian(model, loss, batches, weights=weights))
        A = fh.Hessian(model, loss, batches, weights=weights, microbatch=2)
        assert mismatch(A, want) < 1e-12
        assert A.check().ok


def test_bf16_inside_the_users_autocast_follows_the_parameters() -> None:
    model, criterion, (x, y) = PROBLEMS["mlp"].make(F32)
    A = fh.Hessian(model, criterion, (x, y), precision="bf16", engine="recompute")
    d = torch.randn(A.n, generator=torch.Generator().manual_seed(0))
    want = A.loss(d), A.loss()
    assert abs(want[0] - want[1]) > 0.05
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        assert (A.loss(d), A.loss()) == want


class Forces(nn.Module):
    """Differentiates inside."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return force


def test_a_model_that_differentiates_inside_can_be_cut_and_checked() -> None:
    torch.manual_seed(0)
    made = Forces(), nn.MSELoss(), (torch.randn(6, 4, dtype=F64), torch.randn(6, 4, dtype=F64))
    A = fh.Hessian(*made, microbatch=2)
    assert mismatch(A, columns(fh.Hessian(*made))) < 1e-12
    assert A.check().ok


class Functional(Forces):
    """Differentiates inside by torch.func, which allows no hooks on saved tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: self.energy(x).sum())(x)


def test_a_model_that_uses_torch_func_inside_is_supported() -> None:
    torch.manual_seed(0)
    data = torch.randn(6, 4, dtype=F64), torch.randn(6, 4, dtype=F64)
    plain, functional = Forces(), Functional()
    functional.load_state_dict(plain.state_dict())
    want = columns(fh.Hessian(plain, nn.MSELoss(), data))
    assert mismatch(fh.Hessian(functional, nn.MSELoss(), data), want) < 1e-12
