"""The Fisher matrices against their definitions: sums of g g' by plain torch, in float64."""

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
from tests.support.models import (
    EACH_ENGINE,
    PROBLEMS,
    columns,
    error,
    gauss_newton,
    jacobian,
    mismatch,
    refused,
)

F64 = torch.float64
W3 = torch.tensor([0.2, 1.0, 5.0], dtype=F64)
each_engine = pytest.mark.parametrize("engine", EACH_ENGINE)


def bound(engine: str) -> float:
    """As in the table of engines: what a central difference in float64 leaves, or rounding."""
    return 1e-6 if engine == "difference" else 1e-10


class Pointwise(nn.Module):
    """Classes in the second dimension, as cross-entropy wants; the same layers at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.movedim(1, -1)))).movedim(-1, 1)


def net(*shape: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(2)
    model, x, y = Pointwise(), torch.randn(9, 4, *shape, dtype=F64), torch.randint(3, (9, *shape))
    y.view(-1)[[1, 4, 5]] = -100
    if shape:
        y[1] = -100  # a whole sequence, and below a whole batch
    return model.double(), x, y


def of_targets(model: nn.Module, criterion: Any, x: Tensor, y: Tensor) -> Tensor:
    """sum_i w_i g_i g_i' over the valid targets; over sum_i w_i for a mean."""
    options = {"ignore_index": criterion.ignore_index, "reduction": "none"}
    g = jacobian(model, (x, y), lambda z: F.cross_entropy(z, y, **options))
    valid = y.flatten() != criterion.ignore_index
    g, label = g[valid], y.flatten()[valid]
    w = torch.ones(len(g), dtype=F64) if criterion.weight is None else criterion.weight[label]
    return g.T @ (w[:, None] * g) / (w.sum() if criterion.reduction == "mean" else 1)


CROSS_ENTROPIES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights": nn.CrossEntropyLoss(W3),
    "weights, sum": nn.CrossEntropyLoss(W3, reduction="sum"),
    "ignore 1": nn.CrossEntropyLoss(ignore_index=1),
}


@each_engine
@pytest.mark.parametrize("shape", [(), (4,)], ids=["classes", "sequences"])
@pytest.mark.parametrize("how", CROSS_ENTROPIES)
def test_the_terms_of_a_cross_entropy_are_its_valid_targets(
    how: str, shape: tuple[int, ...], engine: str
) -> None:
    (model, x, y), criterion = net(*shape), CROSS_ENTROPIES[how]
    if how == "ignore 1":
        y[y == -100] = 0
    want = of_targets(model, criterion, x, y)
    cuts = [(x[a:b], y[a:b]) for a, b in ((0, 1), (1, 2), (2, 9))]
    loader = DataLoader(TensorDataset(x, y), 4, shuffle=True)
    for data in (cuts, loader) if engine == "recompute" else ((x, y), cuts):
        A = fh.EmpiricalFisher(model, criterion, data, engine=engine)
        assert mismatch(A, want) < bound(engine)


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


def mean_of_fourth_powers(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).pow(4).reshape(len(z), -1).sum(1).mean()


SAMPLES: dict[str, tuple[Any, Any]] = {  # criterion, and the loss of each sample
    "mse": (nn.MSELoss(), lambda z, y: (z - y).square().reshape(len(z), -1).mean(1)),
    "mse, sum": (
        nn.MSELoss(reduction="sum"),
        lambda z, y: (z - y).square().reshape(len(z), -1).sum(1),
    ),
    "bce": (
        nn.BCEWithLogitsLoss(),
        lambda z, y: (
            F.binary_cross_entropy_with_logits(z, y, reduction="none").reshape(len(z), -1).mean(1)
        ),
    ),
    "probabilities": (
        nn.CrossEntropyLoss(),
        lambda z, y: F.cross_entropy(z, y, reduction="none").reshape(len(z), -1).mean(1),
    ),
    "own": (mean_of_fourth_powers, lambda z, y: (z - y).pow(4).reshape(len(z), -1).sum(1)),
}


@each_engine
@pytest.mark.parametrize("shape", [(), (4,)], ids=["vectors", "maps"])
@pytest.mark.parametrize("how", SAMPLES)
def test_the_terms_of_other_criteria_are_the_samples(
    how: str, shape: tuple[int, ...], engine: str
) -> None:
    criterion, each = SAMPLES[how]
    model, x, _ = net(*shape)
    y = torch.rand(9, 3, *shape, dtype=F64)
    y = y.softmax(1) if how == "probabilities" else y
    g = jacobian(model, (x, y), lambda z: each(z, y))
    want = g.T @ g / (1 if how.endswith("sum") else 9)
    for data in ((x, y), [(x[:1], y[:1]), (x[1:], y[1:])]):
        A = fh.EmpiricalFisher(model, criterion, data, engine=engine)
        assert mismatch(A, want) < bound(engine)
    if engine == "retained":
        assert torch.linalg.eigvalsh(columns(A)).min() > -1e-12 * want.abs().max()


# The Fisher matrix of drawn targets


def drawn(criterion: Any, *shape: int) -> tuple[nn.Module, Any, tuple[Tensor, Tensor]]:
    """The problem with targets of the criterion's kind, which the Fisher matrix must not read."""
    model, x, y = net(*shape)
    with torch.no_grad():
        model.last.weight.mul_(4)  # so that the model has an opinion
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
def test_its_mean_over_seeds_and_samples_is_the_gauss_newton_matrix(
    how: str, shape: tuple[int, ...]
) -> None:
    """v'Fv is off by at most 5 standard errors, over seeds and over samples alike."""
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
    assert spread[1] < 0.4 * spread[0]  # 1 / sqrt(50) = 0.14 of it
    many = columns(fh.Fisher(*made, samples=200))
    assert (many - G).norm() < 0.25 * G.norm()
    assert error(many.T, many) < 1e-14
    assert torch.linalg.eigvalsh(many).min() > -1e-12 * many.abs().max()


@each_engine
@pytest.mark.parametrize("name", ["mlp", "transformer", "gru", "logistic"])
def test_the_draws_are_those_of_the_seed_for_every_engine(name: str, engine: str) -> None:
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
        assert 1 < rank <= 2 * 11  # one g for each target and draw
    plain = fh.Fisher(model, criterion, data, samples=2, seed=3) @ torch.eye(A.n, dtype=F64)[:5]
    assert error(H[:5], plain) < bound(engine)  # the same draws, by other derivatives
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
def test_batches_cut_anyhow_have_the_same_expectation(criterion: str, how: str) -> None:
    """With an ignored batch, and batches of one: G of the whole is the limit all the same."""
    if how == "weights" and criterion != "cross entropy":
        return
    made = {"mse": nn.MSELoss, "bce": nn.BCEWithLogitsLoss}
    loss = CROSS_ENTROPIES[how] if criterion == "cross entropy" else made[criterion](reduction=how)
    model, loss, (x, y) = drawn(loss)
    G = gauss_newton(model, loss, (x, y))
    cuts = [(x[a:b], y[a:b]) for a, b in ((0, 1), (1, 2), (2, 9))]
    for data in (cuts, DataLoader(TensorDataset(x, y), 4)):
        A = fh.Fisher(model, loss, data, samples=1000)
        assert mismatch(A, G) < 0.15  # about 1 / sqrt(1000), times the spread of a draw


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
def test_a_criterion_without_a_known_likelihood_is_one_clear_line(how: str) -> None:
    real = how in ("l1", "positive weight", "bce weight")
    made = drawn(nn.MSELoss() if real else nn.CrossEntropyLoss())
    refused(lambda: fh.Fisher(made[0], UNKNOWN[how], made[2]), TypeError, "criterion")


def test_bad_samples_seeds_and_models_are_one_clear_line() -> None:
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


SMOOTHED = {
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "derived": type("Derived", (nn.CrossEntropyLoss,), {})(),
}


@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("how", SMOOTHED)
def test_ignored_targets_count_for_nothing_in_other_cross_entropies(how: str, shape: Any) -> None:
    model, x, y = net(*shape)
    criterion = SMOOTHED[how]
    smoothing = criterion.label_smoothing

    def each(z: Tensor) -> Tensor:
        rows, flat = z.movedim(1, -1).reshape(-1, z.shape[1]), y.reshape(-1)
        losses = F.cross_entropy(rows, flat, reduction="none", label_smoothing=smoothing)
        return losses[flat != -100]

    g = jacobian(model, (x, y), each)
    want = g.T @ g / int((y != -100).sum())
    assert int((y == -100).sum()) > 0
    for data in ((x, y), [(x[:3], y[:3]), (x[3:], y[3:])]):
        assert mismatch(fh.EmpiricalFisher(model, criterion, data), want) < 1e-10


def test_class_weights_with_smoothing_are_refused() -> None:
    model, x, y = net()
    both = nn.CrossEntropyLoss(weight=W3, label_smoothing=0.1)
    refused(lambda: fh.EmpiricalFisher(model, both, (x, y)), ValueError, "not both")


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
        warnings.simplefilter("ignore")  # torch's, of broadcasting
        G = columns(fh.GaussNewton(model, criterion, (x, y)))
        assert mismatch(fh.Fisher(model, criterion, (x, y), samples=2000), G) < 0.15


class Own(nn.Module):
    """A model with a loss of its own on labels, which is not the cross-entropy of its logits."""

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


def test_a_models_own_loss_is_recognised() -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 4, dtype=F64), "labels": torch.randint(3, (8,))}
    for how in ("scaled", "counted"):
        model = Own(how)
        refused(lambda m=model: fh.Fisher(m, None, batch), TypeError, "the model's own loss")
        G = fh.GaussNewton(model, None, batch)  # by the loss's own second derivative
        assert error(columns(G), columns(fh.Hessian(model, None, batch))) < 1e-12
    for curvature in (fh.GaussNewton, fh.EmpiricalFisher, fh.Fisher):
        refused(
            lambda c=curvature: c(Own("penalty"), None, batch),
            ValueError, "depends on the parameters other than through the outputs",
        )  # fmt: skip
