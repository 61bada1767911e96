"""What must be the same on all ranks, and the line that names the ranks that differ."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence

import torch

from fasthessian.distributed.failures import known_to_all, listed
from fasthessian.distributed.ranks import Ranks
from fasthessian.errors import InputError

VALUES = "values of "  # how the names of items begin that are checksums of tensors
SHOWN = 4  # values that a message names, and ranks for each value


def check_same(ranks: Ranks, items: Mapping[str, str]) -> None:
    """Compare items, by name, over the ranks. One collective of 24 bytes, if all are the same.

    Raises:
        ValueError: ranks differ in an item; all ranks raise the same.

    Warns:
        UserWarning: the CPUs have different vector instructions.
    """
    if ranks.size < 2:
        return
    machine = torch.backends.cpu.get_cpu_capability()
    numbers = [*_numbers(json.dumps(list(items.items())), 2), *_numbers(machine, 1)]
    rows = ranks.rows(torch.tensor(numbers, device="cpu"), start=True)
    if not bool((rows[:, :2] == rows[0, :2]).all()):
        raise known_to_all(InputError(_difference(ranks.objects(dict(items)))))
    if not bool((rows[:, 2] == rows[0, 2]).all()):
        warnings.warn(
            f"the CPUs of the ranks have different vector instructions "
            f"({_values(ranks.objects(machine))}): rounding may differ between ranks",
            stacklevel=2,
        )


def _numbers(text: str, count: int) -> list[int]:
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8 * count).digest()
    return [
        int.from_bytes(digest[i : i + 8], "little", signed=True) for i in range(0, 8 * count, 8)
    ]


def _difference(found: Sequence[Mapping[str, str]]) -> str:
    """The line for the first item that is not the same on all ranks."""
    names = dict.fromkeys(name for items in found for name in items)
    values = {name: [items.get(name, "nothing") for items in found] for name in names}
    name, first = next((n, each) for n, each in values.items() if len(set(each)) > 1)
    if name.startswith(VALUES):
        most, few, *_ = _by_value(first).values()
        return (
            f"group needs the same {name} on all ranks, but those of {few} differ from those of "
            f"{most}; copy those of rank 0: torch.distributed.broadcast(tensor.data, 0) for each"
        )
    return (
        f"group needs the same {name} on all ranks, got {_values(first)}; make the same call with "
        f"the same model and versions on all ranks"
    )


def _values(values: Sequence[str]) -> str:
    return ", ".join(f"{value} on {who}" for value, who in _by_value(values).items())


def _by_value(values: Sequence[str]) -> dict[str, str]:
    """Which ranks have which value, in words; those that most have first."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    found = {}
    for value, same in sorted(ranks.items(), key=lambda item: -len(item[1]))[:SHOWN]:
        more = [f"{len(same) - SHOWN} more"] if len(same) > SHOWN else []
        words = listed([*map(str, same[:SHOWN]), *more], "and")
        found[value] = f"rank{'s' if len(same) > 1 else ''} {words}"
    return found
