"""Calls that crash PyHessian, C1..C9: the drop-in gives a result or a one-line error."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import Tensor, nn

from fasthessian.pyhessian import hessian, hessian_vector_product
from tests.support.pyhessian_cases import (
    ByHand,
    Marked,
    MarkedModel,
    Partly,
    assert_top,
    batches,
    cross_entropy,
    dense,
    mean_loss_hessian,
    mean_output,
    mlp,
    quick_trace,
)

# torch warns scripts that call backward(create_graph=True), as `ByHand` does
pytestmark = pytest.mark.filterwarnings("ignore:Using backward")


@pytest.mark.parametrize("mode", ["data", "dataloader"])
def test_C1_unused_and_C2_linear_parameters_give_zero_rows(mode: str):
    torch.manual_seed(0)
    model, data = Partly(), batches()
    H = dense(model, lambda call: call(data[0][0].double()).mean())
    given = data[0] if mode == "data" else data
    h = hessian(model, mean_output, cuda=False, **{mode: given})
    assert_top(h, H)
    _, vectors = h.eigenvalues()
    assert [v.shape for v in vectors[0]] == [p.shape for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    product = dict(
        zip(names, h.dataloader_hv_product([*map(torch.ones_like, h.params)])[1], strict=True)
    )
    assert not any(product[n].any() for n in ("shift", "unused.weight", "unused.bias"))


@pytest.mark.parametrize("name", ["shift", "used.weight"])
def test_C2_a_layer_alone(name: str):
    torch.manual_seed(0)
    model, (data,) = Partly(), batches()
    p = dict(model.named_parameters())[name]
    h = hessian(model, mean_output, data=data, cuda=False)
    i = [id(q) for q in h.params].index(id(p))
    H = dense(model, lambda call: call(data[0].double()).mean(), [p])
    h.params, h.gradsH = [h.params[i]], [h.gradsH[i]]
    assert_top(h, H)
    v = [torch.ones_like(p)]
    (hv,) = hessian_vector_product(h.gradsH, h.params, v)
    torch.testing.assert_close(hv.flatten(), H.sum(1).float())


class WithLoss(nn.Module):
    """Hugging Face style: called with keywords; the output contains the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        class Output(dict):
            __getattr__ = dict.__getitem__

        return Output(loss=nn.functional.cross_entropy(self.net(x), labels))


@pytest.mark.parametrize("mode", ["data", "dataloader"])
def test_C3_mapping_batch(mode: str):
    model, data = WithLoss(), batches()
    mapping = {"x": data[0][0], "labels": data[0][1]}
    h = hessian(model, None, cuda=False, **{mode: mapping if mode == "data" else [mapping]})
    H = mean_loss_hessian(model.net, data)
    assert_top(h, H)
    hv = hessian_vector_product(h.gradsH, h.params, [*map(torch.ones_like, h.params)])
    if mode == "data":
        torch.testing.assert_close(
            torch.cat([x.flatten() for x in hv]), H.sum(1).float(), rtol=1e-4, atol=1e-5
        )


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(x + y)


@pytest.mark.parametrize("form", ["nested", "flat"])
@pytest.mark.parametrize("mode", ["data", "dataloader"])
def test_C4_tuple_of_inputs(mode: str, form: str):
    model, ((x, y),) = TwoInputs(), batches()
    batch = ((x, 0 * x), y) if form == "nested" else (x, 0 * x, y)
    h = hessian(model, cross_entropy, cuda=False, **{mode: batch if mode == "data" else [batch]})
    assert_top(h, mean_loss_hessian(model.net, [(x, y)]))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(-1, 2, 2, 12).transpose(1, 2).chunk(3, dim=-1)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(y.transpose(1, 2).reshape(-1, 4, 4).mean(1))


@pytest.mark.parametrize("mode", ["data", "dataloader", "override"])
def test_C5_attention_runs_with_second_derivatives(mode: str):
    torch.manual_seed(0)
    model = Attention()
    x, y = torch.randn(6, 4, 4), torch.randint(3, (6,))
    H = dense(model, lambda call: nn.functional.cross_entropy(call(x.double()), y))
    made = {
        "data": lambda: hessian(model, cross_entropy, data=(x, y), cuda=False),
        "dataloader": lambda: hessian(model, cross_entropy, dataloader=[(x, y)], cuda=False),
        "override": lambda: ByHand(model, cross_entropy, dataloader=[(x, y)], cuda=False),
    }[mode]()
    assert_top(made, H)
    assert all(g.requires_grad for g in made.gradsH) == (mode == "data")


@pytest.mark.parametrize("mode", ["data", "dataloader"])
def test_C6_per_sample_loss_is_refused_in_one_line(mode: str):
    data = batches()
    with pytest.raises(ValueError, match="scalar") as caught:
        hessian(
            mlp(),
            nn.CrossEntropyLoss(reduction="none"),
            cuda=False,
            **{mode: data[0] if mode == "data" else data},
        ).eigenvalues()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["data", "dataloader", "override"])
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_C7_called_inside_no_grad(mode: str, around):
    model, data = mlp(), batches()
    H = mean_loss_hessian(model, data)
    kind = ByHand if mode == "override" else hessian
    with around():
        given = {"data": data[0]} if mode == "data" else {"dataloader": data}
        h = kind(model, cross_entropy, cuda=False, **given)
        assert_top(h, H)
        h.gradsH = [g.clone() for g in h.gradsH] if mode != "data" else h.gradsH
        assert len(h.density(iter=5)[0][0]) == 5
        assert len(quick_trace(h)) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_C8_default_cuda_without_cuda_warns_once(monkeypatch):
    monkeypatch.setattr("fasthessian.pyhessian.arguments._warned_no_cuda", False)
    model, (data,) = mlp(), batches()
    with pytest.warns(UserWarning, match="cuda") as caught:
        h = hessian(model, cross_entropy, data=data)
    assert len(caught) == 1
    assert h.device == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hessian(model, cross_entropy, data=data, cuda="cuda:0").eigenvalues()


@pytest.mark.parametrize("mode", ["data", "dataloader", "layer"])
def test_C9_no_graph_outlives_its_object(mode: str):
    model, data = MarkedModel(), batches()
    Marked.tokens.clear()
    gc.collect()
    gc.disable()
    try:
        given = {"dataloader": data} if mode == "dataloader" else {"data": data[0]}
        h = hessian(model, cross_entropy, cuda=False, **given)
        if mode == "layer":
            h.params, h.gradsH = h.params[:1], [2 * h.gradsH[0]]
        h.eigenvalues(tol=0.1)
        quick_trace(h)
        h.density(iter=3)
        del h
        assert Marked.tokens
        assert not any(token() for token in Marked.tokens)
    finally:
        gc.enable()
