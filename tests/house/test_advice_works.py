"""The advice in messages works when it is followed: the rows of two tables, and memory.

See test_advice.py for the list of all advice.
"""

import re
import warnings

import pytest
import torch

import fasthessian as fh
from tests.support.advice_of_operators import CASES as OPERATORS
from tests.support.advice_of_results import CASES as RESULTS


@pytest.mark.parametrize("words", OPERATORS)
def test_the_advice_of_operators_works(words):
    kind, wrong, *right = OPERATORS[words]
    warned = isinstance(kind, type) and issubclass(kind, Warning)
    with (pytest.warns if warned else pytest.raises)(kind, match=re.escape(words)):
        wrong()
    for follow in right:
        follow()


@pytest.mark.parametrize("words", RESULTS)
def test_the_advice_of_algorithms_kernels_and_records_works(tmp_path, words):
    kind, wrong, *right = RESULTS[words]
    warned = issubclass(kind, Warning)
    with (pytest.warns if warned else pytest.raises)(kind, match=re.escape(words)):
        wrong(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for follow in right:
            follow(tmp_path)


def test_a_basis_that_does_not_fit(monkeypatch):
    n, room = 100_000, [10**9]
    for module in ("fasthessian.krylov.basis", "fasthessian.algorithms.density"):
        monkeypatch.setattr(f"{module}.available_bytes", lambda device: room[0])
    d = torch.linspace(1, 2, n)
    A = fh.SymmetricOperator(lambda v: d * v, n)
    room[0] = 6 * 10**6
    with pytest.raises(MemoryError) as info:
        fh.density(A, steps=20)
    assert "basis='compressed' needs " in str(info.value)
    rows = int(re.search(r"(\d+) rows would fit \(fewer steps or pairs", str(info.value)).group(1))
    fh.density(A, steps=rows)
    fh.density(A, steps=20, basis="compressed")
    room[0] = 2 * 10**6
    with pytest.raises(MemoryError, match="or basis='none' needs "):
        fh.density(A, steps=20)
    fh.density(A, steps=20, basis="none")
    room[0] = 10**6
    with pytest.raises(MemoryError, match="use a machine with more memory"):
        fh.density(A, steps=20)
    room[0] = 10**9
    fh.density(A, steps=20)
