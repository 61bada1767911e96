"""Operators over 2 and 4 ranks have the matrix of one process with all data."""

import pytest

from tests.support.divided import (
    CASES,
    agree,
    distance,
    on_ranks,
    product_of_dense,
    same_bits,
    whole,
)

pytestmark = pytest.mark.distributed
SLOW = {"forward"}  # each process loads the decompositions of torch.func
DIVISIONS = [
    pytest.param(name, cuts, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, case in CASES.items()
    for cuts in case.cuts
]


@pytest.mark.parametrize(("name", "cuts"), DIVISIONS)
def test_ranks_have_the_numbers_of_one_process(two, four, name, cuts):
    case, ranks = CASES[name], two if len(cuts) == 1 else four
    found = ranks(on_ranks, name, cuts)
    for kind in case.kinds:
        same_bits(*[made[kind] for made in found])
        agree(found[0][kind], whole(name, kind), case.bound)
    if case.dense:
        assert distance(found[0]["Hessian"]["A @ V"], product_of_dense(name)) < case.bound
