"""One file per state of a run: written whole or not at all, read only where it belongs.

The file is a NumPy ``.npz`` archive without pickled objects. It holds the tensors of the state, and
as text its numbers and the configuration of its run. Reading needs a fresh run of the same
configuration, which then goes on as the written one would have, to the bit.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from fasthessian.errors import InputError
from fasthessian.krylov.state import Item, State
from fasthessian.results import npz
from fasthessian.results.fields import parse
from fasthessian.results.records import write_whole


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
