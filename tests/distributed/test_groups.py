"""Sub-groups, several groups and operators, meshes, and a group of one rank."""

import pytest

from tests.support.divided import BOUND
from tests.support.divided_loaders import (
    alone_in_a_group,
    meshes,
    of_a_half,
    outside,
    own_operators_beside,
    two_groups,
)

pytestmark = pytest.mark.distributed


def test_a_sub_group_leaves_the_other_ranks_out(four):
    found = four(of_a_half, 7, 2)
    assert found[1] is None and found[3] is None
    assert max(found[0], found[2]) < BOUND


def test_a_rank_outside_of_the_group_is_told_so(four):
    found = four(outside)
    for message in (found[1], found[3]):
        assert "group" in message and "\n" not in message and message != "accepted"


def test_two_groups_work_at_once(four):
    found = four(two_groups)
    assert max(made["far"] for made in found) < BOUND
    bits = [made["values"].tobytes() for made in found]
    assert bits[0] == bits[1] != bits[2] == bits[3]


@pytest.mark.parametrize("cuts", [(1, 2, 3), (0, 2, 2)])
def test_operators_take_turns_on_one_group(four, cuts):
    for distances in four(own_operators_beside, cuts):
        assert max(distances) < BOUND


def test_a_group_of_one_rank_has_the_bits_of_no_group(two):
    assert two(alone_in_a_group) == [True, True]


def test_a_mesh_of_one_dimension_is_a_group(four):
    for distances in four(meshes):
        assert max(distances) < BOUND
