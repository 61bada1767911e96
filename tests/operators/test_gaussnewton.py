"""The Gauss-Newton matrix equals J' M J by torch's jacobian and hessian, in float64."""

import collections

import pytest
import torch
from torch import nn

import fasthessian as fh
from tests.support.models import ENGINES, PROBLEMS, columns, error, refused
from tests.support.models import gauss_newton as dense

F32, F64 = torch.float32, torch.float64
NAMES = ["mlp", "cnn", "transformer", "gru", "logistic"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_gauss_newton_is_the_dense_matrix(name, engine):
    made = PROBLEMS[name].make()
    G = columns(fh.GaussNewton(*made, engine=engine))
    assert error(G, dense(*made)) < 1e-13
    assert torch.linalg.eigvalsh(G).min() > -1e-13 * G.abs().max()
    single = columns(fh.GaussNewton(*PROBLEMS[name].make(F32), engine=engine))
    assert single.dtype is F32 and error(single, dense(*made)) < 2e-5


def test_gauss_newton_is_the_hessian_only_for_a_linear_model():
    made = PROBLEMS["logistic"].make()
    assert error(columns(fh.GaussNewton(*made)), columns(fh.Hessian(*made))) < 1e-14
    made = PROBLEMS["mlp"].make()
    assert error(columns(fh.GaussNewton(*made)), columns(fh.Hessian(*made))) > 1e-2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("budget", [None, 0])
def test_ragged_batches_and_ignored_targets_give_the_matrix_of_the_whole(reduction, budget):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(11, 4, dtype=F64), torch.randint(3, (11,))
    y[[2, 7, 8]] = -100
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    batches = [(x[:4], y[:4]), (x[4:10], y[4:10]), (x[10:], y[10:])]
    G = fh.GaussNewton(model, criterion, batches, memory_budget=budget)
    assert error(columns(G), dense(model, criterion, (x, y))) < 1e-13


def test_chosen_parameters_and_an_output_with_logits():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            output = type("Output", (), {})()
            output.logits = self.head(torch.tanh(self.layer(x)))
            return output

    torch.manual_seed(0)
    model, x, y = Wrapped().double(), torch.randn(6, 4, dtype=F64), torch.randint(2, (6,))

    def criterion(output, target):
        return nn.functional.cross_entropy(getattr(output, "logits", output), target)

    G = fh.GaussNewton(model, criterion, (x, y), params=["head.weight", "head.bias"])
    plain = nn.Sequential(model.layer, nn.Tanh(), model.head)
    assert error(columns(G), dense(plain, criterion, (x, y))[15:, 15:]) < 1e-13


def test_gauss_newton_uses_changed_parameters_and_works_in_every_algorithm():
    made = PROBLEMS["cnn"].make()
    G = fh.GaussNewton(*made)
    with torch.no_grad():
        for p in made[0].parameters():
            p.mul_(1.1)
    want = dense(*made)
    values = torch.linalg.eigvalsh(want)
    torch.testing.assert_close(fh.eigsh(G, 3, tol=1e-8).values, values.flip(0)[:3], rtol=1e-8,
                               atol=0)  # fmt: skip
    found = fh.trace(G, rtol=0.2)
    assert found.interval[0] <= want.trace() <= found.interval[1]
    # nodes of a quadrature are not negative for a positive semidefinite matrix
    assert fh.density(G, steps=20).nodes.min() > -1e-12 * values[-1]


def test_a_criterion_linear_in_the_outputs_has_no_curvature():
    made = PROBLEMS["mlp"].make()
    G = fh.GaussNewton(made[0], lambda z, y: z.mean(), made[2])
    assert not columns(G).any()


def test_the_model_is_unchanged():
    model, criterion, data = PROBLEMS["cnn"].make()
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    G = fh.GaussNewton(model, criterion, data)
    G @ torch.ones(G.n, dtype=F64)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_unsupported_losses_and_models_are_refused_in_one_line():
    model, criterion, data = PROBLEMS["mlp"].make()
    refused(
        lambda: fh.GaussNewton(model, None, data), TypeError,
        "criterion is None, so the model gets the whole batch",
    )  # fmt: skip

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, y):
            return criterion(self.inner(x), y)

    refused(lambda: fh.GaussNewton(Own(), None, data), TypeError, "criterion must be given")
    refused(
        lambda: fh.GaussNewton(model, lambda z, y: -criterion(z, y), data),
        ValueError, "criterion is not convex in the outputs",
    )  # fmt: skip

    refused(
        lambda: fh.GaussNewton(model, lambda z, y: -criterion(z, y), data, engine="recompute"),
        ValueError, "criterion is not convex in the outputs",
    )  # fmt: skip

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()

        def forward(self, x):
            return collections.namedtuple("O", "logits more")(self.a(x), self.b(x))

    refused(
        lambda: fh.GaussNewton(
            Heads(), lambda o, y: criterion(o.logits, y) + criterion(o.more, y), data
        ),
        ValueError, "depends on the parameters other than through the outputs",
    )  # fmt: skip

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x), x

    refused(
        lambda: fh.GaussNewton(Two(), lambda z, y: criterion(z[0], y), data),
        TypeError, "must return a tensor or an output with .logits",
    )  # fmt: skip


def test_class_weights_and_label_smoothing_together():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(8, 4, dtype=F64), torch.randint(3, (8,))
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    criterion = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1)
    H, G = (columns(kind(model, criterion, (x, y))) for kind in (fh.Hessian, fh.GaussNewton))
    torch.testing.assert_close(G, H)  # the model is linear
