"""Loaders, wrappers and closures on divided data; each function returns what must be equal."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

import fasthessian as fh
from tests.support.divided import UNDRAWN, answers, distance, network, share
from tests.support.models import Transformer

KINDS = (*UNDRAWN,)  # the Fisher matrix draws targets in the order of the samples


def labelled(count: int) -> TensorDataset:
    """Of which every other sample is a copy of the one before: copies are samples as well."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 6, generator=generator).double()
    y = torch.randint(3, (count,), generator=generator)
    x[1::2], y[1::2] = x[: count // 2 * 2 : 2].clone(), y[: count // 2 * 2 : 2].clone()
    return TensorDataset(x, y)


def ragged(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(7, (count, 5), generator=generator)
    valid = torch.arange(5) < torch.randint(1, 6, (count, 1), generator=generator)
    return TensorDataset(tokens, tokens.flip(1).where(valid, -100))


def problem(language: bool = False) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Transformer().double() if language else network()


def far(A: Any, whole: Any) -> float:
    """The largest relative difference of the answers."""
    found, wanted = answers(A), answers(whole)
    return max(distance(found[key], wanted[key]) for key in wanted)


def sampled(count: int, size: int, how: str, kinds: tuple[str, ...]) -> Any:
    """The samples that a DataLoader with a DistributedSampler has on this rank; its answers."""
    dataset = (ragged if how == "ragged" else labelled)(count)
    sampler = DistributedSampler(
        dataset, shuffle=how != "sequential", seed=4, drop_last=how == "dropping sampler"
    )
    if how == "epoch":
        sampler.set_epoch(3)
    if how == "batch sampler":
        loader = DataLoader(dataset, batch_sampler=BatchSampler(sampler, size, drop_last=False))
    else:
        loader = DataLoader(dataset, size, sampler=sampler, drop_last=how == "dropping loader")
    indices = list(sampler)
    if how == "dropping loader":
        indices = indices[: len(indices) // size * size]
    options = {"microbatch": 2} if how == "microbatch" else {}
    if how == "weights":
        options = {"weights": lambda batch: len(batch[1])}
    made = []
    for kind in kinds:
        model, criterion = problem(how == "ragged"), nn.CrossEntropyLoss()
        A = getattr(fh, kind)(model, criterion, loader, group=dist.group.WORLD, **options)
        made.append(answers(A))
    return indices, made


def of_samples(count: int, how: str, indices: list[int], kind: str) -> dict[str, Any]:
    """The answers of one process with these samples of the same data."""
    dataset = (ragged if how == "ragged" else labelled)(count)
    data = tuple(column[indices] for column in dataset.tensors)
    return answers(getattr(fh, kind)(problem(how == "ragged"), nn.CrossEntropyLoss(), data))


def own_loader(size: int) -> float:
    """Each rank has a DataLoader of its own over its part, without a DistributedSampler."""
    dataset, rank, ranks = labelled(13), dist.get_rank(), dist.get_world_size()
    part = Subset(dataset, range(rank * rank, 13 if rank == ranks - 1 else (rank + 1) ** 2))
    loader = DataLoader(part, size, sampler=SequentialSampler(part))
    model = problem()
    A = fh.Hessian(model, nn.CrossEntropyLoss(), loader, group=dist.group.WORLD)
    return far(A, fh.Hessian(model, nn.CrossEntropyLoss(), dataset.tensors))


def of_a_half(count: int, size: int) -> float | None:
    """A sampler for the ranks of a sub-group; the others are out and make no calls."""
    group = dist.new_group([0, 2])
    if dist.get_rank() not in (0, 2):
        return None
    dataset = labelled(count)
    rank = dist.get_rank(group)
    loader = DataLoader(dataset, size, sampler=DistributedSampler(dataset, 2, rank, seed=1))
    model = problem()
    A = fh.Hessian(model, nn.CrossEntropyLoss(), loader, group=group)
    return far(A, fh.Hessian(model, nn.CrossEntropyLoss(), dataset.tensors))


def wrapped() -> list[float]:
    """A model in DistributedDataParallel with a group; afterwards it trains on as before."""
    tensors, cuts = labelled(13).tensors, (3, 3, 7)
    bounds = (0, *cuts, 13)
    rank = dist.get_rank()
    mine = tuple(t[bounds[rank] : bounds[rank + 1]] for t in tensors)
    model = DistributedDataParallel(problem())
    distances = []
    for kind in KINDS:
        data = [mine] if len(mine[0]) else []
        A = getattr(fh, kind)(model, nn.CrossEntropyLoss(), data, group=dist.group.WORLD)
        distances.append(far(A, getattr(fh, kind)(problem(), nn.CrossEntropyLoss(), tensors)))
    # DDP averages the gradients of its ranks, as for a model that was never analysed
    for p in model.parameters():
        assert p.grad is None
    x, y = (t[rank : rank + 2] for t in tensors)
    F.cross_entropy(model(x), y).backward()
    other = problem()
    for start in range(dist.get_world_size()):
        x, y = (t[start : start + 2] for t in tensors)
        (F.cross_entropy(other(x), y) / dist.get_world_size()).backward()
    for p, q in zip(model.module.parameters(), other.parameters(), strict=True):
        distances.append(distance(p.grad.numpy(), q.grad.numpy()))
    return distances


def wrapped_without_group() -> str:
    model = DistributedDataParallel(problem())
    try:
        fh.Hessian(model, nn.CrossEntropyLoss(), labelled(5).tensors)
    except fh.InputError as refusal:
        return str(refusal)
    return "accepted"


def closures(terms: tuple[float, ...], weight_decay: float) -> list[float]:
    """Each rank's closure is its own loss; the whole is their mean, weighted by terms."""
    model, (x, y) = problem(), labelled(12).tensors
    params = dict(model.named_parameters())
    rank = dist.get_rank()
    parts = [(x[start : start + 3], y[start : start + 3]) for start in range(0, 12, 3)]

    def loss(rank: int) -> torch.Tensor:
        return F.cross_entropy(model(parts[rank][0]), parts[rank][1])

    def whole() -> torch.Tensor:
        losses = [n * loss(r) for r, n in enumerate(terms)]
        return torch.stack(losses).sum() / sum(terms)

    distances = []
    for engine in ("retained", "recompute"):
        options = {"engine": engine, "weight_decay": weight_decay}
        A = fh.Hessian.from_closure(
            lambda: loss(rank), params, group=dist.group.WORLD, terms=terms[rank], **options
        )
        B = fh.Hessian.from_closure(whole, params, **options)
        distances.append(far(A, B))
        values = [fh.eigsh(operator, 2, tol=1e-10).values.numpy() for operator in (A, B)]
        distances.append(distance(*values))
    return distances


def own_operators_beside(cuts: tuple[int, ...]) -> list[float]:
    """An operator with the group, one without and one of the rank's own data, in turn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        batches = [(torch.randn(k, 6).double(), torch.randint(3, (k,))) for k in (4, 2, 6, 3)]
    model, other, criterion = problem(), problem(), nn.CrossEntropyLoss()
    with torch.no_grad():
        other[0].weight.mul_(2)
    mine = share(batches, cuts, dist.get_rank())
    own = [batches[dist.get_rank()]]
    A = fh.Hessian(model, criterion, mine, group=dist.group.WORLD)
    B = fh.GaussNewton(other, criterion, mine, group=dist.group.WORLD)
    C = fh.Hessian(model, criterion, own)
    wholes = fh.Hessian(model, criterion, batches), fh.GaussNewton(other, criterion, batches)
    v = torch.linspace(-1, 1, A.n, dtype=A.dtype)
    found, wanted = [], []
    for _ in range(2):
        found += [A @ v, B @ v]
        if dist.get_rank() == 1:
            found.append(C @ v)  # only one rank makes this call
            wanted_own = fh.Hessian(model, criterion, [batches[1]]) @ v
            assert torch.equal(found.pop(), wanted_own)
        wanted += [wholes[0] @ v, wholes[1] @ v]
    return [distance(x.numpy(), y.numpy()) for x, y in zip(found, wanted, strict=True)]


def two_groups() -> dict[str, Any]:
    """Ranks 0, 1 and ranks 2, 3 analyse different models of different sizes at the same time."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half, position = divmod(dist.get_rank(), 2)
    dataset = labelled(9 + half).tensors
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(half)
        model = nn.Sequential(nn.Linear(6, 4 + half), nn.Tanh(), nn.Linear(4 + half, 3)).double()
    mine = [tuple(t[4:] if position else t[:4] for t in dataset)]
    A = fh.Hessian(model, nn.CrossEntropyLoss(), mine, group=groups[half])
    whole = fh.Hessian(model, nn.CrossEntropyLoss(), dataset)
    values = [fh.eigsh(operator, 2, tol=1e-10).values.numpy() for operator in (A, whole)]
    return {"far": max(far(A, whole), distance(*values)), "values": values[0]}


def alone_in_a_group() -> bool:
    """A group of one rank gives the bits of no group."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    group, (x, y) = groups[dist.get_rank()], labelled(13).tensors
    data = [(x[:4], y[:4]), (x[4:10], y[4:10]), (x[10:], y[10:])]
    for kind in ("Hessian", "GaussNewton", "Fisher", "EmpiricalFisher"):
        made = []
        for options in ({"group": group}, {}):
            A = getattr(fh, kind)(problem(), nn.CrossEntropyLoss(), data, **options)
            pairs, blocks = fh.eigsh(A, 2), fh.trace(A.blocks("layer"), rtol=0.4)
            extra = [pairs.values, pairs.vectors, fh.density(A, steps=7).nodes]
            extra += [torch.tensor([estimate.value for estimate in blocks.values()])]
            made.append([*answers(A).values(), *(x.numpy() for x in extra)])
        if any(x.tobytes() != y.tobytes() for x, y in zip(*made, strict=True)):
            return False
    return True


def meshes() -> list[float]:
    """A DeviceMesh of one dimension, and one dimension of a mesh of two."""
    dataset, model = labelled(13).tensors, problem()
    flat = dist.init_device_mesh("cpu", (4,))
    grid = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("probe", "data"))
    whole = fh.Hessian(model, nn.CrossEntropyLoss(), dataset)
    distances = []
    for mesh, index in ((flat, dist.get_rank()), (grid["data"], dist.get_rank() % 2)):
        mine = [
            tuple(t[3 * index : 13 if index == mesh.size() - 1 else 3 * index + 3] for t in dataset)
        ]
        A = fh.Hessian(model, nn.CrossEntropyLoss(), mine, group=mesh)
        distances.append(far(A, whole))
    return distances


def outside() -> str:
    """What a rank outside of a group hears if it passes the group nevertheless."""
    members = dist.new_group([0, 2])
    if dist.get_rank() in (0, 2):
        return ""
    try:
        fh.Hessian(problem(), nn.CrossEntropyLoss(), labelled(5).tensors, group=members)
    except fh.InputError as refusal:
        return str(refusal)
    return "accepted"
