"""64 ranks, as threads of one process: the data of an MLP divided over them, some empty."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fasthessian as fh
from tests.support.divided import BOUND, agree, network, same_bits
from tests.support.thread_ranks import on_threads

pytestmark = pytest.mark.distributed
RANKS = 64


def answers(A):
    v = torch.linspace(-1, 1, 2 * A.n, dtype=A.dtype).reshape(2, -1)
    return {
        "products": (A @ v).numpy(),
        "gradient": A.gradient().numpy(),
        "values": fh.eigsh(A, 3, "LA", tol=1e-10).values.numpy(),
        "trace": torch.tensor(fh.trace(A, method="hutchinson", rtol=0.4).value).numpy(),
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
