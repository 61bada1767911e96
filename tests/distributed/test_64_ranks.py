"""64 ranks, as threads of one process: the data of an MLP divided over them, some empty."""

import collections
import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fasthessian as fh
from fasthessian.distributed import ranks as module
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.sharding import sharded_operator
from fasthessian.planning.steps import KrylovSize
from tests.support.divided import BOUND, agree, network, same_bits
from tests.support.thread_ranks import on_threads

pytestmark = pytest.mark.distributed
RANKS = 64


def answers(A):
    v = torch.linspace(-1, 1, 2 * A.n, dtype=A.dtype).reshape(2, -1)
    total = fh.trace(A, method="hutchinson", rtol=0.4, sampling="whole")
    return {
        "products": (A @ v).numpy(),
        "gradient": A.gradient().numpy(),
        "values": fh.eigsh(A, 3, "LA", tol=1e-10).values.numpy(),
        "trace": torch.tensor(total.value).numpy(),
    }


def test_threads_are_ranks():
    def total():
        x = torch.full((3,), float(dist.get_rank()))
        dist.all_reduce(x)
        return x.tolist()

    assert on_threads(RANKS, total) == [[2016.0] * 3] * RANKS


@pytest.mark.slow
def test_64_ranks_have_the_numbers_of_one_process():
    make, criterion = fh.Hessian, nn.CrossEntropyLoss()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = network()
        sizes = [rank % 5 for rank in range(RANKS)]  # 13 ranks have no data
        x, y = torch.randn(sum(sizes), 6).double(), torch.randint(3, (sum(sizes),))
    # threads share the random state of the process: they make no models
    models = [copy.deepcopy(model) for _ in sizes]
    shares = [
        [part] if len(part[0]) else [] for part in zip(x.split(sizes), y.split(sizes), strict=True)
    ]

    def mine():
        rank = dist.get_rank()
        return answers(make(models[rank], criterion, shares[rank], group=dist.group.WORLD))

    found = on_threads(RANKS, mine)
    same_bits(*found)
    agree(found[0], answers(make(model, criterion, (x, y))), BOUND)


def shared_problem():
    """A model per rank and 64 samples, of which each rank has one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(6, 150), nn.Tanh(), nn.Linear(150, 3)).double()
        data = torch.randn(RANKS, 6).double(), torch.randint(3, (RANKS,))
    return [copy.deepcopy(model) for _ in range(RANKS)], data


@pytest.mark.slow
def test_64_ranks_make_the_planned_collectives_and_hold_a_64th_of_the_basis(monkeypatch):
    models, (x, y) = shared_problem()
    calls = collections.defaultdict(list)  # by rank: name and bytes

    def counting(name, original, position):
        def call(*args, **options):
            calls[dist.get_rank()].append((name, args[position].nbytes))
            return original(*args, **options)

        return call

    monkeypatch.setattr(module, "_gather", counting("all_gather", module._gather, 1))
    monkeypatch.setattr(module, "_scatter", counting("reduce_scatter", module._scatter, 1))
    monkeypatch.setattr(dist, "all_reduce", counting("all_reduce", dist.all_reduce, 0))

    def mine():
        rank = dist.get_rank()
        data = x[rank : rank + 1], y[rank : rank + 1]
        A = fh.Hessian(models[rank], nn.CrossEntropyLoss(), data, group=dist.group.WORLD)
        found = []
        for sharded in (False, True):
            run = Lanczos(sharded_operator(A, sharded), 6, seed=0)
            with A._kept.run():
                run.step()
                run.step()
                made = len(calls[rank])
                run.step()
            found.append((calls[rank][made:], run.state.basis.stored.shape[1]))
        return A.n, found

    for n, found in on_threads(RANKS, mine):
        for (made, width), sharded in zip(found, (False, True), strict=True):
            planned = KrylovSize(n, RANKS, 6, 0, "float64", "full", sharded)
            assert made == list(planned.collectives(2))
            assert width == planned.width
        assert found[1][1] <= n / RANKS + 16
