"""Small versions of public scripts that use PyHessian: models, data and what they compute.

They import the names of PyHessian, as the scripts do.
"""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.support.pyhessian_cases import by_magnitude, cross_entropy, dense, mean_loss_hessian, mlp
from tests.support.pyhessian_scripts import MARKS, about, flat, installed, near, problem

__all__ = ["installed"]
pytestmark = MARKS


def test_tutorial_top_eigenvalue():
    from pyhessian import hessian

    model, ((inputs, targets),), H = problem()
    comp = hessian(model, nn.CrossEntropyLoss(), data=(inputs, targets), cuda=False)
    values, _ = comp.eigenvalues()
    near(f"{values[-1]:.4f}", by_magnitude(H)[0])


def test_tutorial_two_eigenvalues_by_place():
    from pyhessian import hessian

    model, (data,), H = problem()
    values, _ = hessian(model, cross_entropy, data=data, cuda=False).eigenvalues(top_n=2)
    near(values[-2], by_magnitude(H)[0])
    near(values[-1], by_magnitude(H)[1], rel=0.1)


def test_loss_along_the_top_eigenvector():
    from pyhessian import hessian

    model, ((x, y),), H = problem()
    _, vectors = hessian(model, cross_entropy, data=(x, y), cuda=False).eigenvalues(tol=1e-6)
    moved, losses = copy.deepcopy(model).double(), []
    for lam in np.linspace(-0.01, 0.01, 3):
        for old, new, d in zip(model.parameters(), moved.parameters(), vectors[0], strict=True):
            new.data = old.data.double() + lam * d
        losses.append(cross_entropy(moved(x.double()), y).item())
    near((losses[0] - 2 * losses[1] + losses[2]) / 1e-4, by_magnitude(H)[0], rel=0.05)


def test_landscape_in_the_plane_of_two_eigenvectors():
    from pyhessian import hessian

    model, ((x, y),), H = problem()
    comp = hessian(model, cross_entropy, data=(x, y), cuda=False)
    _, vectors = comp.eigenvalues(top_n=2, maxIter=1000, tol=1e-6)
    a, b = flat(vectors[0]), flat(vectors[1])
    assert abs(float(a @ b)) < 1e-2
    near(a @ H @ a, by_magnitude(H)[0])
    near(b @ H @ b, by_magnitude(H)[1])


def test_example_script_with_a_list_of_batches():
    from density_plot import get_esd_plot
    from pyhessian import hessian

    model, data, H = problem((6, 6))
    comp = hessian(nn.DataParallel(model), cross_entropy, dataloader=data, cuda=False)
    values, _ = comp.eigenvalues()
    near(values[0], by_magnitude(H)[0])
    about(comp.trace(maxIter=400, tol=0), H.trace())
    nodes, weights = comp.density(iter=20)
    get_esd_plot(nodes, weights)
    near(np.sum(weights), 1.0)
    with open("example.pdf", "rb") as file:
        assert file.read(4) == b"%PDF"


def test_whole_loader_with_shuffling():
    from pyhessian import hessian

    model, (data,), H = problem((20,))
    loader = DataLoader(TensorDataset(*data), batch_size=8, shuffle=True)
    values, _ = hessian(model, cross_entropy, dataloader=loader, cuda=False).eigenvalues(tol=1e-5)
    near(values[0], by_magnitude(H)[0])


class Flipped(torch.utils.data.Dataset):
    """Images that each access may return mirrored, as the CIFAR loader does."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return (self.x[i].flip(0) if torch.rand(()) < 0.5 else self.x[i]), self.y[i]


def test_loader_that_augments():
    from pyhessian import hessian

    model, ((x, y),), _ = problem((16,))
    loader = DataLoader(Flipped(x, y), batch_size=8, shuffle=True)
    with pytest.warns(UserWarning, match="different batches at each pass"):
        values, _ = hessian(model, cross_entropy, dataloader=loader, cuda=False).eigenvalues()
    possible = [float(by_magnitude(mean_loss_hessian(model, list(loader)))[0]) for _ in range(60)]
    assert min(possible) * 0.9 < values[0] < max(possible) * 1.1


def test_loader_that_drops_the_last_batch():
    from pyhessian import hessian

    model, (data,), _ = problem((20,))
    loader = DataLoader(TensorDataset(*data), batch_size=8, shuffle=True, drop_last=True)
    comp = hessian(model, cross_entropy, dataloader=loader, cuda=False)
    with pytest.warns(UserWarning, match="different batches at each pass"):
        nodes, weights = comp.density(iter=15)
    assert len(nodes[0]) == len(weights[0]) == 15
    assert np.isfinite(nodes).all()
    near(np.sum(weights), 1.0)


def test_wrapper_that_permutes_and_a_loader_class():
    from pyhessian import hessian

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x.permute(1, 0))

    class Loader:
        def __init__(self, loader):
            self.loader = loader

        def __iter__(self):
            return iter(self.loader)

        def __len__(self):
            return len(self.loader)

    model, ((x, y),), H = problem()
    comp = hessian(Wrapper(model), cross_entropy, dataloader=Loader([(x.t(), y)]), cuda=False)
    near(comp.eigenvalues(top_n=1)[0][0], by_magnitude(H)[0])


def test_inside_a_training_loop():
    from pyhessian import hessian

    model, ((x, y),), _ = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        top = hessian(model, cross_entropy, data=(x, y), cuda=False).eigenvalues()[0][0]
        near(top, by_magnitude(mean_loss_hessian(model, [(x, y)]))[0])
        loss = cross_entropy(model(x), y)
        g = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
        loss.backward()
        for p, right in zip(model.parameters(), g, strict=True):
            torch.testing.assert_close(p.grad, right)
        optimizer.step()


def test_each_class_alone():
    from pyhessian import hessian

    model, ((x, y),), _ = problem((30,))
    for label in range(3):
        data = x[y == label], y[y == label]
        samples = hessian(model, cross_entropy, data=data, cuda=False).trace(maxIter=400, tol=0)
        about(samples, mean_loss_hessian(model, [data]).trace())


def test_mean_over_batches_weighted_by_size():
    from pyhessian import hessian

    torch.manual_seed(0)
    model, data, H = problem((9, 3))
    seen, total = 0, np.zeros(400)
    for x, y in data:
        comp = hessian(model, cross_entropy, data=(x, y), cuda=False)
        samples = np.array(comp.trace(maxIter=400, tol=0))
        total, seen = (total * seen + samples * len(x)) / (seen + len(x)), seen + len(x)
    about(total, H.trace())


def test_relative_sharpness_of_a_part_of_the_loader():
    from pyhessian import hessian

    model, data, _ = problem((6, 6, 6))
    part = list(itertools.islice(data, 2))
    top = hessian(model, cross_entropy, dataloader=part, cuda=False).eigenvalues(top_n=1)[0][0]
    square = sum(torch.norm(p.data) ** 2 for p in model.parameters())
    H = mean_loss_hessian(model, data[:2])
    near(top * square.item(), by_magnitude(H)[0] * flat(model.parameters()).square().sum())


def test_all_eigenvalues_of_a_small_model():
    from pyhessian import hessian

    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)), *torch.randn(2, 9, 1)
    loader = DataLoader(TensorDataset(x, y), batch_size=9)
    comp = hessian(model, nn.MSELoss(), dataloader=loader, cuda=False)
    values = comp.eigenvalues(top_n=7, maxIter=300, tol=1e-4)[0]
    H = dense(model, lambda call: F.mse_loss(call(x.double()), y.double()))
    np.testing.assert_allclose(values, by_magnitude(H), atol=2e-3 * float(by_magnitude(H)[0]))


def test_binary_targets():
    from pyhessian import hessian

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Sigmoid())
    x, y = torch.randn(12, 4), torch.randint(2, (12, 1)).float()
    comp = hessian(model, torch.nn.BCELoss(), data=(x, y), cuda=False)
    H = dense(model, lambda call: F.binary_cross_entropy(call(x.double()), y.double()))
    near(np.sqrt(comp.eigenvalues(top_n=3, maxIter=500)[0][0]), by_magnitude(H)[0].sqrt())


def test_the_users_own_criterion():
    from pyhessian import hessian

    class Clipped(nn.Module):
        def forward(self, outputs, targets):
            return F.cross_entropy(outputs, targets, reduction="none").clamp(max=1.5).mean()

    model, ((x, y),), _ = problem()
    H = dense(model, lambda call: Clipped()(call(x.double()), y))
    comp = hessian(model, Clipped(), data=(x, y), cuda=False)
    near(comp.eigenvalues(tol=1e-5)[0][0], by_magnitude(H)[0])


def test_model_that_holds_its_graph():
    from pyhessian import hessian

    class Graph(nn.Module):
        def __init__(self, x, edges):
            super().__init__()
            self.x, self.edges, self.first, self.last = x, edges, nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, dummy):
            return self.last(
                torch.tanh(
                    self.edges.to(self.first.weight.dtype)
                    @ self.first(self.x.to(self.first.weight.dtype))
                )
            )

    torch.manual_seed(0)
    model, y = Graph(torch.randn(6, 4), torch.rand(6, 6)), torch.randint(3, (6,))
    H = dense(model, lambda call: F.cross_entropy(call(torch.zeros(1)), y))
    comp = hessian(model, cross_entropy, data=(torch.zeros(1), y), cuda=False)
    near(comp.eigenvalues(tol=1e-5)[0][0], by_magnitude(H)[0])


def test_batch_as_a_list():
    from pyhessian import hessian

    model, ((x, y),), H = problem()
    near(
        hessian(model, cross_entropy, data=[x, y], cuda=False).eigenvalues()[0][0],
        by_magnitude(H)[0],
    )


def test_masked_tokens_one_by_one():
    from pyhessian import hessian

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

        def forward(self, both):
            ids, mask = both[:, 0], both[:, 1]
            out = self.head(torch.tanh(self.embed(ids) * mask.unsqueeze(-1)))
            return out.reshape(-1, 7)

    torch.manual_seed(0)
    model, ids = Tokens(), torch.randint(7, (4, 5))
    mask = torch.ones_like(ids)
    targets = ids.roll(-1, 1)
    loader = [(torch.stack([i, m])[None], t) for i, m, t in zip(ids, mask, targets, strict=True)]
    both = torch.stack([ids, mask], 1)
    H = dense(model, lambda call: F.cross_entropy(call(both), targets.reshape(-1)))
    comp = hessian(model, cross_entropy, dataloader=loader, cuda=False)
    near(comp.eigenvalues(tol=1e-5)[0][0], by_magnitude(H)[0])


def test_seeded_again_before_each_call():
    from pyhessian import hessian

    model, (data,), _ = problem()
    comp = hessian(model, cross_entropy, data=data, cuda=False)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(comp.trace(maxIter=10, tol=0))
    assert found[0] == found[1]


def test_computed_under_autocast():
    from pyhessian import hessian

    model, (data,), H = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = hessian(model, cross_entropy, data=data, cuda=False).eigenvalues(tol=1e-5)[0]
    near(values[0], by_magnitude(H)[0], rel=1e-3)


def test_frozen_parameters_and_an_unused_layer():
    from pyhessian import hessian

    model, (data,), _ = problem()
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    model[0].weight.requires_grad = False
    used = [model[0].bias, *model[2].parameters()]
    H = mean_loss_hessian(mlp(), [data])[40:, 40:]
    comp = hessian(model, cross_entropy, data=data, cuda=False)
    assert len(comp.params) == len(used) + 2
    near(comp.eigenvalues(tol=1e-5)[0][0], by_magnitude(H)[0])
