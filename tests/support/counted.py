"""The collectives that a call makes on this rank, counted below the Python functions of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fasthessian as fh

# parts of the names of the methods of a ProcessGroup that start a collective
PARTS = ("reduce", "gather", "scatter", "all_to_all", "alltoall", "broadcast", "barrier", "send")


def collectives(call: Callable[[], Any]) -> list[int]:
    """The numbers in each collective that ``call`` starts, at the methods of process groups."""
    made: list[int] = []
    kept = {}

    def counting(method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            made.append(max([0, *numbers((args[1:], options))]))
            return method(*args, **options)

        return counted

    for name, method in list(vars(dist.ProcessGroup).items()):
        if any(part in name for part in PARTS):
            kept[name] = method
            setattr(dist.ProcessGroup, name, counting(getattr(dist.ProcessGroup, name)))
    try:
        call()
    finally:
        for name, method in kept.items():
            setattr(dist.ProcessGroup, name, method)
    return made


def numbers(value: Any) -> Iterator[int]:
    """The sizes of the tensors in arguments."""
    if isinstance(value, torch.Tensor):
        yield value.numel()
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, dict):
        yield from numbers(list(value.values()))


def recorded(call: Callable[[], Any]) -> int:
    """The operators of torch.distributed that ``call`` runs, in any thread, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        call()
    return sum("c10d" in e.name for e in record.events())


def own_collectives() -> list[int]:
    """To see that the counter counts: six."""
    return collectives(some_collectives)


def some_collectives() -> None:
    x, parts = torch.ones(4), [torch.empty(4) for _ in range(dist.get_world_size())]
    for _ in range(2):
        dist.all_reduce(x)
    dist.all_gather(parts, x)
    dist.all_reduce(x[1:], async_op=True).wait()
    dist.broadcast(x, 0)
    dist.barrier()


def operator(kind: str, depth: int, batches: int, group: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(depth)
        layers = [layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.Tanh())]
        model = nn.Sequential(*layers, nn.Linear(4, 3)).double()
        data = [
            (torch.randn(k + 9, 4).double(), torch.randint(3, (k + 9,))) for k in range(batches)
        ]
    if dist.get_rank() == 1:
        data = data[:-1]  # another number of batches, perhaps none
    return getattr(fh, kind)(model, nn.CrossEntropyLoss(), data, group=group)


def of_products(kind: str, depth: int, batches: int) -> dict[str, tuple[int, list[int]]]:
    """The collectives of products, gradient and loss, each beside the numbers of its result."""
    A = operator(kind, depth, batches, dist.group.WORLD)
    V = torch.randn(5, A.n, dtype=A.dtype, generator=torch.Generator().manual_seed(1))
    blocks = A.blocks("layer")
    block = blocks[next(iter(blocks))]
    part = torch.ones(2, block.n, dtype=A.dtype)
    calls = {
        "vector": (A.n, lambda: A @ V[0]),
        "block of one": (A.n, lambda: A @ V[:1]),
        "block of five": (5 * A.n, lambda: A @ V),
        "diagonal block": (2 * block.n, lambda: block @ part),
        "gradient": (A.n, lambda: A.gradient()),
        "loss": (1, lambda: A.loss()),
    }
    return {what: (size, collectives(call)) for what, (size, call) in calls.items()}


STEPS = {
    "density": lambda A, steps: fh.density(A, steps=steps),
    "density without a basis": lambda A, steps: fh.density(A, steps=steps, basis="none"),
    "density cgs2": lambda A, steps: fh.density(A, steps=steps, schedule="cgs2"),
    "density of blocks": lambda A, steps: fh.density(A.blocks("layer"), steps=steps),
}


def of_steps(name: str, depth: int, batches: int) -> list[int]:
    """Numbers of collectives of runs of 3, 4 and 9 steps."""
    A = operator("Hessian", depth, batches, dist.group.WORLD)
    run = STEPS[name]
    run(A, 3)
    return [len(collectives(lambda steps=steps: run(A, steps))) for steps in (3, 4, 9)]


def of_eigsh(depth: int, batches: int) -> tuple[int, int]:
    """Collectives and products of one call."""
    A = operator("Hessian", depth, batches, dist.group.WORLD)
    fh.eigsh(A, 2)
    before = A.matvecs
    made = len(collectives(lambda: fh.eigsh(A, 2)))
    return made, A.matvecs - before


def of_no_group() -> list[int]:
    """An operator without a group makes none, although there is a process group."""
    A = operator("Hessian", 2, 2, None)
    return collectives(lambda: (fh.eigsh(A, 2), A.gradient(), A.loss(), A.check()))


def of_the_profiler() -> list[tuple[int, int]]:
    """The numbers of collectives by the counter, and by the profiler."""
    A = operator("Hessian", 1, 2, dist.group.WORLD)
    V = torch.ones(2, A.n, dtype=A.dtype)
    calls = (some_collectives, lambda: A @ V, lambda: fh.density(A, steps=3))
    return [(len(collectives(call)), recorded(call)) for call in calls]
