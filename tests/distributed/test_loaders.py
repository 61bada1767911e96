"""Data loaders, wrapped models and closures on ranks, against all of their data in one process."""

import pytest

from tests.support.divided import BOUND, agree, same_bits
from tests.support.divided_loaders import (
    KINDS,
    closures,
    of_samples,
    own_loader,
    sampled,
    wrapped,
    wrapped_without_group,
)

pytestmark = pytest.mark.distributed


def compared(ranks, count, size, how, kinds=("Hessian",)):
    """All ranks have the same bits, and the numbers of one process with every sample once."""
    found = ranks(sampled, count, size, how, kinds)
    union = sorted({index for indices, _ in found for index in indices})
    for k, kind in enumerate(kinds):
        same_bits(*[made[k] for _, made in found])
        agree(found[0][1][k], of_samples(count, how, union, kind), BOUND)


@pytest.mark.parametrize("how", ["shuffled", "epoch", "sequential", "batch sampler", "ragged"])
@pytest.mark.parametrize(("count", "size"), [(13, 3), (3, 2)])
def test_padding_counts_once(four, how, count, size):
    compared(four, count, size, how, KINDS if how == "shuffled" else ("Hessian",))


@pytest.mark.parametrize("how", ["dropping sampler", "dropping loader", "microbatch", "weights"])
def test_what_a_sampler_or_loader_drops_does_not_count(four, how):
    compared(four, 13, 3, how)


def test_two_ranks_may_pad(two):
    compared(two, 9, 2, "shuffled")


@pytest.mark.parametrize("size", [1, 2, 7])
def test_every_rank_may_have_a_loader_of_its_own(four, size):
    assert max(four(own_loader, size)) < BOUND


def test_a_wrapped_model_with_a_group_is_its_module(four):
    for distances in four(wrapped):
        assert max(distances) < BOUND


def test_a_wrapped_model_without_a_group_is_refused(two):
    for message in two(wrapped_without_group):
        assert "group" in message and "\n" not in message and message != "accepted"


@pytest.mark.parametrize(
    ("terms", "weight_decay"),
    [((1.0, 1.0, 1.0, 1.0), 0.0), ((3.0, 0.5, 2.0, 10.0), 0.2), ((1.0, 0.1, 4.0, 2.0), 0.0)],
)
def test_closures_count_by_their_terms(four, terms, weight_decay):
    for distances in four(closures, terms, weight_decay):
        assert max(distances) < BOUND
