"""A product of divided data makes one collective: a step of Lanczos no more than that."""

import pytest

from tests.support.counted import (
    STEPS,
    of_eigsh,
    of_no_group,
    of_products,
    of_steps,
    of_the_profiler,
    own_collectives,
)

pytestmark = pytest.mark.distributed
SIZES = [(1, 1), (6, 4)]  # layers besides the last one, batches on rank 0


def test_the_counter_counts(two):
    assert two(own_collectives) == [[4, 4, 4, 3, 4, 0]] * 2


@pytest.mark.slow
def test_the_profiler_sees_no_other_collective(two):
    for pairs in two(of_the_profiler):
        assert all(counted == seen for counted, seen in pairs), pairs


@pytest.mark.parametrize("kind", ["Hessian", "GaussNewton", "Fisher", "EmpiricalFisher"])
@pytest.mark.parametrize(("depth", "batches"), SIZES)
def test_a_product_makes_one_sum(two, kind, depth, batches):
    for calls in two(of_products, kind, depth, batches):
        for what, (size, made) in calls.items():
            assert sum(numbers >= size for numbers in made) == 1 or what == "loss", (what, made)
            # at most one more, in which the ranks agree at the start of a call by a few numbers
            assert len(made) <= 2 and all(numbers <= 16 for numbers in sorted(made)[:-1]), (
                what,
                made,
            )


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("depth", "batches"), SIZES)
def test_a_step_makes_one_collective(two, name, depth, batches):
    for three, four, nine in two(of_steps, name, depth, batches):
        assert (four - three, nine - four) == (1, 5)
        assert three <= 5  # at the start the ranks compare the call, and count their terms


@pytest.mark.parametrize(("depth", "batches"), SIZES)
def test_eigsh_makes_no_more_collectives_than_products(two, depth, batches):
    for collectives, products in two(of_eigsh, depth, batches):
        assert 0 < collectives <= products + 2


def test_an_operator_without_a_group_makes_none(two):
    assert two(of_no_group) == [[], []]
