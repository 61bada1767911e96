"""The states of runs, and one file per state: written whole or not at all, read only where it fits.

The file is a NumPy ``.npz`` archive without pickled objects. It holds the tensors of the state, and
as text its numbers and the configuration of its run. To read it, make a fresh run of the same
configuration: it then continues as the written one would have, to the bit.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fasthessian.errors import InputError
from fasthessian.operators.base import SymmetricOperator
from fasthessian.results import npz
from fasthessian.results.fields import parse
from fasthessian.results.record import write_whole

Number = int | float | bool | None
Item = int | bool | str  # of a configuration
NUMBERS: dict[str, tuple[type, ...]] = {  # annotations of the fields that are plain numbers
    "int": (int,),
    "float": (float,),
    "bool": (bool,),
    "int | None": (int, type(None)),
    "float | None": (float, type(None)),
}
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def configuration(
    kind: str, A: SymmetricOperator, capacity: int, deferred: bool
) -> dict[str, Item]:
    """What a run must have in common with another one to take over its state."""
    return {
        "kind": kind,
        "n": A.n,
        "dtype": str(A.dtype).removeprefix("torch."),
        "capacity": capacity,
        "deferred": deferred,
    }


class State:
    """What can be written out as numbers and tensors, and restored from them.

    Subclasses are dataclasses; fields that are neither numbers nor tensors are theirs to handle.
    """

    def numbers(self) -> dict[str, Number]:
        """The fields that are plain numbers, by name."""
        return {name: getattr(self, name) for name in self._kinds()}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to write, by name."""
        return {}

    def restore(self, numbers: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``numbers`` and ``tensors`` returned in a run of the same configuration.

        Raises:
            ValueError: a name, a type or a shape is not this run's; then nothing has changed.
        """
        kinds = self._kinds()
        if odd := set(numbers) ^ set(kinds):
            raise InputError(f"numbers are missing or unknown: {', '.join(sorted(odd))}")
        for name, value in numbers.items():
            if type(value) not in kinds[name]:
                accepted = " or ".join(kind.__name__ for kind in kinds[name])
                raise InputError(f"{name} must be {accepted}, got {value!r:.40}")
        shapes = self._shapes(numbers, tensors)
        if odd := set(tensors) ^ set(shapes):
            raise InputError(f"tensors are missing or unknown: {', '.join(sorted(odd))}")
        for name, (dtype, shape) in shapes.items():
            found = tensors[name]
            if found.dtype != dtype or tuple(found.shape) != shape:
                raise InputError(
                    f"{name} must be {dtype} of shape {shape}, "
                    f"got {found.dtype} of shape {tuple(found.shape)}"
                )
        for name, value in numbers.items():
            setattr(self, name, value)
        self._take(tensors)

    def _shapes(self, numbers: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Shapes:
        """Dtype and shape of each tensor that belongs to these numbers and tensors."""
        return {}

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors, whose shapes are right, into those of this state."""

    def _kinds(self) -> dict[str, tuple[type, ...]]:
        assert dataclasses.is_dataclass(self)
        return {f.name: NUMBERS[f.type] for f in dataclasses.fields(self) if f.type in NUMBERS}


class Restorable(Protocol):
    """A run with a state that changes and a configuration that does not."""

    @property
    def state(self) -> State:
        """All that changes."""

    def configuration(self) -> dict[str, Item]:
        """What a run must have in common with this one to take over its state."""


def write(path: str | os.PathLike[str], run: Restorable, *, overwrite: bool = False) -> None:
    """Write the state of a run between two of its steps.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is False.
        OSError: the folder is missing or cannot be written.
    """
    header = json.dumps({"run": run.configuration(), "numbers": run.state.numbers()})
    arrays = {name: t.detach().cpu().numpy() for name, t in run.state.tensors().items()}
    buffer = io.BytesIO()
    np.savez(buffer, **{npz.TEXT: np.array(header)}, **arrays)  # type: ignore[arg-type]
    write_whole(path, buffer.getvalue(), overwrite=overwrite)


def read(path: str | os.PathLike[str], run: Restorable) -> None:
    """Replace the state of a fresh run by the one in a file.

    Raises:
        ValueError: the file is damaged, or its run had another configuration: an operator of
            another size or dtype, another schedule or basis. The run is then as it was.
        FileNotFoundError: there is no such file.
    """
    try:
        with open(path, "rb") as stream:
            archive = npz.Archive(stream)
            header = parse(archive.text())
            parts = header if isinstance(header, dict) else {}
            if set(parts) != {"run", "numbers"} or not isinstance(parts["numbers"], dict):
                raise InputError("it has no configuration and numbers of a run")
            wrong = _difference(header["run"], run.configuration())
            if wrong is None:
                names = set(archive.infos) - {npz.TEXT}
                for name in names:
                    archive.header(name)  # its size, before it is read
                tensors = {name: torch.from_numpy(archive.read(name)) for name in names}
                run.state.restore(header["numbers"], tensors)
    except FileNotFoundError:
        raise
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is not the saved state of a run ({words})") from error
    if wrong is not None:
        raise InputError(
            f"{path} is of a run with {wrong}; go on with the operator and options of that run"
        )


def _difference(found: object, expected: Mapping[str, object]) -> str | None:
    """The first item in which two configurations differ; None if they are equal."""
    if not isinstance(found, Mapping) or set(found) - set(expected):
        return f"configuration {found!r:.60}"
    for name, value in expected.items():
        if found.get(name) != value:
            return f"{name}={found.get(name)!r:.40}, not {name}={value!r}"
    return None
