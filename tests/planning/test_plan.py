"""The plan: its choices, its times by hand, what fits, and what it recommends."""

import dataclasses
import itertools

import pytest

from fasthessian.planning.machines import Machine
from fasthessian.planning.plan import Asked, plan
from fasthessian.planning.steps import BASES

MB, GB = 10**6, 10**9
RANK = Machine(memory=10 * GB, host_memory=40 * GB, memory_bandwidth=100 * GB, bandwidth=1 * GB,
               latency=1e-3, host_bandwidth=10 * GB, disk_bandwidth=2 * GB)  # fmt: skip


def asked(n=10 * MB, machine=RANK, **options):
    return Asked(n=n, machine=machine, **{"product_seconds": 0.5, **options})


def one(basis="full", sharded=False, wrap="plain", **options):
    """The only choice with these properties."""
    made = plan(asked(**options), (basis,), (wrap,))
    (found,) = (each for each in made.choices if each.sharded == sharded)
    return found


def test_the_choices():
    made = plan(asked(ranks=4))
    assert len({(c.basis, c.sharded, c.wrap) for c in made.choices}) == 4 * 2 * 3
    alone = plan(asked())
    assert [(c.basis, c.sharded, c.wrap) for c in alone.choices] == [
        (basis, False, "plain") for basis in BASES
    ]
    assert "none" not in {c.basis for c in plan(asked(pairs=1)).choices}
    without = dataclasses.replace(RANK, gpu=False)
    assert "offload" not in {c.basis for c in plan(asked(machine=without)).choices}


def test_a_step_of_replicated_rows_by_hand():
    step = one(ranks=4, steps=101).step
    assert step.product == 0.5 and step.gathers == 0.0
    # 50 rows of 40 MB are read twice, and 7 other vectors once, at 100 GB/s
    assert step.streams == pytest.approx((2 * 50 * 40 * MB + 7 * 40 * MB) / (100 * GB))
    # one all-reduce of 40 MB: 2 x 3/4 of it at 1 GB/s, and 2 ms
    assert step.collectives == pytest.approx(0.062)
    assert step.total == pytest.approx(0.5 + 0.0428 + 0.062)


def test_a_step_of_sharded_rows_by_hand():
    step = one(sharded=True, ranks=4, steps=101, basis="compressed", wrap="regather").step
    width = 2_500_000  # a multiple of 16
    assert step.streams == pytest.approx((2 * 50 * 2 * width + 7 * 4 * width) / (100 * GB))
    # 30 MB are sent by each half, 3 x 8 x 103 bytes for the scalars; three times 2 ms
    assert step.collectives == pytest.approx((60 * MB + 3 * 8 * 103) / GB + 0.006)
    assert step.gathers == pytest.approx(1.75 * (0.030 + 0.002))


def test_offloaded_rows_come_through_the_link():
    step = one(basis="offload", steps=101).step
    assert step.streams == pytest.approx(2 * 50 * 40 * MB / (10 * GB) + 7 * 40 * MB / (100 * GB))


def test_a_run_and_its_checkpoint_by_hand():
    found = one(ranks=4, steps=101, wrap="unshard")
    gather = 0.030 + 0.002
    assert found.run_seconds == pytest.approx(101 * found.step.total + gather)
    assert found.checkpoint_bytes == 103 * 40 * MB
    assert found.checkpoint_seconds == pytest.approx(2.06)
    assert found.wall_seconds == pytest.approx(1.25 * found.run_seconds + 2 * 2.06 + 300)
    refined = one(basis="compressed", pairs=3, steps=101)
    assert refined.run_seconds == pytest.approx(104 * refined.step.total)
    assert refined.checkpoint_bytes == 101 * 20 * MB + 80 * MB


def test_the_average_step_is_the_average_of_all_steps():
    steps = [one(steps=m).run_seconds for m in (1, 2, 3, 4)]
    added = [b - a for a, b in itertools.pairwise(steps)]
    growth = 2 * 40 * MB / (100 * GB)  # one row more to read twice
    assert [b - a for a, b in itertools.pairwise(added)] == pytest.approx([growth] * 2)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("wrap", ["plain", "unshard", "regather"])
def test_the_largest_problem_fits_and_one_more_does_not(basis, wrap):
    for sharded in (False, True):
        options = {"basis": basis, "sharded": sharded, "wrap": wrap, "ranks": 4}
        found = one(**options)
        n, steps = found.largest_params, found.most_steps
        assert one(**options, n=n).fits and not one(**options, n=n + 1).fits
        assert one(**options, steps=steps).fits
        if basis == "none":
            assert steps == 10 * MB  # as many as there are parameters
        else:
            assert not one(**options, steps=steps + 1).fits


def test_the_largest_problem_by_hand():
    found = one(steps=100)  # 3 numbers for the model, 102 for the space, of 4 bytes
    assert found.largest_params == 10 * GB // (105 * 4)
    assert found.most_steps == (10 * GB - 5 * 40 * MB) // (40 * MB)


def test_nothing_fits_into_no_memory():
    for each in plan(asked(ranks=4, machine=dataclasses.replace(RANK, memory=0.0))).choices:
        assert each.fits is False and each.largest_params == 0 and each.most_steps == 0
    made = plan(asked(machine=dataclasses.replace(RANK, memory=0.0)))
    assert made.recommended is None and made.enough_ranks is None


def test_what_is_not_known_is_none():
    (found,) = plan(Asked(n=MB, machine=Machine(), ranks=2), ("full",), ("regather",)).choices[:1]
    assert found.fits is found.largest_params is found.most_steps is None
    assert dataclasses.astuple(found.step) == (None,) * 4 and found.step.total is None
    assert found.run_seconds is found.wall_seconds is found.checkpoint_seconds is None
    assert found.collectives[0].payload == 4 * MB
    without_host = dataclasses.replace(RANK, host_memory=None)
    assert one(basis="offload", machine=without_host).fits is None
    assert one(basis="offload", machine=without_host, n=10 * GB).fits is False


def test_memory_falls_with_the_ranks_where_rows_are_sharded():
    sizes = [one(sharded=True, ranks=P).space_bytes for P in (2, 4, 8, 16)]
    rows = [size - 2 * 40 * MB for size in sizes]  # but for the two vectors of full length
    assert [a / b for a, b in itertools.pairwise(rows)] == pytest.approx([2] * 3, rel=1e-3)


def test_more_steps_and_parameters_take_longer():
    for basis in BASES:
        for sharded in (False, True):
            options = {"basis": basis, "sharded": sharded, "ranks": 4}
            first = one(**options)
            assert one(**options, n=11 * MB).step.total > first.step.total
            assert one(**options, steps=110).run_seconds > first.run_seconds


def recommended(**options):
    found = plan(asked(**options)).recommended
    return None if found is None else (found.basis, found.sharded, found.wrap)


def test_the_first_basis_that_fits_is_recommended_and_its_fastest_choice():
    assert recommended() == ("full", False, "plain")
    assert recommended(ranks=4) == ("full", True, "plain")
    assert recommended(n=40 * MB) == ("compressed", False, "plain")
    assert recommended(n=60 * MB) == ("offload", False, "plain")
    assert recommended(n=200 * MB) == ("none", False, "plain")
    assert recommended(n=200 * MB, pairs=1) is None
    # gathered again, because the parameters are too many otherwise
    assert recommended(n=330 * MB, ranks=64) == ("full", True, "plain")
    assert recommended(n=420 * MB, ranks=64) == ("full", True, "regather")
    # a few numbers: sharding costs two more latencies
    assert recommended(n=1000, ranks=4) == ("full", False, "plain")


def test_without_times_the_choice_that_moves_the_fewest_bytes_is_recommended():
    unknown = Machine(memory=10 * GB)
    assert recommended(machine=unknown, ranks=4) == ("full", True, "plain")


def test_enough_ranks():
    made = plan(asked(n=330 * MB), ("full",))
    assert made.recommended is None
    ranks = made.enough_ranks
    assert plan(asked(n=330 * MB, ranks=ranks), ("full",)).recommended is not None
    assert plan(asked(n=330 * MB, ranks=ranks // 2), ("full",)).recommended is None
    nodes = dataclasses.replace(RANK, ranks_per_node=6)
    assert plan(asked(n=330 * MB, machine=nodes), ("full",)).enough_ranks % 6 == 0
    assert plan(asked(n=10 * GB)).enough_ranks is None  # vectors of full length
    assert plan(asked(ranks=4)).enough_ranks == 4  # fits already


@pytest.mark.parametrize("n", [1, 3, 15])
def test_fewer_parameters_than_ranks_and_steps(n):
    for each in plan(asked(n=n, ranks=64, steps=100)).choices:
        assert each.fits and each.step.total > 0.5
        assert each.run_seconds >= n * each.step.total
        assert each.most_steps == n  # a space of n numbers has n rows
