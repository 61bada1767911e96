"""What of a run is saved: the numbers and tensors of dataclasses that change while it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fasthessian.errors import InputError

Number = int | float | bool | str | None
NUMBERS: dict[str, tuple[type, ...]] = {  # annotations of the fields that are plain numbers or text
    "int": (int,),
    "float": (float,),
    "bool": (bool,),
    "str": (str,),
    "int | None": (int, type(None)),
    "float | None": (float, type(None)),
}
Shapes = dict[str, tuple[torch.dtype, tuple[int | None, ...]]]  # None accepts any length


class Stored(Protocol):
    """A tensor that can be read; see ``shards.Source``."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """A new tensor with the content."""

    def read_into(self, out: Tensor) -> None:
        """Copy the content to ``out``, which has its shape."""


class State:
    """What can be saved as numbers and tensors, and restored from them.

    Subclasses are dataclasses. Their fields that are annotated as numbers or as ``Tensor`` are
    saved; other fields are theirs to handle. ``SPLIT`` names the tensors (k, n) of which a rank may
    hold a range of columns; all other tensors are alike on all ranks.
    """

    SPLIT: ClassVar[tuple[str, ...]] = ()
    FROZEN: ClassVar[bool] = False  # never changes: its tensors are written once

    def numbers(self) -> dict[str, Any]:
        """The fields that are plain numbers, by name."""
        return {name: getattr(self, name) for name in self._kinds()}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are alike on all ranks, by name."""
        return {name: getattr(self, name) for name in self._fields() if name not in self.SPLIT}

    def split(self) -> dict[str, Tensor]:
        """The tensors (k, n) of which a rank may hold a range of columns, by name."""
        return {name: getattr(self, name) for name in self.SPLIT}

    def restore(self, numbers: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        """Take over the numbers and the tensors of a run of the same configuration.

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
        shapes = self._shapes(numbers, stored)
        if odd := set(stored) ^ set(shapes):
            raise InputError(f"tensors are missing or unknown: {', '.join(sorted(odd))}")
        for name, (dtype, shape) in shapes.items():
            found = stored[name]
            lengths = zip(found.shape, shape, strict=False)
            if (found.dtype, len(found.shape)) != (dtype, len(shape)) or any(
                want not in (None, have) for have, want in lengths
            ):
                words = str(shape).replace("None", "any")
                raise InputError(
                    f"{name} must be {dtype} of shape {words}, "
                    f"got {found.dtype} of shape {tuple(found.shape)}"
                )
        for name, value in numbers.items():
            setattr(self, name, value)
        self._take(stored)

    def _shapes(self, numbers: Mapping[str, Any], stored: Mapping[str, Stored]) -> Shapes:
        """Dtype and shape of each tensor that belongs to these numbers and tensors."""
        shapes: Shapes = {name: (t.dtype, (None,) * t.dim()) for name, t in self.tensors().items()}
        return shapes | {name: (t.dtype, (None, t.shape[1])) for name, t in self.split().items()}

    def _take(self, stored: Mapping[str, Stored]) -> None:
        """Replace the tensors of this state by the stored ones, whose shapes are right."""
        for name, source in stored.items():
            setattr(self, name, source.tensor(getattr(self, name).device))

    def _kinds(self) -> dict[str, tuple[type, ...]]:
        assert dataclasses.is_dataclass(self)
        return {f.name: NUMBERS[f.type] for f in dataclasses.fields(self) if f.type in NUMBERS}

    def _fields(self) -> list[str]:
        assert dataclasses.is_dataclass(self)
        return [f.name for f in dataclasses.fields(self) if f.type == "Tensor"]
