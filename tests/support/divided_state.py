"""What a call on a group leaves on each rank: models, gradients, modes, random states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import fasthessian as fh
from tests.support.untouched import restless, world

CALLS: dict[str, Callable[[Any], Any]] = {
    "product": lambda A: A @ torch.ones(2, A.n),
    "gradient": lambda A: A.gradient(torch.full((A.n,), 0.1)),
    "loss": lambda A: A.loss(torch.full((A.n,), 0.1)),
    "eigsh": lambda A: fh.eigsh(A, 2, tol=0.1).values,
    "trace of blocks": lambda A: [x.value for x in fh.trace(A.blocks("layer"), rtol=0.5).values()],
    "density": lambda A: fh.density(A, steps=4).nodes,
    "landscape": lambda A: fh.landscape(A, torch.eye(A.n)[0], points=3).losses,
    "check": lambda A: A.check(),
}
BROKEN = tuple(name for name in CALLS if name != "check")


def bits(value: Any) -> bytes:
    return np.asarray(value).tobytes()


def problem(mode: str, engine: str, empty: int | None) -> Any:
    """A model that draws random numbers and writes buffers; the rank ``empty`` has no data."""
    model, criterion, x, y = restless()
    rank = dist.get_rank()
    # the modes, gradients and random states of the ranks are different
    if rank == 1:
        model.eval()
        model.first.weight.grad = None
        model.norm.train()
    torch.manual_seed(rank)
    data = [] if rank == empty else [(x[rank : rank + 4], y[rank : rank + 4])]
    before = world(model, criterion)

    def make() -> fh.Hessian:
        return fh.Hessian(model, criterion, data, group=dist.group.WORLD, mode=mode, engine=engine)

    return model, criterion, make, before


def untouched(mode: str, engine: str, empty: int | None) -> None:
    """Every call leaves what it found."""
    model, criterion, make, before = problem(mode, engine, empty)
    A = make()
    assert world(model, criterion) == before, "made"
    for name, call in CALLS.items():
        call(A)
        assert world(model, criterion) == before, name


def broken(name: str, failing: int, empty: int | None) -> str:
    """One rank raises in the call: all ranks do, nothing changes, and the next call is right.

    Returns what this rank says.
    """
    model, criterion, make, before = problem("eval", "recompute", empty)
    A, call = make(), CALLS[name]
    first = bits(call(A))
    model.fail = dist.get_rank() == failing
    said = ""
    try:
        call(A)
    except KeyError as error:
        assert dist.get_rank() == failing
        said = str(error)
    except RuntimeError as error:
        assert dist.get_rank() != failing
        said = str(error)
    finally:
        model.fail = False
    assert world(model, criterion) == before, "after the exception"
    assert bits(call(A)) == first
    assert world(model, criterion) == before, "after the next call"
    return said


def broken_at_the_start(failing: int) -> str:
    """The data of one rank do not fit: no rank has an operator, and all can make another one."""
    model, criterion, make, before = problem("eval", "auto", None)
    x, y = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2])
    data = [(x, y + 3 * (dist.get_rank() == failing))]
    said = ""
    try:
        fh.Hessian(model, criterion, data, group=dist.group.WORLD)
    except (ValueError, RuntimeError) as error:
        said = str(error)
    assert world(model, criterion) == before, "after the exception"
    make() @ torch.ones(sum(p.numel() for p in model.parameters()))
    assert world(model, criterion) == before, "after another operator"
    return said


def nothing_valid() -> str:
    """Every target of every rank is ignored."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    data = [(x, torch.full((5,), -100))]
    try:
        fh.Hessian(model, nn.CrossEntropyLoss(), data, group=dist.group.WORLD)
    except fh.InputError as refusal:
        return str(refusal)
    return "accepted"
