"""All that changes during a Krylov run, in one record per run.

A run is its fixed configuration and its state. A fresh run of the same configuration whose state is
replaced by another one's goes on as that one would have, to the bit (see ``state_file``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from fasthessian.arguments import integer
from fasthessian.errors import InputError
from fasthessian.krylov.basis import Basis
from fasthessian.krylov.coefficients import Coefficients, Snapshot
from fasthessian.krylov.dots import gram
from fasthessian.operators.base import SymmetricOperator

X = TypeVar("X", float, Tensor)
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
        raise NotImplementedError

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
        raise NotImplementedError

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors, whose shapes are right, into those of this state."""
        raise NotImplementedError

    def _kinds(self) -> dict[str, tuple[type, ...]]:
        assert dataclasses.is_dataclass(self)
        return {f.name: NUMBERS[f.type] for f in dataclasses.fields(self) if f.type in NUMBERS}


@dataclasses.dataclass
class RunState(State):
    """The state of a ``Lanczos`` run."""

    basis: Basis  # V: its first `size` rows are final
    W: Tensor  # (2, n), the operator's dtype: the candidate u and its product
    coefficients: Coefficients  # T, the gauges and the row counter on the device
    seed: int  # of the stream of random numbers
    drawn: int  # numbers of the stream that are used up

    candidate: int = 0  # the row of W that holds u
    size: int = 0  # rows made
    judged: int = 0  # rows whose coefficients were checked
    kept: int = 0  # rows that the last restart kept
    factor: float | None = None  # products are multiplied by it; None before the first one

    T: Tensor = dataclasses.field(  # (size + 1, size + 1) float64 on the CPU, as of the last poll:
        default_factory=lambda: torch.zeros(1, 1, dtype=torch.float64, device="cpu")
    )  # V A V^T and, in its last row, the couplings of u, in units of `factor`
    beta: float = 1.0  # norm of u at the last poll
    skew: float = 0.0  # largest difference of q_i'A q_j and q_j'A q_i, in units of T
    dropped: float = 0.0  # bound on the couplings that `renew` gave up, in units of T
    pending: Snapshot | None = None  # on its way to the host, for the next poll

    exhausted: bool = False  # no further row: V spans the space, or a subspace without `refill`
    broke_down: bool = False  # a breakdown was met since the last restart that looked for one
    own: int | None = None  # rows before the first breakdown: the start vector's Krylov space
    lost: float = 0.0  # norm of the last candidate that was taken for rounding
    checked_since: int | None = None  # row of the breakdown that ended a run's deferred steps

    @property
    def u(self) -> Tensor:
        """The candidate (1, n) for the next row."""
        return self.W[self.candidate][None]

    @property
    def product(self) -> Tensor:
        """The row (1, n) for A u, where the next candidate is made."""
        return self.W[1 - self.candidate][None]

    def next_offset(self) -> int:
        """Where the next n numbers of the stream begin that no vector was read from."""
        offset = self.drawn
        self.drawn += self.W.shape[1]
        return offset

    def snapshot(self, delayed: bool) -> Snapshot:
        """A copy of the coefficients, with the norm of u, on its way to the host."""
        if delayed:
            norm2 = gram(self.basis.kernels, self.W[:1])[0, 0]
            self.coefficients.set_candidate(self.size, norm2)
        return Snapshot(self.coefficients.cells, self.size)

    def passed_snapshot(self, delayed: bool) -> Snapshot | None:
        """The same without a kernel: up to the last row but one if only a step knows the norm."""
        if not delayed:
            return Snapshot(self.coefficients.cells, self.size)
        if self.size <= self.kept:
            return None
        return Snapshot(self.coefficients.cells, self.size - 1, final=True)

    def discard(self, size: int, lost: float) -> None:
        """After a breakdown, discard the rows from ``size`` on; ``lost`` is their first's norm."""
        self.pending, self.broke_down, self.lost = None, True, lost
        self.own = size if self.own is None else self.own
        self.size = self.judged = size
        self.beta = 0.0
        self.T = self.T[: size + 1, : size + 1].clone()

    def scaled_(self, w: Tensor) -> None:
        """From the units of A to those of T."""
        if self.factor not in (None, 1.0):
            w.mul_(self.factor)

    def unscaled(self, x: X) -> X:
        """From the units of T to those of A."""
        return x if self.factor in (None, 1.0) else x / self.factor

    def tensors(self) -> dict[str, Tensor]:
        """The rows made and the one after them (a candidate of cgs2), and all small tensors."""
        found = {
            "V": self.basis.stored[: self.size + 1],
            "W": self.W,
            "cells": self.coefficients.cells,
            "counter": self.coefficients.counter,
            "T": self.T,
        }
        if self.pending is not None:
            snapshot = self.pending.wait()
            found["final" if snapshot.final else "pending"] = snapshot.cells
        return found

    def _shapes(self, numbers: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Shapes:
        V, cells = self.basis.stored, self.coefficients.cells
        size = integer("size", numbers["size"], 0, len(cells) - 1)
        rows = {name: len(tensors[name]) for name in {"T", "pending", "final"} & set(tensors)}
        shapes: Shapes = {
            "V": (V.dtype, (min(size + 1, len(V)), V.shape[1])),
            "W": (self.W.dtype, tuple(self.W.shape)),
            "cells": (cells.dtype, tuple(cells.shape)),
            "counter": (torch.int64, (2,)),
            "T": (torch.float64, (0, 0)),
        }
        for name, count in rows.items():
            shapes[name] = (torch.float64, (count, count if name == "T" else cells.shape[1]))
        return shapes

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        self.basis.stored[: len(tensors["V"])].copy_(tensors["V"])
        self.W.copy_(tensors["W"])
        self.coefficients.cells.copy_(tensors["cells"])
        self.coefficients.counter.copy_(tensors["counter"])
        self.T, self.pending = tensors["T"], None
        for name in {"pending", "final"} & set(tensors):
            cells = tensors[name]
            self.pending = Snapshot(cells, len(cells) - 1, final=name == "final")
