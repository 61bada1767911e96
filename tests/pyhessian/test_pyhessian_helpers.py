"""The six helpers on lists of tensors, and the functions of density_plot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fasthessian.pyhessian import (
    get_params_grad,
    group_add,
    group_product,
    hessian_vector_product,
    normalization,
    orthnormal,
)
from fasthessian.pyhessian.density_plot import density_generate, gaussian, get_esd_plot
from tests.support.pyhessian_cases import (
    batches,
    cross_entropy,
    made,
    mean_loss_hessian,
    mlp,
    quadratic,
)


def test_group_product_and_its_gradient():
    xs = [torch.randn(3, 2, requires_grad=True), torch.randn(4)]
    ys = [torch.randn(3, 2), torch.randn(4)]
    result = group_product(xs, ys)
    expected = (xs[0] * ys[0]).sum() + (xs[1] * ys[1]).sum()
    torch.testing.assert_close(result, expected)
    (slope,) = torch.autograd.grad(result, xs[0])
    torch.testing.assert_close(slope, ys[0])
    with pytest.raises(ValueError, match="xs has 2 tensors and ys 1"):
        group_product(xs, ys[:1])


def test_group_add_works_in_place_also_on_parameters():
    model = nn.Linear(2, 2)
    params, before = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    update = [torch.ones_like(p) for p in params]
    assert group_add(params, update, alpha=0.5) is params
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old + 0.5)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e15])
def test_normalization_at_any_scale(scale):
    v = [scale * torch.tensor([3.0, 0.0]), scale * torch.tensor([[4.0]])]
    result = normalization(v)
    torch.testing.assert_close(result[0], torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(result[1], torch.tensor([[0.8]]))
    assert not any(x.any() for x in normalization([torch.zeros(2), torch.zeros(1)]))


def test_orthnormal():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 5)).Q.T
    v_list = [[row[:4].view(2, 2), row[4:]] for row in basis]
    nearly = [x + 1e-5 * torch.randn_like(x) for x in v_list[2]]
    before = [x.clone() for x in nearly]
    w = orthnormal(nearly, v_list)
    assert max(abs(float(group_product(w, v))) for v in v_list) < 1e-6
    assert float(group_product(w, w)) == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(nearly, before, rtol=0, atol=0)
    inside = [a + 2 * b for a, b in zip(v_list[0], v_list[1], strict=True)]
    assert not any(x.any() for x in orthnormal(inside, v_list))


def test_get_params_grad():
    model = mlp()
    model[2].bias.requires_grad_(False)
    x, y = batches()[0]
    cross_entropy(model[:1](x)[:, :3], y).backward()
    params, grads = get_params_grad(model)
    assert [id(p) for p in params] == [id(p) for p in model.parameters() if p.requires_grad]
    assert grads[0] is not model[0].weight.grad
    torch.testing.assert_close(grads[0], model[0].weight.grad)
    assert not grads[2].any()


def test_hessian_vector_product_repeats_and_fits_shapes():
    model, data = mlp(), batches()
    H = mean_loss_hessian(model, data).float()
    h = made("data", model, data)
    v = [torch.randn_like(p) for p in h.params]
    flat = torch.cat([x.flatten() for x in v])
    for _ in range(2):
        Hv = hessian_vector_product(h.gradsH, h.params, v)
        torch.testing.assert_close(
            torch.cat([x.flatten() for x in Hv]), H @ flat, rtol=1e-3, atol=1e-5
        )
    vHv, Hv = h.dataloader_hv_product(v)
    assert vHv == pytest.approx(float(flat @ H @ flat), rel=1e-4)
    assert [x.shape for x in Hv] == [p.shape for p in h.params]
    with pytest.raises(ValueError, match=r"v\[0\] has shape"):
        hessian_vector_product(h.gradsH, h.params, [x.flatten() for x in v])


@pytest.mark.parametrize("reach", [1.0, 30.0, 900.0])
def test_density_where_the_grid_is_fine_is_the_sum_of_gaussians(reach):
    rng = np.random.default_rng(0)
    nodes, weights = rng.uniform(0, reach, (2, 15)), rng.dirichlet(np.ones(15), 2)
    density, grids = density_generate(nodes.tolist(), weights.tolist(), sigma_squared=1e-3)
    variance = 1e-3 * max(1.0, nodes.max() - nodes.min() + 0.02)
    expected = np.mean(
        [
            gaussian(row, grids[:, None], variance) @ w
            for row, w in zip(nodes, weights, strict=True)
        ],
        axis=0,
    )
    np.testing.assert_allclose(density, expected, atol=2e-3 * expected.max())
    assert grids[0] < nodes.min()
    assert grids[-1] > nodes.max()


def test_density_takes_complex_weights_and_unsorted_nodes():
    nodes, weights = [[2.0, -1.0, 0.5]], [[0.2, 0.3, 0.5]]
    expected = density_generate(nodes, weights)
    for values, shares in (
        (np.array(nodes, dtype=np.complex64), np.array(weights, dtype=np.complex64)),
        ([nodes[0][::-1]], [weights[0][::-1]]),
    ):
        for a, b in zip(density_generate(values, shares), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize(
    ("nodes", "weights", "options", "words"),
    [
        ([[1.0]], [[0.5, 0.5]], {}, "one weight per node"),
        ([[np.nan]], [[1.0]], {}, "eigenvalues holds NaN"),
        ([[1.0]], [[np.inf]], {}, "weights holds NaN or inf"),
        ([], [], {}, "eigenvalues has shape"),
        ([[1.0]], [[1.0]], {"num_bins": 1}, "num_bins is 1"),
        ([[1.0]], [[1.0]], {"sigma_squared": 0.0}, "sigma_squared is 0.0"),
        ([[1.0]], [[1.0]], {"overhead": -1.0}, "overhead -1.0"),
    ],
)
def test_density_says_what_is_wrong(nodes, weights, options, words):
    with pytest.raises(ValueError, match=words):
        density_generate(nodes, weights, **options)


def test_gaussian():
    x = np.linspace(-8, 8, 2001)
    values = gaussian(x, 0.5, 0.7)
    assert values.sum() * (x[1] - x[0]) == pytest.approx(1.0)
    assert gaussian(0.5, 0.5, 0.7) == pytest.approx(1 / np.sqrt(2 * np.pi * 0.7))


def test_esd_plot_writes_its_pdf(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot as plt

    monkeypatch.chdir(tmp_path)
    get_esd_plot(*quadratic(np.linspace(-1, 2, 30)).density(iter=10, n_v=2))
    assert (tmp_path / "example.pdf").read_bytes().startswith(b"%PDF")
    assert plt.gca().get_yscale() == "log"
    plt.close("all")
