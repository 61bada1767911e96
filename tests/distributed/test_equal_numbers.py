"""Operators over 2 and 4 ranks have the matrix of one process with all data."""

import pytest

from tests.support.divided import BOUND, CASES, agree, distance, on_ranks, product_of_dense
from tests.support.divided import same_bits, whole

pytestmark = pytest.mark.distributed


def compared(ranks, name):
    """For each division of the data: all ranks have the same bits, and those of ``whole``."""
    case = CASES[name]
    for cuts in case.cuts[ranks.size]:
        found = ranks(on_ranks, name, cuts)
        for kind in case.kinds:
            same_bits(*[made[kind] for made in found])
            agree(found[0][kind], whole(name, kind), case.bound)
        if case.dense:
            bound = max(case.bound, BOUND)
            assert distance(found[0]["Hessian"]["A @ V"], product_of_dense(name)) < bound


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_numbers_of_one_process(two, name):
    compared(two, name)


@pytest.mark.parametrize("name", CASES)
def test_four_ranks_have_the_numbers_of_one_process(four, name):
    compared(four, name)
