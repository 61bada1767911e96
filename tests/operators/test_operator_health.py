"""Self-checks of an operator; after an out-of-memory error it works and holds no memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasthessian as fh
from tests.support.models import CURVATURES, PROBLEMS, each_curvature, refused
from tests.support.out_of_memory import Hungry

F32, F64 = torch.float32, torch.float64


class WrongReduction:
    """Has an attribute ``reduction`` that is not the reduction that it computes."""

    def __init__(self, says: str, makes: str) -> None:
        self.reduction, self.makes = says, makes

    def __call__(self, out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, reduction=self.makes)


class WrongTwice(torch.autograd.Function):
    """x^3 with a right first derivative and a wrong second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * 3 * x.detach() ** 2  # autograd treats this as constant in x


class Cubed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(WrongTwice.apply(self.first(x)))


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_good_problems_pass_their_check(name: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]
    made = problem.make(dtype)
    A = problem.operator(*made)
    A.check()
    assert A.matvecs == 0
    operators = [A] if problem.closure else [c(*made) for c in CURVATURES]
    if not problem.closure:
        operators += [fh.Hessian(*made, engine=e) for e in ("recompute", "difference")]
    for B in operators:
        check = B.check()
        assert check.ok is True, (type(B), B.engine, str(check))
        assert all(isinstance(getattr(check, field), float) for field in
                   ("symmetry", "repetition", "gradient", "difference", "weights"))  # fmt: skip
        lines = str(check).splitlines()
        assert len(lines) == 5, lines
        assert [line.split()[0] for line in lines] == [
            "symmetry", "repetition", "gradient", "difference", "weights",
        ]  # fmt: skip
        assert B.matvecs == 0


def test_kinks_are_distinguished_from_wrong_derivatives() -> None:
    torch.manual_seed(0)
    relu = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(30, 30), nn.ReLU())))
    x, y = torch.randn(200, 30), torch.randn(200, 30)
    check = fh.Hessian(relu, nn.MSELoss(), (x, y), weight_decay=1e-3).check()
    assert check.ok and check.difference > 0.05 and check.forward < 1e-5, str(check)
    assert "kinks: forward mode agrees" in str(check)
    wrong = nn.Sequential(*relu, nn.Linear(30, 5), Cubed())
    check = fh.Hessian(wrong, nn.MSELoss(), (x, torch.randn(200, 3))).check()
    assert not check.ok and not check.forward < 1e-3, str(check)


def test_a_detached_part_of_the_loss_is_not_reported_as_a_kink() -> None:
    model, _, (x, y) = PROBLEMS["mlp"].make()

    def focal(z: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(z, y, reduction="none")
        return ((1 - torch.exp(-losses)).detach() * losses).mean()

    with pytest.warns(UserWarning, match="gradient differs by .* from the derivative of criterion"):
        A = fh.Hessian(model, focal, (x, y))
    check = A.check()
    assert not check.ok and "detaches a part of itself" in str(check)
    assert check.gradient > 0.05 and check.difference > 0.05


def test_a_model_in_bfloat16_passes_its_check() -> None:
    for name in ("mlp", "transformer"):
        made = PROBLEMS[name].make(torch.bfloat16)
        for curvature in CURVATURES:
            check = curvature(*made).check()
            assert check.ok is True, (name, curvature, str(check))


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_a_wrong_problem_fails_its_check(dtype: torch.dtype) -> None:
    model, _, (x, y) = PROBLEMS["mlp"].make(dtype)
    for says, makes in (("mean", "sum"), ("sum", "mean")):
        for data in ((x, y), [(x[:3], y[:3]), (x[3:], y[3:])]):
            # the attribute is not used: the terms of the loss are counted
            H, honest = (
                fh.Hessian(model, WrongReduction(word, makes), data) for word in (says, makes)
            )
            v = torch.ones(H.n, dtype=dtype)
            assert torch.equal(H @ v, honest @ v) and H.check().ok and honest.check().ok
        coupled = fh.Hessian(model, lambda z, y: F.cross_entropy(z, y).sqrt(), (x, y)).check()
        assert coupled.ok is False and coupled.weights > 1e-3, str(coupled)
    with pytest.warns(UserWarning, match="detaches a part of itself"):
        A = fh.Hessian(model, lambda z, y: (z * z.detach().exp()).mean(), (x, y))
    wrong = A.check()
    assert wrong.ok is False and wrong.difference > 0.1
    torch.manual_seed(0)  # central differences replace its second derivative
    assert fh.Hessian(Cubed().to(dtype), nn.CrossEntropyLoss(), (x, y)).check().ok


# Memory


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("engine", ["recompute", "difference"])
@each_curvature
def test_out_of_memory_names_an_option_and_keeps_no_memory(
    curvature: Any, engine: str, when: str
) -> None:
    inner, criterion, data = PROBLEMS["mlp"].make()
    model = Hungry(inner)
    A = curvature(model, criterion, data, engine=engine)
    v = torch.linspace(-1, 1, A.n, dtype=F64)
    before = A @ v
    gc.collect()
    gc.disable()
    try:
        model.seen.clear()
        model.when = when
        refused(lambda: A @ v, MemoryError, "microbatch|engine|memory_budget|precision")
        assert model.seen and not any(ref() is not None for ref in model.seen)
    finally:
        gc.enable()
    model.when = "never"
    assert torch.equal(A @ v, before)


def test_out_of_memory_with_kept_graphs() -> None:
    inner, criterion, data = PROBLEMS["mlp"].make()
    model = Hungry(inner)
    A = fh.Hessian(model, criterion, data, engine="retained")
    v = torch.linspace(-1, 1, A.n, dtype=F64)
    before = A @ v
    with torch.no_grad():  # so that graphs are rebuilt, which fails
        inner[0].bias.add_(0.0)
    model.when = "forward"
    refused(lambda: A @ v, MemoryError, "microbatch|engine|memory_budget|precision")
    model.when = "never"
    assert torch.equal(A @ v, before)


PROGRAM = """
import ctypes, torch, fasthessian as fh
from torch import nn

def resident():
    ctypes.CDLL(None).malloc_trim(0)  # return the free memory of the allocator
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

torch.manual_seed(0)
x, y = torch.randn(512, 16), torch.randint(10, (512,))
model = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 10))
for i in range(58):
    curvature = (fh.Hessian, fh.GaussNewton, fh.EmpiricalFisher, fh.Fisher)[i % 4]
    engine = ("retained", "recompute")[i // 4 % 2]
    A = curvature(model, nn.CrossEntropyLoss(), (x, y), engine=engine)
    A @ torch.ones(A.n)
    for B in A.blocks("layer").values():
        B @ torch.ones(B.n)
    del A, B
    if i == 7:
        first = resident()
print(resident() - first)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads VmRSS from /proc")
def test_deleted_operators_hold_no_memory() -> None:
    """An activation has half a MiB. Fifty operators that each kept one would hold 25 MiB."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-300:]
    assert float(run.stdout) < 8
