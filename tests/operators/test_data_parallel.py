"""Operators whose data are divided over ranks: the matrix of all data, by one sum per product."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fasthessian as fh

pytestmark = pytest.mark.distributed
CLASSES = ("Hessian", "GaussNewton", "Fisher", "EmpiricalFisher")


def mlp():
    """A network, its criterion and six batches of different sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    sizes = (5, 7, 3, 8, 2, 4)
    batches = [(torch.randn(k, 6).double(), torch.randint(3, (k,))) for k in sizes]
    return model, nn.CrossEntropyLoss(), batches


def share(batches, cuts):
    """The batches of this rank: those between its cut and the next."""
    bounds = [0, *cuts, len(batches)]
    rank = dist.get_rank()
    return batches[bounds[rank] : bounds[rank + 1]]


def distances(name, cuts):
    """How far product, gradient, loss and eigenvalues are from those of one process."""
    model, criterion, batches = mlp()
    make = getattr(fh, name)
    A = make(model, criterion, share(batches, cuts), group=dist.group.WORLD, weight_decay=0.1)
    whole = make(model, criterion, batches, weight_decay=0.1)
    v = torch.randn(2, A.n, dtype=A.dtype, generator=torch.Generator().manual_seed(3))
    values = [fh.eigsh(operator, 3).values for operator in (A, whole)]
    return (
        float((A @ v - whole @ v).norm() / (whole @ v).norm()),
        float((A.gradient() - whole.gradient()).norm() / whole.gradient().norm()),
        abs(A.loss() - whole.loss()),
        float((values[0] - values[1]).abs().max()),
    )


@pytest.mark.parametrize("name", CLASSES)
def test_two_ranks_have_the_matrix_of_one_process(two, name):
    for found in two(distances, name, (4,)):
        assert max(found) < 1e-10


@pytest.mark.parametrize("cuts", [(1, 3, 4), (4, 4, 6), (0, 0, 0)])
def test_shares_may_be_uneven_or_empty(four, cuts):
    for name in CLASSES:
        for found in four(distances, name, cuts):
            assert max(found) < 1e-10


def of_sampler(count, size):
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(count, 6).double(), torch.randint(3, (count,)))
    loader = DataLoader(dataset, size, sampler=DistributedSampler(dataset, shuffle=True))
    model = mlp()[0]
    A = fh.Hessian(model, nn.CrossEntropyLoss(), loader, group=dist.group.WORLD)
    whole = fh.Hessian(model, nn.CrossEntropyLoss(), dataset.tensors)
    v = torch.ones(A.n, dtype=A.dtype)
    return float((A @ v - whole @ v).norm() / (whole @ v).norm())


@pytest.mark.parametrize(("count", "size"), [(13, 2), (13, 3), (16, 4), (3, 2), (5, 1)])
def test_padding_of_a_distributed_sampler_counts_once(four, count, size):
    assert max(four(of_sampler, count, size)) < 1e-10
