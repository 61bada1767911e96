"""The Fisher matrices equal their definitions: sums of g g' by plain torch, in float64."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasthessian as fh
from tests.support.cross_entropies import CROSS_ENTROPIES, W3, net
from tests.support.models import (
    EACH_ENGINE,
    PROBLEMS,
    columns,
    error,
    gauss_newton,
    mismatch,
    refused,
)

pytestmark = pytest.mark.slow

F64 = torch.float64
each_engine = pytest.mark.parametrize("engine", EACH_ENGINE)


def bound(engine: str) -> float:
    """The error bound of test_engine_table.py: of central differences in float64, or rounding."""
    return 1e-6 if engine == "difference" else 1e-10


@pytest.mark.parametrize("curvature", [fh.EmpiricalFisher, fh.Fisher, fh.GaussNewton])
def test_a_function_with_its_options_is_the_module(curvature: Any) -> None:
    for how, shape in (("mean", ()), ("sum", (4,)), ("weights", ()), ("ignore 1", (4,))):
        (model, x, y), module = net(*shape), CROSS_ENTROPIES[how]
        y = y.clamp(min=0) if how == "ignore 1" else y
        options = {name: getattr(module, name) for name in ("weight", "ignore_index", "reduction")}
        function = functools.partial(F.cross_entropy, **options)
        cuts = [(x[:3], y[:3]), (x[3:], y[3:])]
        want = columns(curvature(model, module, cuts))
        assert error(columns(curvature(model, function, cuts)), want) < 1e-13, how
    model, x, y = net()
    want = columns(curvature(model, nn.CrossEntropyLoss(), (x, y)))
    assert error(columns(curvature(model, F.cross_entropy, (x, y))), want) < 1e-13


def drawn(criterion: Any, *shape: int) -> tuple[nn.Module, Any, tuple[Tensor, Tensor]]:
    """A problem with valid targets for the criterion; the Fisher matrix must not read them."""
    model, x, y = net(*shape)
    with torch.no_grad():
        model.last.weight.mul_(4)  # so that predictions are not uniform
    if not isinstance(criterion, nn.CrossEntropyLoss):
        y = torch.randint(2, (9, 3, *shape)).to(F64)
    return model, criterion, (x, y)


FISHERS = {
    **{f"cross entropy, {how}": CROSS_ENTROPIES[how] for how in CROSS_ENTROPIES if "1" not in how},
    "mse": nn.MSELoss(),
    "mse, sum": nn.MSELoss(reduction="sum"),
    "bce": nn.BCEWithLogitsLoss(),
    "bce, sum": nn.BCEWithLogitsLoss(reduction="sum"),
}


@pytest.mark.parametrize("shape", [(), (4,)], ids=["vectors", "sequences"])
@pytest.mark.parametrize("how", FISHERS)
def test_the_mean_over_seeds_and_samples_is_the_gauss_newton_matrix(
    how: str, shape: tuple[int, ...]
) -> None:
    """The error of the mean of v'Fv is at most 5 standard errors, over seeds and over samples."""
    made = drawn(FISHERS[how], *shape)
    G = gauss_newton(*made)
    v = torch.randn(len(G), dtype=F64, generator=torch.Generator().manual_seed(4))
    spread = []
    for samples, seeds in ((1, 40), (40, 5)):
        found = torch.stack(
            [v @ (fh.Fisher(*made, samples=samples, seed=seed) @ v) for seed in range(seeds)]
        )
        stderr = found.std() / seeds**0.5
        assert (found.mean() - v @ G @ v).abs() < 5 * stderr < v @ G @ v, samples
        spread.append(float(found.std()))
    assert spread[1] < 0.4 * spread[0]  # with more samples the spread is smaller
    many = columns(fh.Fisher(*made, samples=200))
    assert (many - G).norm() < 0.25 * G.norm()
    assert error(many.T, many) < 1e-14
    assert torch.linalg.eigvalsh(many).min() > -1e-12 * many.abs().max()


@each_engine
@pytest.mark.parametrize("name", ["mlp", "transformer", "gru", "logistic"])
def test_every_engine_draws_the_same_targets_for_a_seed(name: str, engine: str) -> None:
    problem = PROBLEMS[name]
    model, criterion, data = problem.make()
    state = torch.get_rng_state()
    A = fh.Fisher(model, criterion, data, samples=2, seed=3, engine=engine)
    H = columns(A) if name == "mlp" else A @ torch.eye(A.n, dtype=F64)[:5]
    again = fh.Fisher(*problem.make(), samples=2, seed=3, engine=engine)
    assert torch.equal(again @ torch.eye(A.n, dtype=F64)[: len(H)], H)
    assert torch.equal(state, torch.get_rng_state())
    if name == "mlp":
        bare = torch.linalg.eigvalsh((H + H.T) / 2)
        assert bare.min() > -bound(engine) * bare.max()
        rank = int((bare > 1e-4 * bare.max()).sum())
        assert 1 < rank <= 2 * 11  # one g per target and draw
    plain = fh.Fisher(model, criterion, data, samples=2, seed=3) @ torch.eye(A.n, dtype=F64)[:5]
    assert error(H[:5], plain) < bound(engine)  # the same draws, with derivatives by another engine
    other = fh.Fisher(model, criterion, data, samples=2, seed=4, engine=engine)
    assert error(other @ torch.eye(A.n, dtype=F64)[:5], plain) > 1e-3


def test_targets_are_drawn_and_not_read() -> None:
    for criterion in (nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()):
        model, _, (x, y) = drawn(criterion)
        y = y.clamp(min=0)
        A = columns(fh.Fisher(model, criterion, (x, y), seed=1))
        assert torch.equal(columns(fh.Fisher(model, criterion, (x, y.flip(0)), seed=1)), A)


@pytest.mark.parametrize("how", ["mean", "sum", "weights"])
@pytest.mark.parametrize("criterion", ["cross entropy", "mse", "bce"])
def test_the_expectation_does_not_depend_on_the_batches(criterion: str, how: str) -> None:
    """G of all data is the limit even with batches of one sample and an ignored batch."""
    if how == "weights" and criterion != "cross entropy":
        return
    made = {"mse": nn.MSELoss, "bce": nn.BCEWithLogitsLoss}
    loss = CROSS_ENTROPIES[how] if criterion == "cross entropy" else made[criterion](reduction=how)
    model, loss, (x, y) = drawn(loss)
    G = gauss_newton(model, loss, (x, y))
    cuts = [(x[a:b], y[a:b]) for a, b in ((0, 1), (1, 2), (2, 9))]
    for data in (cuts, DataLoader(TensorDataset(x, y), 4)):
        A = fh.Fisher(model, loss, data, samples=1000)
        assert mismatch(A, G) < 0.15  # the spread of a draw times 1 / sqrt(1000)


def own_loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y)


UNKNOWN = {
    "l1": nn.L1Loss(),
    "own": own_loss,
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "smoothing by partial": functools.partial(F.cross_entropy, label_smoothing=0.1),
    "nll": nn.NLLLoss(),
    "positive weight": nn.BCEWithLogitsLoss(pos_weight=W3),
    "bce weight": nn.BCEWithLogitsLoss(weight=W3),
}


@pytest.mark.parametrize("how", UNKNOWN)
def test_a_criterion_without_a_known_likelihood_is_refused_in_one_line(how: str) -> None:
    real = how in ("l1", "positive weight", "bce weight")
    made = drawn(nn.MSELoss() if real else nn.CrossEntropyLoss())
    refused(lambda: fh.Fisher(made[0], UNKNOWN[how], made[2]), TypeError, "criterion")


def test_bad_samples_seeds_and_models_are_refused_in_one_line() -> None:
    made = drawn(nn.CrossEntropyLoss())
    for samples in (0, -1):
        refused(lambda s=samples: fh.Fisher(*made, samples=s), ValueError, "samples")
    refused(lambda: fh.Fisher(*made, seed=-1), ValueError, "seed")
    refused(lambda: fh.Fisher(made[0], None, made[2]), TypeError, "criterion")
    refused(lambda: fh.EmpiricalFisher(made[0], None, made[2]), TypeError, "criterion")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made[0]

        def forward(self, x: Tensor) -> Any:
            return self.inner(x), x

    refused(
        lambda: fh.EmpiricalFisher(Two(), lambda z, y: made[1](z[0], y), made[2]),
        TypeError, "must return a tensor",
    )  # fmt: skip


@pytest.mark.parametrize("curvature", [fh.EmpiricalFisher, fh.Fisher, fh.GaussNewton])
def test_outputs_without_a_second_dimension(curvature: Any) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    flat = nn.Sequential(inner, nn.Flatten(0))
    x, y = torch.randn(6, 4, dtype=F64), torch.randn(6, dtype=F64)
    want = columns(curvature(inner, nn.MSELoss(), (x, y[:, None])))
    assert error(columns(curvature(flat, nn.MSELoss(), (x, y))), want) < 1e-13
    assert error(columns(curvature(flat, F.mse_loss, (x, y))), want) < 1e-13


def test_broadcast_targets_of_a_sum_count_each_time() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    x, y = torch.randn(5, 4, dtype=F64), torch.randn(5, 3, dtype=F64)
    criterion = nn.MSELoss(reduction="sum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of broadcasting
        G = columns(fh.GaussNewton(model, criterion, (x, y)))
        assert mismatch(fh.Fisher(model, criterion, (x, y), samples=2000), G) < 0.15


class Own(nn.Module):
    """A model that returns its own loss; none is the mean cross-entropy of its logits."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.net = how, nn.Linear(4, 3).double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        z = self.net(x)
        if self.how == "scaled":
            loss = F.cross_entropy(z / 4, labels)
        elif self.how == "counted":
            loss = F.cross_entropy(z, labels, reduction="sum") / 32
        else:
            loss = F.cross_entropy(z, labels) + 0.5 * self.net.weight.square().sum()
        return {"loss": loss, "logits": z}


def test_a_model_loss_that_is_not_a_cross_entropy_is_detected() -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 4, dtype=F64), "labels": torch.randint(3, (8,))}
    for how in ("scaled", "counted"):
        model = Own(how)
        refused(lambda m=model: fh.Fisher(m, None, batch), TypeError, "the model's own loss")
        G = fh.GaussNewton(model, None, batch)  # by the second derivative of the loss
        assert error(columns(G), columns(fh.Hessian(model, None, batch))) < 1e-12
    for curvature in (fh.GaussNewton, fh.EmpiricalFisher, fh.Fisher):
        refused(
            lambda c=curvature: c(Own("penalty"), None, batch),
            ValueError, "depends on the parameters other than through the outputs",
        )  # fmt: skip
