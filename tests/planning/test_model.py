"""Memory and products of a model on some ranks, by hand, and times of collectives."""

import dataclasses
import math

import pytest

from fasthessian.planning.machines import GB, MACHINES, Machine
from fasthessian.planning.model import WRAPS, Model, seconds_of_flops
from fasthessian.planning.steps import PARAMETERS, Collective


@pytest.mark.parametrize(
    ("wrap", "parameters"), [("plain", 4000), ("unshard", 1000 + 4000), ("regather", 1000 + 400)]
)
def test_parameters_on_a_rank(wrap, parameters):
    model = Model(1000, ranks=4, wrap=wrap, largest=0.1, activations=7)
    assert model.parameters_bytes == parameters
    assert model.device_bytes == parameters + 2 * 4000 + 7  # gradient and product


def test_parameters_of_16_bits_take_half():
    for wrap in WRAPS:
        half, single = (Model(10**6, 8, dtype, wrap) for dtype in ("bfloat16", "float32"))
        assert 2 * half.device_bytes == single.device_bytes


def test_the_gathers_of_a_product():
    machine = Machine(bandwidth=1e9, latency=1e-3)
    # 3 of 4 shards of 4 MB arrive once in 12 ms, after 2 ms
    times = {wrap: Model(4 * 10**6, 4, wrap=wrap).gather_seconds(machine) for wrap in WRAPS}
    assert times == {"plain": 0.0, "unshard": 0.0, "regather": pytest.approx(1.75 * 0.014)}
    starts = {wrap: Model(4 * 10**6, 4, wrap=wrap).start_seconds(machine) for wrap in WRAPS}
    assert starts == {"plain": 0.0, "unshard": pytest.approx(0.014), "regather": 0.0}
    unknown = Model(10**6, 4, wrap="regather")
    assert unknown.gather_seconds(Machine()) is None
    assert Model(10**6, 4, wrap="unshard").start_seconds(Machine()) == 0.0


def test_the_time_of_operations():
    assert seconds_of_flops(7 * 10**9, 2048, 1e15) == pytest.approx(12 * 7e9 * 2048 / 1e15)


@pytest.mark.parametrize(("ranks", "doublings"), [(1, 0), (2, 1), (3, 2), (4, 2), (64, 6), (65, 7)])
def test_the_latency_grows_with_the_logarithm_of_the_ranks(ranks, doublings):
    machine = Machine(bandwidth=math.inf, latency=1e-3)
    found = machine.seconds(Collective("all_reduce", 100), ranks)
    assert found == pytest.approx(doublings * 1e-3)


def test_the_time_of_a_collective_by_hand():
    machine = Machine(bandwidth=2e9, latency=1e-3)
    # 2 x 3/4 x 4 GB at 2 GB/s, and two doublings
    assert machine.seconds(Collective("all_reduce", 4 * 10**9), 4) == pytest.approx(3.002)
    assert machine.seconds(Collective("all_gather", 10**9), 4) == pytest.approx(1.502)
    assert Machine().seconds(Collective("all_gather", 1), 2) is None
    assert Machine().seconds(Collective("all_gather", 1), 1) == 0.0


def test_two_levels_of_a_network():
    machine = Machine(bandwidth=1e9, node_bandwidth=10e9, ranks_per_node=4, latency=1e-9)
    whole = Collective("reduce_scatter", 8 * 10**9)
    # 3/4 of it inside a node at 10 GB/s; half of the quarter that is left between two nodes
    assert machine.seconds(whole, 8) == pytest.approx(0.6 + 1.0)
    assert machine.seconds(whole, 4) == pytest.approx(0.6)  # one node: no network
    alone = dataclasses.replace(machine, bandwidth=None)
    assert alone.seconds(whole, 4) == pytest.approx(0.6) and alone.seconds(whole, 8) is None
    flat = dataclasses.replace(machine, node_bandwidth=None)
    assert flat.seconds(whole, 8) == pytest.approx(7.0)


def test_levels_of_the_same_speed_are_one():
    flat = Machine(bandwidth=3e9)
    levels = dataclasses.replace(flat, node_bandwidth=3e9, ranks_per_node=8)
    for name in ("all_reduce", "reduce_scatter", "all_gather"):
        each = Collective(name, 10**8)
        for ranks in (2, 8, 64):
            assert levels.seconds(each, ranks) == pytest.approx(flat.seconds(each, ranks))


def test_the_machines_of_data_sheets_know_everything_but_host_and_disk():
    for machine in MACHINES.values():
        unknown = {f.name for f in dataclasses.fields(machine) if getattr(machine, f.name) is None}
        assert unknown == {"host_memory", "disk_bandwidth"} and machine.about
        assert set(machine.flops) == set(PARAMETERS)
        assert machine.rate("float32") == pytest.approx(0.4 * machine.flops["float32"])
    assert MACHINES["h200"].memory == 141 * GB and Machine().rate("float32") is None
