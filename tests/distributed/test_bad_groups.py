"""Groups, samplers and models that are refused, and the way out that each message names."""

import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fasthessian as fh
from fasthessian.distributed import Ranks
from tests.support.ranks import pool

pytestmark = pytest.mark.distributed
WORLD = "torch.distributed.group.WORLD"


@pytest.fixture(scope="module")
def two():
    yield from pool(2)


@pytest.fixture
def world():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def build(model=None, data=None, **options):
    torch.manual_seed(0)
    data = data or (torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    return fh.Hessian(model or nn.Linear(4, 3), nn.CrossEntropyLoss(), data, **options)


def product(A):
    return float((A @ torch.ones(A.n)).norm())


def test_a_group_needs_an_initialised_process_group():
    with pytest.raises(ValueError, match=f"no process group is initialised; call .* pass {WORLD}"):
        build(group=object())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert abs(product(build(group=dist.group.WORLD)) - product(build())) < 1e-6
    finally:
        dist.destroy_process_group()


def test_a_run_of_torchrun_without_a_group_is_warned_of(monkeypatch, world):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build()
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.warns(UserWarning, match=f"init_process_group.. first and pass group={WORLD}"):
        build()


def test_a_group_is_a_process_group_or_a_mesh(world):
    with pytest.raises(TypeError, match=f"got str; use group={WORLD}"):
        build(group="WORLD")
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    with pytest.raises(
        ValueError, match=r"got 2 named \('a', 'b'\); pass one of them: mesh\[name\]"
    ):
        build(group=mesh)
    assert product(build(group=mesh["b"])) == product(build(group=world))


def test_limits_of_time_are_positive_numbers(world):
    with pytest.raises(ValueError, match="timeout must be a finite positive number, got 0"):
        Ranks(world, timeout=0)
    assert product(build(group=Ranks(world, start_timeout=10, timeout=5))) > 0


def test_a_group_that_was_destroyed_needs_a_new_operator():
    products = []
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        A = build(group=dist.group.WORLD)
        products.append(product(A))
        dist.destroy_process_group()
        with pytest.raises(RuntimeError, match=r"call init_process_group\(\) and build a new"):
            product(A)
    assert products[0] == products[1]


@pytest.mark.filterwarnings("ignore:FSDP")
@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel")
def test_fsdp1_is_refused(world):
    plain = nn.Linear(4, 3)
    cpu = torch.device("cpu")
    for model, name in (
        (FullyShardedDataParallel(plain, device_id=cpu), "model is a"),
        (nn.Sequential(FullyShardedDataParallel(nn.Linear(4, 3), device_id=cpu)), "module '0' of"),
    ):
        with pytest.raises(
            RuntimeError, match=f"{name}.* twice; divide the model by .*fully_shard"
        ):
            build(model, group=world)


def test_a_stage_of_a_pipeline_is_refused(world):
    whole = nn.Linear(4, 3)
    stage = PipelineStage(whole, 0, 1, torch.device("cpu"))
    for model in (stage, ScheduleGPipe(stage, n_microbatches=1)):
        with pytest.raises(RuntimeError, match=r"pass the torch\.nn\.Module that was split"):
            build(model, group=world)
    assert product(build(whole, group=world)) > 0


def test_sharded_needs_a_group_and_a_single_operator(world):
    with pytest.raises(ValueError, match=f"make the operator with group={WORLD}"):
        fh.eigsh(build(), 1, sharded=True)
    blocks = build(group=world).blocks("layer")
    with pytest.raises(ValueError, match="pass its operators one by one"):
        fh.eigsh(blocks, 1, sharded=True)
    (A,) = blocks.values()
    assert abs(fh.eigsh(A, 1, sharded=True).values - fh.eigsh(build(), 1).values) < 1e-6


def without_group():
    """Both ways out of a DistributedDataParallel without a group."""
    model = DistributedDataParallel(nn.Linear(4, 3))
    try:
        build(model)
    except ValueError as error:
        line = str(error)
    return line, product(build(model, group=dist.group.WORLD)), product(build(model.module))


def test_a_distributed_model_needs_a_group(two):
    for line, whole, own in two(without_group):
        assert line.endswith(f"pass group={WORLD}, or model.module if that is meant")
        assert abs(whole - own) < 1e-6  # both ranks have the same data


def of_sampler():
    dataset = TensorDataset(torch.randn(7, 4), torch.randint(3, (7,)))
    other = DistributedSampler(dataset, num_replicas=4, rank=dist.get_rank())
    lines = []
    for sampler in (other, DistributedSampler(dataset)):
        try:
            build(data=DataLoader(dataset, 2, sampler=sampler), group=dist.group.WORLD)
        except ValueError as error:
            lines.append(str(error))
    return lines


def test_a_sampler_for_another_number_of_ranks_is_refused(two):
    for rank, lines in enumerate(two(of_sampler)):
        assert lines == [
            f"data has a DistributedSampler for rank {rank} of 4, but group makes this rank {rank} "
            f"of 2; pass the group to both"
        ]


class Slow(nn.CrossEntropyLoss):
    """Takes 1.5 s on rank 1 while ``slow`` is set."""

    slow = False

    def forward(self, z, y):
        if Slow.slow and dist.get_rank() == 1:
            time.sleep(1.5)
        return super().forward(z, y)


def busy():
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3), Slow()
    data, lines = (torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])), []
    for timeout in (0.5, 60.0):
        group = Ranks(dist.group.WORLD, timeout=timeout)
        A = fh.Hessian(model, criterion, data, group=group, engine="recompute")
        try:
            product(A)
            Slow.slow = True
            fh.density(A, steps=2, probes=1)
            lines.append("no error")
        except RuntimeError as error:
            lines.append(str(error))
        Slow.slow = False
    return lines


@pytest.mark.slow
def test_a_busy_rank_needs_a_longer_timeout(two):
    expected = (
        "rank 1 did not answer within 0.5 s; if it was busy, set a longer timeout: "
        "group=fasthessian.distributed.Ranks(group, timeout=)"
    )
    assert two(busy) == [[expected, "no error"]] * 2
