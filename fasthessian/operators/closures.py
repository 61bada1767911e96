"""A loss given by a function without arguments, for all that is no criterion over batches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fasthessian.operators.calls import scalar
from fasthessian.operators.hooks import acting
from fasthessian.operators.losses import Part
from fasthessian.operators.state import seeded
from fasthessian.operators.watch import OTHER, POINT, Entry, reach


class ClosureLoss:
    """A loss given by a function without arguments: a single part."""

    origin = "closure"
    replayable = True
    size = count = 1
    note = ""
    counted = True
    counted_at_a_point = False

    def __init__(self, closure: Callable[[], Tensor], params: dict[str, Tensor]) -> None:
        if not callable(closure):
            raise TypeError(f"closure must be callable, got {type(closure).__name__}")
        self._closure, self._params = closure, params
        self.roots: list[nn.Module] = []

    def survey(self) -> None:
        """Nothing to count."""

    def entries(self, whole: bool) -> Iterator[Entry]:
        """The tensors given as ``params``, and what can be reached from the closure."""
        for name, tensor in self._params.items():
            yield f"parameter {name!r}", tensor, POINT
        if whole:
            seen = {id(tensor) for tensor in self._params.values()}
            yield from reach("closure", self._closure, OTHER, seen)

    def named(self) -> dict[str, Tensor]:
        """The tensors given as ``params``."""
        return self._params

    def parts(self) -> Generator[Part, None, None]:
        """The one part."""
        yield Part(0, 1.0, None, 1)

    def evaluate(
        self, part: Part, values: Mapping[str, Tensor] | None = None
    ) -> tuple[Any, Tensor]:
        """No outputs, and the closure's loss with its graph."""
        with seeded(part.position), acting():
            return None, scalar(self._closure(), self.origin)
