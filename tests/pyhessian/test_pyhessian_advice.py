"""The advice in every message of the drop-in is followed and works."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fasthessian as fh
from fasthessian.pyhessian import (
    group_add,
    group_product,
    hessian,
    hessian_vector_product,
    normalization,
)
from fasthessian.pyhessian.density_plot import density_generate
from tests.support.pyhessian_cases import (
    ByHand,
    assert_top,
    batches,
    by_magnitude,
    cross_entropy,
    dense,
    mean_loss_hessian,
    mlp,
    quadratic,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using backward"),
    pytest.mark.filterwarnings("ignore:cuda is true"),
]


def refused(words, function, kind=Exception):
    """The message of an error, one line that contains these words."""
    with pytest.raises(kind, match=words) as caught:
        function()
    assert "\n" not in str(caught.value)


def test_data_and_dataloader():
    model, data = mlp(), batches()
    H = mean_loss_hessian(model, data)
    refused("pass exactly one of data and dataloader", lambda: hessian(model, cross_entropy))
    assert_top(hessian(model, cross_entropy, data=data[0]), H)
    assert_top(hessian(model, cross_entropy, dataloader=data), H)


def test_generators():
    model, data = mlp(), batches((6, 6))
    words = r"pass list\(dataloader\) or a DataLoader"
    refused(words, lambda: hessian(model, cross_entropy, dataloader=(b for b in data)))
    H = mean_loss_hessian(model, data)
    assert_top(hessian(model, cross_entropy, dataloader=list(b for b in data)), H)
    pairs = TensorDataset(*(torch.cat(part) for part in zip(*data, strict=True)))
    assert_top(hessian(model, cross_entropy, dataloader=DataLoader(pairs, batch_size=6)), H)


@pytest.mark.parametrize("form", ["tensor", "loader", "list of one batch"])
def test_batches_as_data(form):
    model, data = mlp(), batches()
    loader = DataLoader(TensorDataset(*data[0]), batch_size=4)
    given = {"tensor": data[0][0], "loader": loader, "list of one batch": data}[form]
    words = r"data must be one batch \(inputs, targets\).*pass batches as dataloader"
    refused(words, lambda: hessian(model, cross_entropy, data=given), TypeError)
    taken = {"data": data[0]} if form == "tensor" else {"dataloader": given}
    assert_top(hessian(model, cross_entropy, **taken), mean_loss_hessian(model, data))


def test_a_dataset_as_dataloader():
    model, data = mlp(), batches()
    dataset = TensorDataset(*data[0])
    words = "wrap it in a DataLoader"
    refused(words, lambda: hessian(model, cross_entropy, dataloader=dataset).eigenvalues())
    h = hessian(model, cross_entropy, dataloader=DataLoader(dataset, batch_size=5))
    assert_top(h, mean_loss_hessian(model, data))


def test_no_module_and_nothing_to_train():
    data = batches()
    model = mlp()
    refused(
        r"pass the torch\.nn\.Module", lambda: hessian(model.forward, cross_entropy, data=data[0])
    )
    model.requires_grad_(False)
    refused(
        "set requires_grad on some",
        lambda: hessian(model, cross_entropy, data=data[0]),
    )
    model.requires_grad_(True)
    assert_top(hessian(model, cross_entropy, data=data[0]), mean_loss_hessian(model, data))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize(
    ("given", "advice", "taken"),
    [
        ({}, "pass cuda=False", {"cuda": False}),
        ({"device": "cuda"}, "device='cpu' where device was given", {"device": "cpu"}),
        ({"cuda": False, "device": torch.device("cuda:0")}, "device='cpu'", {"device": "cpu"}),
        ({"device": 0}, "device='cpu'", {"device": torch.device("mps")}),
    ],
)
def test_cuda_on_a_machine_without_cuda(monkeypatch, given, advice, taken):
    monkeypatch.setattr("fasthessian.pyhessian.arguments._warned_no_cuda", False)
    model, data = mlp(), batches()
    with pytest.warns(UserWarning, match=advice):
        assert hessian(model, cross_entropy, data=data[0], **given).device == "cpu"
    monkeypatch.setattr("fasthessian.pyhessian.arguments._warned_no_cuda", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_top(
            hessian(model, cross_entropy, data=data[0], **taken), mean_loss_hessian(model, data)
        )


def test_too_few_iterations():
    h = quadratic([float(x) for x in range(40)])
    with pytest.warns(fh.ConvergenceWarning, match="raise maxIter or tol"):
        h.eigenvalues(maxIter=3, tol=1e-6)
    with pytest.warns(fh.ConvergenceWarning, match="raise maxIter or tol"):
        h.trace(maxIter=5, tol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert h.eigenvalues(maxIter=100, tol=1e-6)[0] == pytest.approx([39.0], rel=1e-4)
        h.trace(maxIter=5, tol=0.99)
        h.trace(maxIter=4000, tol=0.1)


@pytest.mark.parametrize(
    ("words", "wrong", "taken"),
    [
        ("maxIter.*1", {"maxIter": 0}, {"maxIter": 1, "tol": 0}),
        ("top_n.*1", {"top_n": 0}, {"top_n": 1}),
        ("pass a number", {"tol": float("nan")}, {"tol": 1e-3}),
    ],
)
def test_numbers_out_of_range(words, wrong, taken):
    h = quadratic([3.0, 1.0])
    refused(words, lambda: h.eigenvalues(**wrong), ValueError)
    assert len(h.eigenvalues(**taken)[0]) == 1


def test_params_and_gradients_that_do_not_fit():
    model, data = mlp(), batches()
    h = hessian(model, cross_entropy, data=data[0])
    params, grads = h.params, h.gradsH
    h.gradsH = grads[:2]
    refused(r"assign h\.params and h\.gradsH together", h.eigenvalues)
    h.params = params[:2]
    assert_top(h, mean_loss_hessian(model, data, params[:2]))
    h = hessian(model, cross_entropy, data=data[0])
    own = [torch.ones(3, requires_grad=True)]
    h.params = own
    refused("assign gradsH too", h.eigenvalues)
    h.gradsH = torch.autograd.grad(own[0].pow(3).sum(), own, create_graph=True)
    assert h.eigenvalues()[0] == pytest.approx([6.0])


def test_gradients_of_another_point():
    model, data = mlp(), batches()
    h = hessian(model, cross_entropy, data=data[0])
    h.params, h.gradsH = h.params[:1], [h.gradsH[0]]
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    refused("make a new hessian object", h.eigenvalues)
    fresh = hessian(model, cross_entropy, data=data[0])
    fresh.params, fresh.gradsH = fresh.params[:1], [fresh.gradsH[0]]
    assert_top(fresh, mean_loss_hessian(model, data, [model[0].weight]))


def test_products_of_the_wrong_length():
    model, data = mlp(), batches()

    class Short(ByHand):
        whole = False

        def dataloader_hv_product(self, v):
            value, Hv = super().dataloader_hv_product(v)
            return value, Hv if self.whole else Hv[:1]

    h = Short(model, cross_entropy, dataloader=data)
    refused("return one tensor for each parameter", h.eigenvalues)
    h.whole = True
    assert_top(h, mean_loss_hessian(model, data))


def test_groups_of_different_lengths():
    a, b = [torch.ones(2), torch.ones(3)], [torch.ones(2)]
    refused("xs has 2 tensors and ys 1; pass lists of one length", lambda: group_product(a, b))
    assert group_product(a, a) == 5
    refused("params has 1 tensors and update 2; pass lists", lambda: group_add(b, a))
    assert group_add(b, b)[0].tolist() == [2.0, 2.0]
    assert normalization(x for x in a)[0].tolist() == pytest.approx([5**-0.5] * 2)
    h = hessian(mlp(), cross_entropy, data=batches()[0])
    v = [torch.ones_like(p).flatten() for p in h.params]
    refused(
        "pass tensors shaped like the gradients",
        lambda: hessian_vector_product(h.gradsH, h.params, v),
    )
    v = [x.view(g.shape) for x, g in zip(v, h.gradsH, strict=True)]
    assert len(hessian_vector_product(h.gradsH, h.params, v)) == 4


@pytest.mark.parametrize(
    ("words", "wrong", "taken"),
    [
        ("pass one weight per node", ([[1.0]], [[0.5, 0.5]], {}), ([[1.0, 2.0]], [[0.5, 0.5]], {})),
        ("pass finite numbers", ([[float("nan")]], [[1.0]], {}), ([[1.0]], [[1.0]], {})),
        ("pass one list of numbers per run", ([], [], {}), ([[1.0]], [[1.0]], {})),
        ("at least 2", ([[1.0]], [[1.0]], {"num_bins": 1}), ([[1.0]], [[1.0]], {"num_bins": 2})),
        (
            "pass a positive variance",
            ([[1.0]], [[1.0]], {"sigma_squared": 0.0}),
            ([[1.0]], [[1.0]], {"sigma_squared": 1e-5}),
        ),
    ],
)
def test_densities(words, wrong, taken):
    refused(words, lambda: density_generate(*wrong[:2], **wrong[2]), ValueError)
    density, grids = density_generate(*taken[:2], **taken[2])
    assert density.sum() * (grids[1] - grids[0]) == pytest.approx(1.0)


def test_a_graph_that_does_not_fit():
    model, ((x, y),) = mlp(), batches()

    def large(outputs, targets):
        if len(outputs) > 6:
            raise torch.OutOfMemoryError("tried to allocate memory")
        return cross_entropy(outputs, targets)

    words = r"dataloader=list\(zip\(inputs\.split\(16\), targets\.split\(16\)\)\)"
    refused(words, lambda: hessian(model, large, data=(x, y)), MemoryError)
    parts = list(zip(x.split(6), y.split(6), strict=True))
    assert_top(hessian(model, large, dataloader=parts), mean_loss_hessian(model, [(x, y)]))


def test_losses_as_tensors_of_samples():
    model, data = mlp(), batches()
    each = nn.CrossEntropyLoss(reduction="none")
    refused("use reduction='mean'", lambda: hessian(model, each, data=data[0]), ValueError)
    h = hessian(model, nn.CrossEntropyLoss(reduction="mean"), data=data[0])
    assert_top(h, mean_loss_hessian(model, data))


def test_models_that_differentiate_inside_in_training_only():
    model, data = mlp(), batches()

    class Inside(nn.Module):
        """Differentiates inside its forward method, in training only."""

        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                u = self.net(x)
                (slope,) = torch.autograd.grad(u.pow(2).sum(), x, create_graph=self.training)
            return slope[:, :3]

    words = explained("mode")
    h = hessian(Inside(), cross_entropy, dataloader=data)
    refused(words, h.eigenvalues)
    refused(words, lambda: hessian(Inside(), cross_entropy, data=data[0]), ValueError)
    A = fh.Hessian(Inside(), cross_entropy, data, mode="train")
    assert float(fh.eigsh(A).values) != 0
    assert fh.trace(A, rtol=0.9).samples.numel()
    assert fh.density(A, steps=3).nodes.numel()


def explained(option):
    """The end of a message that advises an option of the operators."""
    return rf"{option}=.*\({option} is an option of fasthessian\.Hessian\(model, criterion, data\)"


def test_weights_that_the_loss_does_not_give():
    torch.manual_seed(0)
    model, data = mlp(), batches((8, 4))
    data = [(x, y.float()) for x, y in data]
    data[0][1][:5] = float("nan")  # two means: over the samples and over the known targets

    def loss(outputs, targets):
        known = ~targets.isnan()
        return (outputs[known, 0] - targets[known]).square().mean() + outputs.pow(4).mean()

    refused(explained("weights"), hessian(model, loss, dataloader=data).eigenvalues, ValueError)
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    H = dense(model, lambda call: loss(call(x.double()), y))
    assert_top(hessian(model, loss, data=(x, y)), H)
    A = fh.Hessian(model, loss, data, weights=lambda batch: len(batch[0]))
    parts = [dense(model, lambda call, x=x, y=y: loss(call(x.double()), y)) for x, y in data]
    top = by_magnitude((8 * parts[0] + 4 * parts[1]) / 12)[0]
    assert fh.eigsh(A, tol=1e-6).values.item() == pytest.approx(float(top), rel=1e-4)


class Small(torch.autograd.Function):
    """The identity, whose second derivative takes memory for six samples at most."""

    @staticmethod
    def forward(ctx, x, derivative):
        ctx.derivative = derivative
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if ctx.derivative == 2 and len(g) > 6:
            raise torch.OutOfMemoryError("tried to allocate memory")
        return Small.apply(g, ctx.derivative + 1), None


def test_products_that_do_not_fit():
    model, data = mlp(), batches()

    def large(outputs, targets):
        return cross_entropy(Small.apply(outputs, 1), targets)

    with pytest.raises(MemoryError, match=r"microbatch=1.*is an option of fasthessian\.Hessian"):
        hessian(model, large, data=data[0]).eigenvalues()
    A = fh.Hessian(model, large, data, microbatch=1)
    top = by_magnitude(mean_loss_hessian(model, data))[0]
    assert fh.eigsh(A, tol=1e-6).values.item() == pytest.approx(float(top), rel=1e-4)
