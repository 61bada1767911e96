"""The user's options for the products of a curvature matrix."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
from typing import Any, TypeVar

import torch

from fasthessian.distributed.ranks import Ranks, ranks_of
from fasthessian.errors import InputError
from fasthessian.memory import available_bytes, readable
from fasthessian.operators.products.engines import ENGINES
from fasthessian.operators.torch_state.gathered import ROUTES, WHOLE, Gathered
from fasthessian.operators.torch_state.scopes import Scope, UndoLog

R = TypeVar("R")
PRECISIONS = ("bf16", "tf32")


@dataclasses.dataclass(frozen=True)
class Options:
    """The keyword arguments that all curvature matrices have; see ``Hessian``."""

    engine: str = "auto"
    precision: str | None = None
    mode: str = "eval"
    memory_budget: int | None = None
    microbatch: int | None = None
    weight_decay: float = 0.0
    group: Any = None
    gathered: Gathered = WHOLE

    @functools.cached_property
    def ranks(self) -> Ranks:
        """The ranks whose products are summed."""
        return ranks_of(self.gathered.group(self.group))

    @property
    def keeps_graphs(self) -> bool:
        """Whether products use the graphs of gradients, which can be kept."""
        return self.engine not in ("forward", "difference")

    def __post_init__(self) -> None:
        """Raise ValueError for a value that is not accepted."""
        ranks = self.ranks  # raises for a group that is not accepted
        try:
            self._check()
        except InputError as error:
            ranks.leave(error)  # the others may wait for this rank
            raise

    def _check(self) -> None:
        self.gathered.check(self.ranks)
        engines = (*ENGINES, *ROUTES) if self.gathered else ENGINES
        if self.engine not in engines:
            what = ", which is for fully_shard models" if self.engine in ROUTES else ""
            raise InputError(
                f"engine must be one of {', '.join(engines)}, got {self.engine!r}{what}"
            )
        if self.precision not in (None, *PRECISIONS):
            raise InputError(f"precision must be None, 'bf16' or 'tf32', got {self.precision!r}")
        if self.precision == "bf16" and not self.keeps_graphs:
            raise InputError(
                f"precision must be None with engine={self.engine!r}, got 'bf16'; it serves "
                f"'retained' and 'recompute'"
            )
        if self.mode not in ("eval", "train"):
            raise InputError(f"mode must be 'eval' or 'train', got {self.mode!r}")
        budget = self.memory_budget
        if budget is not None and not (isinstance(budget, (int, float)) and budget >= 0):
            raise InputError(
                f"memory_budget must be None or a number of bytes >= 0, got {budget!r}"
            )
        size = self.microbatch
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise InputError(f"microbatch must be None or a positive integer, got {size!r}")
        decay = self.weight_decay
        if not (isinstance(decay, (int, float)) and math.isfinite(decay) and decay >= 0):
            raise InputError(f"weight_decay must be a finite number >= 0, got {decay!r}")

    def check(self, device: torch.device, closure: bool) -> None:
        """Raise ValueError if the device or a closure does not support an option."""
        if self.precision == "tf32" and device.type != "cuda":
            raise InputError(
                f"precision must be None or 'bf16' on {device.type}, got 'tf32', which is for "
                f"NVIDIA GPUs"
            )
        if closure and self.engine == "forward":
            raise InputError(
                "engine must be 'retained', 'recompute', 'difference' or 'auto' for a closure, got "
                "'forward': a closure reads its parameters itself"
            )

    def room(self, device: torch.device) -> float:
        """Bytes that kept graphs may take, and before ``open`` also full parameters."""
        if self.memory_budget is None:
            return available_bytes(device) // 2
        return max(0, self.memory_budget - self.gathered.held)

    @property
    def keeps_factors(self) -> bool:
        """Whether factors of single layers may be kept; they would keep the parameters too."""
        return self.precision != "bf16" and not self.gathered.regathers

    def gathering(self) -> Scope[str]:
        """Choose how the parameters of a fully_shard model are gathered, and gather them.

        The scope gives text for ``engine``.
        """

        def begin(undo: UndoLog) -> str:
            device = self.gathered.device
            if device is not None:
                self.gathered.choose(self.engine, self.ranks, self.room(device))
            undo.enter(self.gathered.open())
            return self.gathered.words

        return Scope(begin)

    def choose(
        self, needs: float, count: int, fixed_order: bool, device: torch.device
    ) -> tuple[int, str]:
        """How many parts keep their graph, and text for ``engine`` that says why.

        ``needs`` is the size in bytes of the graphs of all ``count`` parts.
        """
        size = f"{readable(needs)} of graphs for {count} part{'s' if count > 1 else ''}"
        if self.engine not in ("auto", *ROUTES):
            kept = sys.maxsize if self.engine == "retained" else 0
            return kept, f"{self.engine}: as asked, {size}"
        budget = self.room(device)
        limit = f"the budget of {readable(budget)}"
        if needs <= budget:
            return sys.maxsize, f"retained: {size}, within {limit}"
        # if a loader shuffles, a kept graph does not belong to a part of the next pass
        capacity = int(budget / needs * count) if fixed_order else 0
        if capacity:
            return capacity, f"retained for {capacity} parts: {size}, above {limit}"
        return 0, f"recompute: {size}, above {limit}"

    def shortage(
        self, what: str, words: str, needs: float, device: torch.device, cuttable: bool
    ) -> str:
        """The message for a failed allocation, which names the option that helps.

        ``words`` is torch's message, ``needs`` the size of all graphs in bytes. ``cuttable`` is
        true if the loss has batches.
        """
        ways = []
        if self.engine != "recompute" and self.keeps_graphs:
            ways.append("engine='recompute' keeps no graph")
        if cuttable and self.microbatch != 1:
            ways.append(
                f"microbatch={max(1, (self.microbatch or 2) // 2)} and more cut the batches"
            )
        size = re.search(r"[\d.]+ (?:[KMGT]iB|bytes)", words)
        asked = f"an allocation of {size.group(0)} failed" if size else "an allocation failed"
        graphs = f"; graphs take about {readable(needs)} in all" if needs else ""
        return (
            f"{what} does not fit the memory of {device}: {asked}, "
            f"{readable(available_bytes(device))} are free now{graphs}; "
            f"{', '.join(ways) or 'use a machine with more memory'}"
        )
