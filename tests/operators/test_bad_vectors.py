"""Bad vectors, layouts and callables raise the right exception, with a message of one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fasthessian as fh
from fasthessian.operators.base import multiply
from fasthessian.operators.request import Request
from fasthessian.vectors import Layout
from tests.support.models import refused

X, Y = torch.ones(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
CE = nn.CrossEntropyLoss()


def operators() -> list[fh.SymmetricOperator]:
    return [fh.Hessian(nn.Linear(3, 2), CE, (X, Y)), fh.SymmetricOperator(lambda v: v, 8)]


@pytest.mark.parametrize("A", operators(), ids=["hessian", "callable"])
def test_vectors(A: fh.SymmetricOperator) -> None:
    good = torch.ones(2, 8)
    for v, kind, words in (
        (torch.ones(7), ValueError, r"v must have shape \(8,\) or \(b, 8\), got \(7,\)"),
        (torch.ones(8, 2), ValueError, r"v must have shape .*got \(8, 2\)"),
        (torch.ones(1, 1, 8), ValueError, r"v must have shape .*got \(1, 1, 8\)"),
        (torch.ones(()), ValueError, r"v must have shape"),
        (torch.ones(8).double(), TypeError, r"v must be torch.float32 on cpu, got torch.float64"),
        (torch.ones(8, device="meta"), TypeError, r"on meta; use v.to\(\)"),
        ([1.0] * 8, TypeError, r"v must be a torch.Tensor of shape .*got list"),
        (torch.full((8,), torch.nan), ValueError, "v holds NaN or Inf"),
    ):
        refused(lambda v=v: A @ v, kind, words)
    for V, out, words in (
        (torch.ones(8), good, r"V must have shape \(b, 8\), got \(8,\)"),
        (good, torch.ones(3, 8), r"out must have V's shape \(2, 8\), got \(3, 8\)"),
        (good, torch.ones(2, 16)[:, ::2], r"out must have contiguous rows.*strides \(16, 2\)"),
        (torch.ones(8, 2).T, good, r"V must have contiguous rows"),
    ):
        refused(lambda V=V, out=out: multiply([Request(A, V, out)]), ValueError, words)
    refused(
        lambda: multiply([Request(A, good, good.double())]), TypeError, "out must be torch.float32"
    )
    assert A.matvecs == 0


def test_offsets() -> None:
    A = fh.Hessian(nn.Linear(3, 2), CE, (X, Y))
    refused(lambda: A.loss(torch.ones(9)), ValueError, r"offset must have shape \(8,\)")
    refused(lambda: A.loss(torch.ones(1, 8)), ValueError, r"offset must have shape \(8,\)")
    refused(lambda: A.loss(torch.ones(8).double()), TypeError, "offset must be torch.float32")


def test_flat_layouts() -> None:
    A = fh.Hessian(nn.Linear(3, 2), CE, (X, Y))
    weight, bias = torch.ones(2, 3), torch.ones(2)
    refused(lambda: Layout({}), ValueError, "at least one named tensor")
    refused(lambda: A.unflatten(torch.ones(7)), ValueError, r"v must have shape \(8,\), got \(7,\)")
    refused(lambda: A.flatten([weight]), ValueError, "tensors must be 2 in number, got 1")
    refused(lambda: A.flatten({"weight": weight, "b": bias}), ValueError, r"\['b', 'bias'\]")
    refused(lambda: A.flatten([weight.T, bias]), ValueError, r"'weight' must have shape \(2, 3\)")
    refused(lambda: A.flatten([weight, bias.double()]), TypeError, "'bias' must be torch.float32")


@pytest.mark.parametrize(
    ("matvec", "kind", "words"),
    [
        (lambda v: v[:-1], ValueError, r"matvec must return shape \(4,\), got \(3,\)"),
        (lambda v: v[None], ValueError, r"matvec must return shape \(4,\), got \(1, 4\)"),
        (lambda v: v.double(), TypeError, "matvec must return torch.float32 on cpu, got torch.f"),
        (lambda v: v.to("meta"), TypeError, "matvec must return torch.float32 on cpu.*on meta"),
        (lambda v: v.numpy(), TypeError, "matvec must return a torch.Tensor, got ndarray"),
        (lambda v: None, TypeError, "matvec must return a torch.Tensor, got NoneType"),
        (lambda v: v / 0, ValueError, "matvec returned NaN or Inf"),
        (lambda v: v * torch.nan, ValueError, "matvec returned NaN or Inf"),
        (lambda v: v.mul_(2.0), ValueError, "matvec wrote into its argument"),
        (lambda v: v.roll(1), ValueError, "matvec is not symmetric: u'Av = "),
        (lambda v: torch.triu(torch.ones(4, 4)) @ v, ValueError, "matvec is not symmetric"),
    ],
)
def test_matvecs(matvec: Any, kind: type[Exception], words: str) -> None:
    A = fh.SymmetricOperator(matvec, 4)
    for _ in range(2):  # the second product must fail too
        refused(lambda: A @ torch.tensor([1.0, 2.0, 3.0, 4.0]), kind, words)
    assert A.matvecs == 0


def test_a_matvec_that_fails_later_or_without_the_check() -> None:
    A = fh.SymmetricOperator(lambda v: v * 1e30, 2)
    big = torch.full((2,), 1e30)
    refused(lambda: A @ big, ValueError, "SymmetricOperator.n=2.* returned NaN or Inf")
    B = fh.SymmetricOperator(lambda v: v / 0, 2, check=False)
    refused(lambda: B @ torch.ones(2), ValueError, "returned NaN or Inf")


def test_operator_arguments() -> None:
    for n in (0, -1, 2.0, "3", True):
        refused(lambda n=n: fh.SymmetricOperator(F.relu, n), ValueError, "n must be a positive int")
    for dtype in (torch.float16, torch.int64, torch.complex64):
        refused(
            lambda d=dtype: fh.SymmetricOperator(F.relu, 2, dtype=d), TypeError, "dtype must be"
        )
    refused(lambda: fh.SymmetricOperator(3, 2), TypeError, "matvec must be callable, got int")
