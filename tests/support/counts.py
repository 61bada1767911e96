"""What runs cost in numbers that repeat exactly: products, calls of torch, allocations, bytes.

``python tests/support/counts.py`` prints the table. It is recorded in tests/house/counts.txt and
compared by a test, so that a rise is seen where it is made and not in a benchmark weeks later.
"""

from __future__ import annotations

import collections
import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fasthessian as fh
from fasthessian.kernels import native
from tests.support.models import PROBLEMS
from tests.support.spectra import F32, diagonal, outliers

SIZES = {0: 4, 1: 8, 2: 2}  # bytes of a number, by the type codes of the kernels
ALLOCATIONS = ("aten.empty", "aten.zeros", "aten.ones", "aten.full", "aten.clone", "aten._to_copy")


class Counts(NamedTuple):
    """Of one run, or of one step or product."""

    products: float
    calls: float  # of torch's operators
    allocations: float  # those among them that only make a tensor
    kernels: float  # calls of our kernels
    bytes: float  # that these kernels read and write


def counted(run: Callable[[], Any], products: int = 1) -> Counts:
    """The counts of a run; ``products`` is for one whose result does not say it."""
    calls, streamed = Calls(), []
    with warnings.catch_warnings(), kernels_counted(streamed.append), calls:
        warnings.simplefilter("ignore")
        found = run()
    made = sum(n for name, n in calls.found.items() if name.startswith(ALLOCATIONS))
    return Counts(
        getattr(found, "matvecs", products), sum(calls.found.values()), made,
        len(streamed), sum(streamed),
    )  # fmt: skip


class Calls(TorchDispatchMode):
    """Counts torch's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def kernels_counted(note: Callable[[int], None]) -> Iterator[None]:
    """Inside, ``note`` is called with the bytes of each kernel that passes over vectors."""

    def rows(arguments: tuple[Any, ...]) -> tuple[int, int]:
        _, _, stored, _, n, _, _, working, b, h, _, count = arguments[:12]
        return count * n * SIZES[stored], (1 + (h != 0)) * b * n * SIZES[working]

    def update(arguments: tuple[Any, ...]) -> int:
        (_, _, stored, _, n), append = arguments[:5], arguments[13]
        return sum(rows(arguments)) + append * n * SIZES[stored]

    def filled(arguments: tuple[Any, ...]) -> int:
        _, kind, n = arguments[:3]
        return n * SIZES[kind]

    def pack(arguments: tuple[Any, ...]) -> int:
        _, kind, _, sizes, _, beta = arguments[:6]
        return (2 + (beta != 0)) * sum(sizes) * SIZES[kind]

    sizes = {"project": lambda a: sum(rows(a)), "update": update, "pack": pack,
             "signs": filled, "normal": filled}  # fmt: skip

    def counting(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            note(sizes[name](arguments))
            return kernel(*arguments)

        return count

    cpu = native._native.cpu
    with contextlib.ExitStack() as stack:
        for name in sizes:
            replaced = counting(name, getattr(cpu, name))
            stack.enter_context(mock.patch.object(cpu, name, replaced))
        yield


def each(run: Callable[[int], Any], few: int, many: int) -> Counts:
    """The counts of one more step, of runs of ``few`` and of ``many`` steps."""
    run(few)  # the first run of an operator checks it
    first, second = counted(lambda: run(few)), counted(lambda: run(many))
    return Counts(*((b - a) / (many - few) for a, b in zip(first, second, strict=True)))


def table() -> dict[str, Counts]:
    """All runs that are counted."""
    small = diagonal(outliers(), F32)
    found = {}
    for words, options in (
        ("", {}),
        (", cgs2", {"schedule": "cgs2"}),
        (", float16 rows", {"basis": "compressed"}),
        (", no basis", {"basis": "none"}),
    ):

        def density(steps: int, options: dict[str, str] = options) -> Any:
            return fh.density(small, steps=steps, **options)  # type: ignore[arg-type]

        found[f"a step of density{words}"] = each(density, 20, 40)
    found["eigsh, ten largest"] = counted(lambda: fh.eigsh(small, 10, "LA"))
    found["eigsh, one at each end"] = counted(lambda: fh.eigsh(small, 2, "BE"))
    found["trace"] = counted(lambda: fh.trace(small, method="hutchinson"))
    found["spectrum, one at each end"] = counted(lambda: fh.spectrum(small, 1))
    for name in ("mlp", "cnn"):
        problem = PROBLEMS[name]
        model, criterion, data = problem.make()
        H = problem.operator(model, criterion, data)
        v = torch.ones(H.n, dtype=H.dtype)
        H @ v  # the first product prepares
        found[f"a product of the {name}"] = counted(lambda H=H, v=v: H @ v)
    return found


def count_lines() -> list[str]:
    """The table as text."""
    head = ("", "products", "torch calls", "allocations", "kernels", "bytes")
    rows = [head] + [
        (name, *(f"{x:.2f}".rstrip("0").rstrip(".") for x in counts))
        for name, counts in table().items()
    ]
    found = [f"torch {torch.__version__.partition('+')[0]}"]
    for name, *numbers in rows:
        found.append((f"{name:<34}" + "".join(f"{x:>14}" for x in numbers)).rstrip())
    return found


if __name__ == "__main__":
    print("\n".join(count_lines()))
