"""All that changes during a Krylov run, in one record per run.

A run consists of a fixed configuration and a state. If a fresh run takes over the state of another
run of the same configuration, it continues as that run would have, to the bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from fasthessian.arguments import integer
from fasthessian.checkpoints.state import Shapes, State, Stored
from fasthessian.krylov.basis import Basis
from fasthessian.krylov.coefficients import Coefficients, CoefficientsCopy
from fasthessian.vectors import empty_rows

X = TypeVar("X", float, Tensor)
Y = TypeVar("Y")
ROWS = 3  # vectors of a run without a basis


@dataclasses.dataclass
class ThreeTermState(State):
    """The state of a ``ThreeTerm`` run."""

    SPLIT = ("rows",)

    rows: Tensor  # (ROWS, n), the operator's dtype: q_j in row j mod 3
    entries: Tensor  # (capacity, 2) float64 on the device: alpha_j and beta_j
    size: int = 0  # steps made
    judged: int = 0  # steps whose entries were checked
    norm: float = 0.0  # largest |alpha_j| + |beta_j| so far
    exhausted: bool = False  # an invariant subspace was met

    @classmethod
    def of(cls, capacity: int, n: int, dtype: torch.dtype, device: torch.device) -> ThreeTermState:
        """Of a run that has made no step."""
        return cls(
            rows=empty_rows(ROWS, n, dtype, device),
            entries=torch.zeros(capacity, 2, dtype=torch.float64, device=device),
        )

    def _shapes(self, numbers: Mapping[str, Any], stored: Mapping[str, Stored]) -> Shapes:
        size = integer("size", numbers["size"], 0, len(self.entries))
        integer("judged", numbers["judged"], 0, size)
        both = {"rows": self.rows, "entries": self.entries}
        return {name: (t.dtype, tuple(t.shape)) for name, t in both.items()}

    def _take(self, stored: Mapping[str, Stored]) -> None:
        for name, source in stored.items():
            source.read_into(getattr(self, name))


@dataclasses.dataclass
class LoopState(State):
    """The state of the loop that makes steps until the wanted Ritz pairs have converged.

    See ``ritz.converge``.
    """

    began: int = 0  # products of the algorithm before the loop
    entered: int | None = None  # rows of the run when the loop began; None before
    reserved: int = 0  # products for the refinement after the loop
    locking: bool = False  # pairs converge to LOCKED * tol, before their couplings are given up
    upper: float | None = None  # point of the last search: eigenvalues above it are wanted
    lower: float | None = None  # the same for eigenvalues below it
    count: int = 0  # eigenvalues beyond these points, at least
    judged: bool = False  # the pairs were judged after the last step: another one comes next

    @property
    def points(self) -> list[tuple[float, int]]:
        """The points of the last search, as ``missing.limits`` gives them."""
        both = (self.upper, 1), (self.lower, -1)
        return [(x, sign) for x, sign in both if x is not None]

    @points.setter
    def points(self, points: list[tuple[float, int]]) -> None:
        by_sign = {sign: x for x, sign in points}
        self.upper, self.lower = by_sign.get(1), by_sign.get(-1)


@dataclasses.dataclass
class RunState(State):
    """The state of a ``Lanczos`` run, and of the loop and the search that use it."""

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
    pending: CoefficientsCopy | None = None  # on its way to the host, for the next poll

    exhausted: bool = False  # no further row: V spans the space, or a subspace without `refill`
    broke_down: bool = False  # a breakdown was met since the last restart that looked for one
    own: int | None = None  # rows before the first breakdown: the start vector's Krylov space
    lost: float = 0.0  # norm of the last candidate that was taken for rounding
    checked_since: int | None = None  # row of the breakdown that ended a run's deferred steps

    loop: LoopState = dataclasses.field(default_factory=LoopState)
    search: ThreeTermState | None = None  # of the search for missing eigenvalues in progress

    @property
    def u(self) -> Tensor:
        """The candidate (1, n) for the next row."""
        return self.W[self.candidate : self.candidate + 1]

    @property
    def product(self) -> Tensor:
        """The row (1, n) for A u, where the next candidate is made."""
        return self.W[1 - self.candidate : 2 - self.candidate]

    def next_offset(self) -> int:
        """Where the next n numbers of the stream begin that no vector was read from."""
        offset = self.drawn
        self.drawn += self.basis.space.n
        return offset

    def copy(self, delayed: bool) -> CoefficientsCopy:
        """A copy of the coefficients, with the norm of u, on its way to the host."""
        if delayed:
            self.coefficients.set_candidate(self.size, self.basis.space.gram(self.W[:1]))
        return CoefficientsCopy(self.coefficients.cells, self.size)

    def passed_copy(self, delayed: bool) -> CoefficientsCopy | None:
        """The same without a kernel: up to the last row but one if only a step knows the norm."""
        if not delayed:
            return CoefficientsCopy(self.coefficients.cells, self.size)
        if self.size <= self.kept:
            return None
        return CoefficientsCopy(self.coefficients.cells, self.size - 1, final=True)

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

    def numbers(self) -> dict[str, Any]:
        """The fields that are plain numbers, and those of the loop and of the search."""
        found = super().numbers() | _prefixed("loop", self.loop.numbers())
        return found | (_prefixed("search", self.search.numbers()) if self.search else {})

    def tensors(self) -> dict[str, Tensor]:
        """All small tensors."""
        found = {
            "cells": self.coefficients.cells,
            "counter": self.coefficients.counter,
            "T": self.T,
        }
        if self.pending is not None:
            copy = self.pending.wait()
            found["final" if copy.final else "pending"] = copy.cells
        return found | (_prefixed("search", self.search.tensors()) if self.search else {})

    def split(self) -> dict[str, Tensor]:
        """The rows made and the one after them (a candidate of cgs2), and the candidates."""
        found = {"V": self.basis.stored[: self.size + 1], "W": self.W}
        return found | (_prefixed("search", self.search.split()) if self.search else {})

    def restore(self, numbers: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        """As that of ``State``; the loop and the search are replaced."""
        of_loop, numbers = _split("loop", numbers)
        of_search, numbers = _split("search", numbers)
        stored_of_search, stored = _split("search", stored)
        loop, search = LoopState(), None
        loop.restore(of_loop, {})
        if of_search or stored_of_search:
            W, entries = self.W, stored_of_search.get("entries")
            length = 0 if entries is None else entries.shape[0]
            capacity = integer("capacity of the search", length, 1, self.basis.space.n)
            search = ThreeTermState.of(capacity, W.shape[1], W.dtype, W.device)
            search.restore(of_search, stored_of_search)
        super().restore(numbers, stored)
        self.loop, self.search = loop, search

    def _shapes(self, numbers: Mapping[str, Any], stored: Mapping[str, Stored]) -> Shapes:
        V, cells = self.basis.stored, self.coefficients.cells
        size = integer("size", numbers["size"], 0, len(cells) - 1)
        rows = {name: stored[name].shape[0] for name in {"T", "pending", "final"} & set(stored)}
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

    def _take(self, stored: Mapping[str, Stored]) -> None:
        stored["V"].read_into(self.basis.stored[: stored["V"].shape[0]])
        stored["W"].read_into(self.W)
        stored["cells"].read_into(self.coefficients.cells)
        stored["counter"].read_into(self.coefficients.counter)
        self.T, self.pending = stored["T"].tensor(), None
        for name in {"pending", "final"} & set(stored):
            cells = stored[name].tensor()
            self.pending = CoefficientsCopy(cells, len(cells) - 1, final=name == "final")


def _prefixed(part: str, items: Mapping[str, Y]) -> dict[str, Y]:
    """The items of a part of a state, as they are named in the whole."""
    return {f"{part}.{name}": item for name, item in items.items()}


def _split(part: str, items: Mapping[str, Y]) -> tuple[dict[str, Y], dict[str, Y]]:
    """The items of a part, as they are named in it, and all others."""
    prefix = f"{part}."
    of_part = {name for name in items if name.startswith(prefix)}
    return (
        {name.removeprefix(prefix): items[name] for name in of_part},
        {name: item for name, item in items.items() if name not in of_part},
    )
