"""The drop-in with its data divided over ranks: the numbers of one process with all data."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import fasthessian as fh
from fasthessian.pyhessian import hessian, hessian_vector_product

pytestmark = pytest.mark.distributed


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(22, 5).double(), torch.randint(3, (22,))
    return model, nn.CrossEntropyLoss(), x, y


def mine(x, y):
    """This rank's samples: 15 and 7, the larger part on the first rank."""
    return (x[:15], y[:15]) if dist.get_rank() == 0 else (x[15:], y[15:])


def results(h):
    """Everything that the class computes, as one flat list of numbers."""
    torch.manual_seed(3)
    values, vectors = h.eigenvalues(top_n=2, tol=1e-6)
    first = [t * torch.sign(vectors[0][0].flatten()[0]) for t in vectors[0]]
    nodes, weights = h.density(iter=10, n_v=2)
    quotient, product = h.dataloader_hv_product(first)
    flat = torch.cat([t.flatten() for t in [*first, *product, *h.gradsH]])
    numbers = [*values, *h.trace(maxIter=20, tol=0), quotient]
    return numbers + [x for row in (*nodes, *weights) for x in row] + flat.tolist()


def distance(form):
    model, criterion, x, y = problem()
    share, group = mine(x, y), dist.group.WORLD
    wrapped = nn.parallel.DistributedDataParallel(model) if form == "wrapped" else model
    if form == "batches":
        data = {"dataloader": list(zip(*(t.split(4) for t in share), strict=True))}
    elif form == "empty":
        data = {"data": (x, y)} if dist.get_rank() == 0 else {"dataloader": []}
    else:
        data = {"data": share}
    a = hessian(wrapped, criterion, **data, cuda=False, group=group)
    if form != "batches":  # PyHessian leaves gradients in .grad
        assert all(p.grad is not None for p in model.parameters())
    torch.manual_seed(17 + dist.get_rank())
    torch.rand(dist.get_rank())
    whole = hessian(model, criterion, data=(x, y), cuda=False)
    found, expected = map(torch.tensor, (results(a), results(whole)))
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("form", ["data", "batches", "wrapped", "empty"])
def test_all_ranks_have_the_numbers_of_one_process(two, form):
    assert max(two(distance, form)) < 1e-9


def whole_vectors():
    torch.manual_seed(0)
    model = nn.Linear(400, 330)  # so large that vectors are split over the ranks
    x, y = torch.randn(4, 400), torch.randn(4, 330)
    mine = (x[:2], y[:2]) if dist.get_rank() == 0 else (x[2:], y[2:])
    h = hessian(model, nn.MSELoss(), data=mine, cuda=False, group=dist.group.WORLD)
    values, (vector,) = h.eigenvalues(top_n=1)
    whole = fh.Hessian(model, nn.MSELoss(), (x, y))
    v = whole.flatten(vector)
    assert [t.shape for t in vector] == [p.shape for p in model.parameters()]
    return float((whole @ v - values[0] * v).norm() / values[0])


def test_vectors_that_are_split_over_the_ranks_are_returned_whole(two):
    assert max(two(whole_vectors)) < 2e-3


def seeds():
    torch.manual_seed(dist.get_rank())
    model, criterion, x, y = problem()
    torch.manual_seed(dist.get_rank())
    h = hessian(model, criterion, data=mine(x, y), cuda=False, group=dist.group.WORLD)
    return h.trace(maxIter=3, tol=0)


def test_ranks_with_other_random_states_draw_the_same_vectors(two):
    first, second = two(seeds)
    assert first == second


class Noisy(Dataset):
    """Samples that differ at each access."""

    def __len__(self):
        return 7

    def __getitem__(self, i):
        return torch.randn(5).double(), i % 3


def of_changing_loader(noisy_rank):
    model, criterion, x, y = problem()
    dataset = Noisy()
    if noisy_rank is None:
        loader = DataLoader(dataset, 2, sampler=DistributedSampler(dataset))
    elif dist.get_rank() == noisy_rank:
        loader = DataLoader(dataset, 2)
    else:
        loader = [(x, y)]
    h = hessian(model, criterion, dataloader=loader, cuda=False, group=dist.group.WORLD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = h.eigenvalues()[0]
    if noisy_rank is None:  # 8 samples are dealt out, 7 of which count
        terms = sum(h._held[1]._shares.ranks.rows(torch.tensor([h._held[1]._loss.terms_here])))
        assert float(terms) == 7
    return values, [str(w.message)[:50] for w in caught]


@pytest.mark.parametrize("noisy_rank", [None, 0, 1])
def test_one_pass_of_loaders_that_change_is_kept(two, noisy_rank):
    (first, a), (second, b) = two(of_changing_loader, noisy_rank)
    assert first == second
    warned = [any("yields different batches" in line for line in lines) for lines in (a, b)]
    assert warned == [noisy_rank in (None, rank) for rank in (0, 1)]


def refusals():
    model, criterion, x, y = problem()
    h = hessian(model, criterion, data=mine(x, y), cuda=False, group=dist.group.WORLD)
    v = [torch.ones_like(p) for p in h.params]
    with pytest.raises(ValueError, match=r"use h\.dataloader_hv_product"):
        hessian_vector_product(h.gradsH, h.params, v)
    h.params = h.params[:1]
    assert len(h.eigenvalues()[1][0]) == 1  # as the message advises
    h.gradsH = h.gradsH[:1]
    with pytest.raises(ValueError, match="gradsH must not be assigned with group"):
        h.eigenvalues()
    with pytest.raises(ValueError, match="group must be given for a DistributedDataParallel"):
        hessian(nn.parallel.DistributedDataParallel(model), criterion, data=(x, y), cuda=False)
    wrong = (x, y) if dist.get_rank() else 3
    with pytest.raises((TypeError, RuntimeError), match="data must be one batch"):
        hessian(model, criterion, data=wrong, cuda=False, group=dist.group.WORLD)


def test_what_cannot_be_summed_is_refused_on_all_ranks(two):
    two(refusals)
