"""What the messages of operators advise is done, and succeeds.

One case per piece of advice: words of the message, the error, what makes it, and what follows the
advice, in as many ways as it names. See test_advice.py for the list of all advice.
"""

import itertools
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fasthessian as fh
from fasthessian.study.resnet import resnet
from tests.support.advised import (
    CE,
    HALVES,
    THREE,
    TOKENS,
    VECTOR,
    Augmented,
    Call,
    Force,
    H,
    Hugging,
    Loss,
    Named,
    Noisy,
    Once,
    Pair,
    Scripted,
    Twice,
    X,
    Y,
    detached,
    embedded,
    from_closure,
    frozen,
    logits_squared,
    mixed,
    net,
    penalised,
    per_positive,
    scripted,
    summands,
    turned,
)

CASES = {
    # operators.base
    "return a new tensor instead": (ValueError, lambda: fh.SymmetricOperator(
        lambda v: v.mul_(2), 3) @ torch.ones(3), lambda: THREE @ torch.ones(3)),
    "pass a symmetric one, or check=False": (ValueError,
        lambda: fh.SymmetricOperator(lambda v: v * 2 + v.roll(1), 3) @ torch.ones(3),
        lambda: fh.SymmetricOperator(lambda v: v * 2 + v.roll(1) + v.roll(-1), 3) @ torch.ones(3),
        lambda: fh.SymmetricOperator(lambda v: v * 2 + v.roll(1), 3, check=False) @ torch.ones(3)),
    ".to()": (TypeError, lambda: THREE @ torch.ones(3).double(),
        lambda: THREE @ torch.ones(3).double().to(THREE.dtype)),
    " must have contiguous rows, got strides ": (ValueError,
        lambda: THREE.apply(torch.ones(3, 2).T, torch.ones(2, 3)),
        lambda: THREE.apply(torch.ones(3, 2).T.contiguous(), torch.ones(2, 3))),
    "the tensor for ": (TypeError, lambda: H().flatten([p.double() for p in net().parameters()]),
        lambda: H().flatten([p.double().to(torch.float32) for p in net().parameters()])),
    # operators.batches
    "data is an empty list; pass ": (ValueError, lambda: H(data=[]), H),
    "pass list(data)": ((TypeError, ValueError), lambda: H(data=iter(HALVES)),
        lambda: H(data=list(iter(HALVES))),
        lambda: H(data=DataLoader(TensorDataset(X, Y), batch_size=4))),
    "wrap it in a DataLoader": ((TypeError, ValueError), lambda: H(data=TensorDataset(X, Y)),
        lambda: H(data=DataLoader(TensorDataset(X, Y), batch_size=4))),
    "use a loader without randomness, or fix one pass: data=list(loader)": (
        RuntimeError, lambda: H(data=Augmented()) @ VECTOR[:20].float(),
        lambda: H(data=list(Augmented())), lambda: H(data=HALVES)),
    # operators.blocks
    "give block names and regular expressions": (ValueError, lambda: H().blocks({}),
        lambda: H().blocks({"all": "."})),
    "make one of them narrower": (ValueError, lambda: H().blocks({"a": "0", "b": "weight"}),
        lambda: H().blocks({"a": "0", "b": "3.weight|2.weight"})),
    # operators.calls, operators.sources
    "as lambda model, batch: loss(model(batch[0]), batch[1])": (Exception,
        lambda: H(Named(), CE, (X, Y)),
        lambda: H(Named(), lambda model, batch: CE(model(batch[0]).scores, batch[1]), (X, Y))),
    "without a loss; return the scalar alone": (Exception,
        lambda: H(criterion=lambda model, batch: {"a": CE(model(batch[0]), batch[1])}),
        lambda: H(criterion=lambda model, batch: CE(model(batch[0]), batch[1]))),
    "which has no end; pass a list of batches": (Exception,
        lambda: H(data=itertools.cycle(HALVES)),
        lambda: H(data=list(itertools.islice(itertools.cycle(HALVES), 2)))),
    "or an output with .logits for ": (Exception,
        lambda: H(Pair(), lambda z, y: CE(z[0], y), (X, Y), kind=fh.GaussNewton),
        lambda: H(Pair(), lambda z, y: CE(z[0], y), (X, Y))),
    # operators.counting, operators.passes
    "pass all data as one batch; or check the parameters": (ValueError,
        lambda: H(criterion=per_positive, data=[(X[:4], Y[:4]), (X[4:], Y[4:] * 0)]),
        lambda: H(criterion=per_positive, data=(X, Y)),
        lambda: H(criterion=per_positive, data=HALVES)),
    "check the parameters, the inputs and the targets": (ValueError,
        lambda: H(data=(X / 0, Y)), H),
    "or weights=lambda batch: <its share>": (ValueError,
        lambda: H(criterion=summands, data=[(X[:6], Y[:6]), (X[6:], Y[6:])]),
        lambda: H(criterion=summands), lambda: H(criterion=summands, weights=lambda batch: 1.0,
            data=[(X[:6], Y[:6]), (X[6:], Y[6:])])),
    "the criterion couples the samples of a batch; use microbatch=None": (ValueError,
        lambda: H(net(Call(lambda x: x - x.mean(0))), microbatch=3),
        lambda: H(net(Call(lambda x: x - x.mean(0))), microbatch=None)),
    # operators.criteria
    "pass a criterion, or labels in data": ((TypeError, ValueError),
        lambda: H(criterion=None, model=Hugging(), data={"x": X}),
        lambda: H(criterion=logits_squared, model=Hugging(), data={"x": X}),
        lambda: H(criterion=None, model=Hugging(), data={"x": X, "labels": Y})),
    "the sum of its entries": ((TypeError, ValueError),
        lambda: H(criterion=lambda z, y: {"a": F.cross_entropy(z, y), "b": z.square().mean()}),
        lambda: H(criterion=lambda z, y: F.cross_entropy(z, y) + z.square().mean())),
    "use reduction='mean' or 'sum'": ((TypeError, ValueError),
        lambda: H(criterion=nn.CrossEntropyLoss(reduction="none")),
        lambda: H(criterion=nn.CrossEntropyLoss(reduction="mean")),
        lambda: H(criterion=nn.CrossEntropyLoss(reduction="sum"))),
    # operators.curvature, operators.engines
    "right if that is meant, else let autograd record": (UserWarning,
        lambda: H(criterion=detached), lambda: H(criterion=lambda z, y: F.cross_entropy(z * z, y))),
    "differentiates inside in training only (mode='train')": (ValueError,
        lambda: H(Force(energy=False), nn.MSELoss(), (X, X)),
        lambda: H(Force(energy=False), nn.MSELoss(), (X, X), mode="train")),
    "use mode='train', else let it create_graph": (RuntimeError,
        lambda: H(Force(), nn.MSELoss(), (X, X)),
        lambda: H(Force(), nn.MSELoss(), (X, X), mode="train")),
    "or use engine='difference', which needs first derivatives only": (RuntimeError,
        lambda: H(net(Call(Once.apply))), lambda: H(net(Call(Once.apply)), engine="difference"),
        lambda: H(net(Call(Twice.apply)))),
    "use engine='retained' or 'recompute'": (RuntimeError,
        lambda: H(net(Call(Twice.apply)), engine="forward"),
        lambda: H(net(Call(Twice.apply)), engine="retained"),
        lambda: H(net(Call(Twice.apply)), engine="recompute")),
    "or use engine='difference' with Hessian": (RuntimeError,
        lambda: H(net(Call(Noisy.apply)).double(), data=(X.double(), Y)),
        lambda: H(net(Call(Noisy.apply)).double(), data=(X.double(), Y), engine="difference")),
    # operators.fisher, operators.gaussnewton, operators.outer
    "put the batch first": (ValueError,
        lambda: H(nn.Sequential(net(), Call(torch.t)), turned, kind=fh.EmpiricalFisher),
        lambda: H(net(), lambda z, y: turned(z.T, y), kind=fh.EmpiricalFisher)),
    "GaussNewton is not positive semidefinite; use Hessian": (ValueError,
        lambda: H(criterion=lambda z, y: -z.square().mean(), kind=fh.GaussNewton),
        lambda: H(criterion=lambda z, y: -z.square().mean())),
    "needs a criterion of one output alone, use Hessian": (ValueError,
        lambda: penalised(fh.GaussNewton), lambda: penalised(fh.Hessian)),
    "for a model that returns its loss alone use Hessian": ((TypeError, ValueError),
        lambda: H(Loss(), None, {"x": X, "y": Y}, kind=fh.GaussNewton),
        lambda: H(Loss(), None, {"x": X, "y": Y})),
    # operators.losses, operators.padding
    "use mode='eval', or batches that fit": (ValueError,
        lambda: H(net(nn.BatchNorm1d(3)), mode="train", microbatch=4),
        lambda: H(net(nn.BatchNorm1d(3)), mode="eval", microbatch=4),
        lambda: H(net(nn.BatchNorm1d(3)), mode="train", data=HALVES)),
    "set its max_norm to None": (ValueError, lambda: H(embedded(max_norm=0.1), data=TOKENS),
        lambda: H(embedded(max_norm=None), data=TOKENS)),
    "set its sparse to False": (ValueError, lambda: H(embedded(sparse=True), data=TOKENS),
        lambda: H(embedded(sparse=False), data=TOKENS)),
    "convert one of them": (TypeError, lambda: H(data=(X.double(), Y)),
        lambda: H(data=(X.double().float(), Y)), lambda: H(net().double(), data=(X.double(), Y))),
    # operators.parameters
    "pass the torch.nn.Module it came from": (TypeError,
        lambda: H(scripted()), lambda: H(Scripted())),
    "; use params=[...]": (TypeError,
        lambda: H(params="0.weight"), lambda: H(params=["0.weight"])),
    "pass None for all parameters": (ValueError, lambda: H(params=[]), lambda: H(params=None)),
    "; use [tensor]": (TypeError,
        lambda: from_closure(lambda w: w), lambda: from_closure(lambda w: [w])),
    "pass the tensors that the loss depends on": (ValueError,
        lambda: from_closure(lambda w: []), lambda: from_closure(lambda w: [w])),
    "complex64 and complex128; use ": ((TypeError, ValueError),
        lambda: from_closure(lambda w: [torch.ones(2, dtype=torch.float8_e5m2)]),
        lambda: from_closure(lambda w: [w])),
    "parameters mix dtypes": ((TypeError, ValueError), lambda: H(mixed()),
        lambda: H(mixed().float()), lambda: H(mixed().double(), data=(X.double(), Y))),
    "move them to one": ((TypeError, ValueError),
        lambda: H(net().append(nn.Linear(2, 2, device="meta"))),
        lambda: H(net().append(nn.Linear(2, 2, device="cpu")))),
    "use requires_grad_() or leave it out of params": (ValueError,
        lambda: H(frozen(), params=["0.bias", "0.weight"]),
        lambda: H(frozen().requires_grad_(), params=["0.bias", "0.weight"]),
        lambda: H(frozen(), params=["0.weight"])),
    "is computed from other tensors; pass those": (ValueError,
        lambda: from_closure(lambda w: [w * 2]), lambda: from_closure(lambda w: [w])),
    "for other losses use Hessian.from_closure(closure, params)": (TypeError,
        lambda: H(lambda x: x), lambda: from_closure(lambda w: [w])),
    "is not 6 m + 2; use 8, 14, 20": (ValueError, lambda: resnet(9), lambda: resnet(8)),
}  # fmt: skip


@pytest.mark.parametrize("words", CASES)
def test_the_advice_works(words):
    kind, wrong, *right = CASES[words]
    warned = isinstance(kind, type) and issubclass(kind, Warning)
    with (pytest.warns if warned else pytest.raises)(kind, match=re.escape(words)):
        wrong()
    for follow in right:
        follow()
