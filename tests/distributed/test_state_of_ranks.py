"""Models, gradients, modes, buffers and random states of every rank are as before a call."""

import pytest

from tests.support.divided_state import (
    BROKEN,
    broken,
    broken_at_the_start,
    nothing_valid,
    untouched,
)

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("mode", "engine"), [("eval", "retained"), ("train", "recompute"), ("eval", "difference")]
)
def test_calls_leave_every_rank_as_it_was(two, mode, engine):
    two(untouched, mode, engine, None)


def test_calls_leave_a_rank_without_data_as_it_was(two):
    two(untouched, "eval", "auto", 1)


@pytest.mark.parametrize("name", BROKEN)
def test_an_exception_on_one_rank_ends_the_call_on_all(two, name):
    said = two(broken, name, 1, None)
    assert "from inside the model" in said[0] and "rank 1" in said[0]
    assert "from inside the model" in said[1]


def test_ranks_without_data_hear_of_an_exception_too(four):
    said = four(broken, "eigsh", 0, 2)
    assert all("from inside the model" in line for line in said)
    assert all("rank 0" in line for line in said[1:])


@pytest.mark.parametrize("failing", [0, 1])
def test_data_that_do_not_fit_on_one_rank_are_refused_on_all(two, failing):
    said = two(broken_at_the_start, failing)
    assert f"rank {failing}" in said[1 - failing]
    assert all("out of bounds" in line and "\n" not in line for line in said)


def test_data_without_any_valid_target_are_refused_on_all(two):
    said = two(nothing_valid)
    assert said[0] == said[1] and "no term" in said[0]
