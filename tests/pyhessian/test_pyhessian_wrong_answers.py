"""PyHessian's silent wrong answers S1..S13: the drop-in is right, or its error says why not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasthessian.pyhessian import group_add, group_product, hessian, hessian_vector_product
from fasthessian.pyhessian.density_plot import density_generate
from tests.support.pyhessian_cases import (
    TIGHT,
    Quadratic,
    assert_top,
    batches,
    cross_entropy,
    dense,
    mean_loss_hessian,
    mlp,
    output,
    quadratic_data,
    quick_trace,
    symmetric,
)


def test_S1_old_gradients_do_not_enter():
    model, data = mlp(), batches()
    H = mean_loss_hessian(model, data)
    cross_entropy(model(data[0][0]), data[0][1]).backward()
    first = hessian(model, cross_entropy, data=data[0], cuda=False)
    first_grads = first.gradsH
    second = hessian(model, cross_entropy, data=data[0], cuda=False)
    for a, b in zip(first_grads, second.gradsH, strict=True):
        torch.testing.assert_close(a, b)
    assert_top(first, H)
    assert_top(second, H)
    assert_top(hessian(model, cross_entropy, dataloader=data, cuda=False), H)


def test_S2_generator_as_dataloader_is_refused():
    with pytest.raises(TypeError, match=r"dataloader.*generator.*list"):
        hessian(mlp(), cross_entropy, dataloader=(pair for pair in batches()), cuda=False)


def test_S3_sum_reduction_adds_the_batches():
    model, data = mlp(), batches((5, 9))
    H = 14 * mean_loss_hessian(model, data)
    assert_top(hessian(model, nn.CrossEntropyLoss(reduction="sum"), dataloader=data, cuda=False), H)


def test_S4_ignored_targets_have_no_weight():
    model, data = mlp(), batches((8, 8))
    data[0][1][:6] = -100
    x, y = torch.cat([x for x, _ in data]).double(), torch.cat([y for _, y in data])
    H = dense(model, lambda call: nn.functional.cross_entropy(call(x), y))
    assert_top(hessian(model, cross_entropy, dataloader=data, cuda=False), H)


def test_S4_ragged_last_batch_is_weighted_by_its_samples():
    model, data = mlp(), batches((12, 3))
    assert_top(
        hessian(model, cross_entropy, dataloader=data, cuda=False), mean_loss_hessian(model, data)
    )


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e6])
def test_S5_scaling_the_loss_scales_the_answers(scale: float):
    (data,) = batches()

    def at(factor: float) -> tuple[Tensor, Tensor, Tensor]:
        h = hessian(mlp(), lambda o, t: factor * cross_entropy(o, t), data=data, cuda=False)
        torch.manual_seed(5)
        nodes, _ = h.density(iter=20)
        values, vectors = h.eigenvalues(top_n=3, **TIGHT)
        for v in vectors:
            assert math.isclose(float(group_product(v, v)), 1.0, rel_tol=1e-5)
        return torch.tensor(nodes), torch.tensor(values), torch.tensor(quick_trace(h))

    for reference, scaled in zip(at(1.0), at(scale), strict=True):
        torch.testing.assert_close(
            scaled / scale, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max())
        )


class TwoAdded(nn.Module):
    """Layer with the weight a + b: autograd returns one product tensor for both."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 3))
        self.b = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) @ (self.a + self.b)


def test_S6_parameters_that_share_their_product():
    torch.manual_seed(0)
    model, data = TwoAdded(), batches()
    H = mean_loss_hessian(model, data)
    h = hessian(model, cross_entropy, data=data[0], cuda=False)
    assert_top(h, H)
    ends = torch.linalg.eigvalsh(H)[[0, -1]].float()
    nodes, _ = h.density(iter=20)
    assert min(nodes[0]) >= ends[0] - 1e-4
    assert max(nodes[0]) <= ends[1] + 1e-4
    v = [torch.randn(4, 3), torch.randn(4, 3)]
    products = hessian_vector_product(h.gradsH, h.params, v)
    expected = products[1].clone()
    group_add(products, v)
    torch.testing.assert_close(products[1], expected + v[1])


def test_S6_the_product_is_never_the_vector_itself():
    h = hessian(Quadratic(torch.eye(5)), output, data=quadratic_data(), cuda=False)
    v = [torch.ones(5)]
    group_add(hessian_vector_product(h.gradsH, h.params, v), v, alpha=-1)
    torch.testing.assert_close(v[0], torch.ones(5))


@pytest.mark.parametrize("seed", range(5))
def test_S7_opposite_top_eigenvalues(seed: int):
    A = symmetric([1.0, -1.0, *np.linspace(-0.5, 0.5, 28)])
    h = hessian(Quadratic(A), output, data=quadratic_data(), cuda=False)
    torch.manual_seed(seed)
    assert abs(abs(h.eigenvalues()[0][0]) - 1.0) < 1e-3
    assert sorted(h.eigenvalues(top_n=2)[0]) == pytest.approx([-1.0, 1.0], abs=1e-3)


def test_S8_close_neighbours_come_in_order_and_apart():
    values = [5.0, 4.9, 4.85, -4.8, *np.linspace(0, 1, 56)]
    A = symmetric(values)
    h = hessian(Quadratic(A), output, data=quadratic_data(), cuda=False)
    found, vectors = h.eigenvalues(top_n=4, tol=1e-5)
    assert found == pytest.approx(values[:4], abs=1e-3)
    V = torch.stack([v[0] for v in vectors])
    torch.testing.assert_close(V @ V.T, torch.eye(4), rtol=0, atol=1e-5)
    scaled = torch.tensor(found, dtype=V.dtype)[:, None] * V
    torch.testing.assert_close(V @ A, scaled, rtol=0, atol=1e-3)


def test_S9_more_steps_than_parameters_invents_no_nodes():
    values = [3.0, 1.0, 0.5, -2.0, 0.0, 0.25]
    h = hessian(Quadratic(symmetric(values)), output, data=quadratic_data(), cuda=False)
    nodes, weights = h.density(iter=40, n_v=3)
    for row, shares in zip(nodes, weights, strict=True):
        assert len(row) == len(shares) == 40
        assert sum(shares) == pytest.approx(1.0, abs=1e-6)
        assert max(min(abs(x - value) for value in values) for x in row) < 1e-4


def test_S10_trace_reaches_the_requested_tolerance():
    generator = torch.Generator().manual_seed(3)
    B = torch.randn(40, 40, generator=generator)
    A = B + B.T + 4 * torch.eye(40)
    h = hessian(Quadratic(A), output, data=quadratic_data(), cuda=False)
    exact, tol = float(A.trace()), 0.1
    torch.manual_seed(0)
    errors = [abs(np.mean(h.trace(maxIter=3000, tol=tol)) / exact - 1) for _ in range(40)]
    assert np.mean(np.array(errors) <= tol) >= 0.85


def test_S10_trace_warns_if_it_misses_the_tolerance():
    A = symmetric(np.linspace(-1, 1.5, 40))
    h = hessian(Quadratic(A), output, data=quadratic_data(), cuda=False)
    with pytest.warns(UserWarning, match="trace"):
        assert len(h.trace(maxIter=20, tol=1e-4)) == 20


@pytest.mark.parametrize("reach", [10.0, 1e3, 2e4, 1e7])
def test_S11_every_node_keeps_its_mass_on_the_grid(reach: float):
    nodes = np.array([[0.0, 0.123456 * reach, 0.777777 * reach, reach]])
    weights = np.array([[0.4, 0.3, 0.2, 0.1]])
    density, grids = density_generate(nodes, weights)
    step = grids[1] - grids[0]
    assert len(grids) == len(density) == 10000
    assert density.sum() * step == pytest.approx(1.0, abs=1e-9)
    for node, weight in zip(nodes[0], weights[0], strict=True):
        near = np.abs(grids - node) < reach / 20
        assert density[near].sum() * step == pytest.approx(weight, rel=1e-3)


@pytest.mark.parametrize("how", ["no_grad", "data"])
@pytest.mark.parametrize("mode", ["data", "dataloader"])
def test_S12_parameters_changed_after_construction(mode: str, how: str):
    model, data = mlp(), batches()
    given = data[0] if mode == "data" else data
    h = hessian(model, cross_entropy, cuda=False, **{mode: given})
    assert_top(h, mean_loss_hessian(model, data))
    before = h.gradsH
    with torch.no_grad():
        for p in model.parameters():
            (p.data if how == "data" else p).mul_(1.7)
    assert_top(h, mean_loss_hessian(model, data))
    assert not torch.allclose(before[0], h.gradsH[0])


@pytest.mark.parametrize("how", ["no_grad", "data"])
def test_S12_assigned_gradients_of_another_point_are_refused(how: str):
    model, data = mlp(), batches()
    h = hessian(model, cross_entropy, data=data[0], cuda=False)
    h.params, h.gradsH = h.params[:1], [2 * h.gradsH[0]]
    h.density(iter=3)
    with torch.no_grad():
        (model[2].weight.data if how == "data" else model[2].weight).mul_(1.7)
    with pytest.raises(ValueError, match=r"gradsH.*parameters"):
        h.density(iter=3)


def test_S13_randomly_augmenting_loader_is_noticed():
    class Augmented(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return torch.randn(4), i % 3

    loader = torch.utils.data.DataLoader(Augmented(), batch_size=4)
    h = hessian(mlp(), cross_entropy, dataloader=loader, cuda=False)
    with pytest.warns(UserWarning, match="different batches at each pass"):
        first = h.eigenvalues(tol=1e-6)[0]
    assert h.eigenvalues(tol=1e-6)[0] == pytest.approx(first, rel=1e-4)  # of one matrix


def test_S13_a_shuffled_loader_is_not_a_random_one():
    torch.manual_seed(0)
    model, data = mlp(), batches((12,))
    pairs = torch.utils.data.TensorDataset(*data[0])
    loader = torch.utils.data.DataLoader(pairs, batch_size=4, shuffle=True)
    assert_top(
        hessian(model, cross_entropy, dataloader=loader, cuda=False), mean_loss_hessian(model, data)
    )
