"""Bad input to operators raises the right exception, with a line that names the argument."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasthessian as fh
from tests.support.models import refused

X, Y = torch.ones(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
CE = nn.CrossEntropyLoss()


def net(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(**options)


def on_data(data: Any, criterion: Any = CE, **options: Any) -> Callable[[], Any]:
    return lambda: fh.Hessian(net(), criterion, data, **options)


def with_loss(loss: Callable[..., Any]) -> Callable[[], Any]:
    return on_data((X, Y), loss)


def on_model(model: Any, **options: Any) -> Callable[[], Any]:
    return lambda: fh.Hessian(model, CE, (X, Y), **options)


def mixed() -> nn.Module:
    model = net()
    model[2].double()
    return model


def on_two_devices() -> nn.Module:
    model = net()
    model[2].to("meta")
    return model


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return net()


def of_complex() -> nn.Module:
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))
    return model


class Restarting:
    """Iterable, but all passes share one generator, which is exhausted after the first pass."""

    def __init__(self) -> None:
        self.rest = iter([(X, Y)])

    def __iter__(self) -> Any:
        return iter(list(self.rest))


class WithoutLoss(nn.Linear):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(x)}


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


parameter = nn.Parameter(torch.ones(2))
counter = itertools.count()
DATA = {
    "generator": (on_data(b for b in [(X, Y)]), TypeError, r"data is a generator.*list\(data\)"),
    "iterator": (on_data(iter([(X, Y)])), TypeError, r"data is a list_iterator.*list\(data\)"),
    "iterator of a loader": (on_data(iter(DataLoader(TensorDataset(X, Y)))), TypeError, "once"),
    "dataset": (on_data(TensorDataset(X, Y)), TypeError, "data is a dataset.*DataLoader"),
    "empty list": (on_data([]), ValueError, "data is an empty list"),
    "empty loader": (on_data(DataLoader([])), ValueError, "data is empty"),
    "exhausted": (lambda: fh.Hessian(net(), CE, Restarting()), RuntimeError, "each pass"),
    "tensor": (on_data(X), TypeError, "data must be a batch.*got Tensor"),
    "string": (on_data("cifar"), TypeError, "data must be .*got str"),
    "number": (on_data(3), TypeError, "data must be .*got int"),
    "none": (on_data(None), TypeError, "data must be .*got NoneType"),
    "list of tensors in a list": (on_data([X, Y], None), TypeError, "data does not fit"),
    "one entry": (on_data((X,)), TypeError, r"batch of 1 entries.*\(inputs, targets\)"),
    "empty tuple": (on_data(()), TypeError, "data holds a batch of 0 entries"),
    "empty mapping": (on_data({}), TypeError, "data holds an empty mapping"),
    "loader of tensors": (on_data(DataLoader([1.0, 2.0])), TypeError, "batch of type Tensor"),
    "second batch": (on_data([(X, Y), X]), TypeError, "data holds a batch of type Tensor"),
    "too many inputs": (on_data((X, X, Y)), TypeError, "data does not fit the model and criterion"),
    "wrong keyword": (on_data({"q": X}), TypeError, "data does not fit.*'q'"),
    "wrong dtype": (on_data((X.double(), Y)), TypeError, "data holds torch.float64 but.*float32"),
    "all ignored": (on_data((X, Y * 0 - 100)), ValueError, "every target is ignored"),
    "not finite": (on_data((X / 0, Y)), ValueError, r"the loss is nan \(batch 0 of data\)"),
    "no loss": (lambda: fh.Hessian(WithoutLoss(3, 2), None, {"x": X}), ValueError,
                "criterion is None, but the model returned dict without a loss"),
    "outputs as loss": (on_data({"input": X}, None), ValueError, "must return a scalar loss"),
}  # fmt: skip
LOSS = {
    "per sample": (with_loss(nn.CrossEntropyLoss(reduction="none")), ValueError,
                   r"scalar loss, got shape \(6,\); use reduction='mean'"),
    "a number": (with_loss(lambda out, y: 1.0), TypeError, "criterion must return a tensor, got"),
    "integers": (with_loss(lambda out, y: y.sum()), TypeError, "floating-point loss, got"),
    "infinite": (with_loss(lambda out, y: out.sum() / 0.0), ValueError, "the loss is "),
    "constant": (with_loss(lambda out, y: torch.ones(())), ValueError, "does not depend on any"),
    "detached": (with_loss(lambda out, y: out.detach().sum()), ValueError, "does not depend"),
    "of others": (with_loss(lambda out, y: parameter.sum()), ValueError, "does not depend"),
    "never the same": (with_loss(lambda out, y: out.square().mean() * (1 + next(counter))),
                       RuntimeError, "criterion returned .* and then"),
    "criterion": (on_data((X, Y), "cross_entropy"), TypeError, "criterion must be callable"),
}  # fmt: skip
MODEL = {
    "frozen": (on_model(net().requires_grad_(False)), ValueError, "model has no trainable param"),
    "without parameters": (on_model(nn.Identity()), ValueError, "model has no trainable param"),
    "function": (on_model(lambda x: x), TypeError, "model must be a torch.nn.Module.*from_closure"),
    "half": (on_model(net(dtype=torch.float16)), TypeError, "data holds torch.float32 but the par"),
    "complex": (on_model(of_complex()), ValueError, "data does not fit .* Float and ComplexFloat"),
    "mixed": (lambda: on_model(mixed())(), ValueError, "mix dtypes: '0.weight' is torch.float32"),
    "devices": (lambda: on_model(on_two_devices())(), ValueError, "on several devices"),
    "lazy": (lambda: on_model(nn.LazyLinear(2))(), ValueError, "'weight' has no shape yet"),
    "inference": (lambda: on_model(made_in_inference_mode())(), TypeError, "inference_mode"),
    "params empty": (on_model(net(), params=[]), ValueError, "params is empty"),
    "params name": (on_model(net(), params=["3.weight"]), ValueError, "'3.weight', which is not"),
    "params foreign": (on_model(net(), params=[parameter]), ValueError, "a Parameter, which is"),
    "params pairs": (lambda: on_model(m := net(), params=m.named_parameters())(), ValueError,
                     "a tuple, which is not"),
    "params string": (on_model(net(), params="0.weight"), TypeError, "got str; use params="),
    "params tensor": (on_model(net(), params=parameter), TypeError, "params must be None, or an"),
    "params number": (on_model(net(), params=3), TypeError, "params must be None, or an iterable"),
    "params twice": (on_model(net(), params=["0.bias", "0.bias"]), ValueError, "'0.bias' twice"),
    "params frozen": (lambda: on_model(net().requires_grad_(False), params=["0.bias"])(),
                      ValueError, "'0.bias' does not require gradients"),
}  # fmt: skip
OPTION = {
    "engine": (on_model(net(), engine="fast"), ValueError, "engine must be one of auto, r"),
    "precision": (on_model(net(), precision="fp8"), ValueError, "precision must be None, 'bf16'"),
    "tf32": (on_model(net(), precision="tf32"), ValueError, "None or 'bf16' on cpu, got 'tf32'"),
    "microbatch": (on_model(net(), microbatch=0), ValueError, "microbatch must be None or a posi"),
    "decay": (on_model(net(), weight_decay=-1.0), ValueError, "weight_decay must be a finite"),
    "group": (on_model(net(), group=0), ValueError, "group must be None, got 0"),
    "mode": (on_model(net(), mode="test"), ValueError, "mode must be 'eval' or 'train'"),
    "budget": (on_model(net(), memory_budget=-1), ValueError, "memory_budget must be .*got -1"),
    "budget text": (on_model(net(), memory_budget="1G"), ValueError, "memory_budget must .*'1G'"),
    "weights text": (on_model(net(), weights="mean"), TypeError, "weights must be 'auto'.*'mean'"),
    "weights number": (on_model(net(), weights=2), TypeError, "weights must be .auto., a"),
    "weights mapping": (on_model(net(), weights={0: 5}), TypeError, "weights must be .auto., a"),
    "weights set": (on_model(net(), weights={5}), TypeError, "weights must be .auto., a"),
    "weights length": (on_model(net(), weights=[1, 2]), ValueError, "one entry per batch"),
    "weights sign": (on_model(net(), weights=[-1]), ValueError, "weights must be finite"),
    "weights nan": (on_model(net(), weights=lambda b: float("nan")), ValueError, "must be finite"),
    "weights zero": (on_model(net(), weights=[0]), ValueError, "no term of the loss"),
}  # fmt: skip


def closed(closure: Any, params: Any, **options: Any) -> Callable[[], Any]:
    return lambda: fh.Hessian.from_closure(closure, params, **options)


w = torch.ones(2, requires_grad=True)
CLOSURE = {
    "not callable": (closed(w, [w]), TypeError, "closure must be callable, got Tensor"),
    "bare tensor": (closed(w.sum, w), TypeError, r"params must be an iterable.*use \[tensor\]"),
    "no params": (closed(w.sum, []), ValueError, "params is empty"),
    "not tensors": (closed(w.sum, [1.0]), TypeError, r"params\['0'\] must be a tensor, got float"),
    "twice": (closed(w.sum, {"a": w, "b": w}), ValueError, "params holds the same tensor twice"),
    "integer": (closed(w.sum, [torch.ones(2, dtype=torch.int64)]), TypeError, "'0' is torch.int64"),
    "frozen": (closed(w.sum, [torch.ones(2)]), ValueError, "'0' does not require gradients"),
    "not a leaf": (closed(w.sum, [w * 2]), ValueError, "'0' is computed from other tensors"),
    "vector": (closed(lambda: w, [w]), ValueError, r"closure must return a scalar.*\(2,\)"),
    "no tensor": (closed(lambda: 1.0, [w]), TypeError, "closure must return a tensor, got float"),
    "infinite": (closed(lambda: (w / 0).sum(), [w]), ValueError, "the loss is inf"),
    "of others": (closed(parameter.sum, [w]), ValueError, "does not depend on any"),
    "engine": (closed(w.sum, [w], engine=None), ValueError, "engine must be one of"),
    "never the same": (closed(lambda: w.sum() * (1 + next(counter)), [w]), RuntimeError,
                       "closure returned .* and then"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data(name: str) -> None:
    refused(*DATA[name])


@pytest.mark.parametrize("name", LOSS)
def test_loss(name: str) -> None:
    refused(*LOSS[name])


@pytest.mark.parametrize("name", MODEL)
def test_model_and_params(name: str) -> None:
    refused(*MODEL[name])


@pytest.mark.parametrize("name", OPTION)
def test_options(name: str) -> None:
    refused(*OPTION[name])


@pytest.mark.parametrize("name", CLOSURE)
def test_closures(name: str) -> None:
    refused(*CLOSURE[name])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripted_modules() -> None:
    scripted = nn.Sequential(torch.jit.script(Scripted()), nn.Linear(3, 2))
    refused(on_model(scripted), TypeError, "model is or holds a ScriptModule")
