"""The algorithms give the records of one process, the same bits on all ranks and at each call."""

import pytest

from tests.support.divided import BOUND, agree, same_bits
from tests.support.divided_results import (
    CHECKED,
    RESULTS,
    checked,
    eigenvalues,
    losses,
    of_one_process,
    result,
)

pytestmark = pytest.mark.distributed
CUTS = {2: (0,), 4: (1, 3, 3)}  # rank 0 or rank 2 has no data
EXACT = {"residuals"}  # of converged pairs: rounding, without digits to compare


def compared(ranks, name):
    found = ranks(result, name, CUTS[ranks.size])
    same_bits(*found)
    wanted = of_one_process(name)
    assert found[0].keys() == wanted.keys()
    numbers = {key: x for key, x in wanted.items() if key.split(".")[-1] not in EXACT}
    vectors = {key: numbers.pop(key) for key in list(numbers) if key.endswith("vectors")}
    agree(found[0], numbers, BOUND)
    agree(found[0], vectors, 1e-8)  # residuals of 1e-11 over the gaps of the eigenvalues


@pytest.mark.parametrize("name", RESULTS)
def test_two_ranks_have_the_results_of_one_process(two, name):
    compared(two, name)


@pytest.mark.parametrize(
    "name", ["eigsh LM", "density", "spectrum", "trace of blocks", "trace per batch"]
)
def test_four_ranks_have_the_results_of_one_process(four, name):
    compared(four, name)


def test_eigenvalues_of_every_matrix_are_those_of_one_process(four):
    found = four(eigenvalues, CUTS[4])
    same_bits(*found)
    agree(found[0], eigenvalues(), BOUND)


def test_losses_have_the_same_bits_in_every_block(four):
    found = four(losses, CUTS[4])
    same_bits(*found)
    assert found[0]["block"].tolist() == found[0]["single"].tolist()
    alone = losses()
    assert found[0]["directions"].tolist() == alone["directions"].tolist()
    agree(found[0], alone, BOUND)


@pytest.mark.parametrize("cuts", [(1, 3, 3), (0, 0, 5)])
def test_the_check_passes_on_every_rank_with_the_same_numbers(four, cuts):
    found = four(checked, cuts)
    alone = checked()
    for made in found:
        for kind, rows in alone.items():
            assert made[kind]["ok"] and rows["ok"], made[kind]["report"]
            for row in CHECKED:
                assert repr(made[kind][row]) == repr(found[0][kind][row])
                # a row that does not apply holds nan for one process as for many
                assert (made[kind][row] == made[kind][row]) == (rows[row] == rows[row])
