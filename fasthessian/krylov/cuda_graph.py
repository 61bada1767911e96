"""A Lanczos step as one CUDA graph: product, both streams and the scalars, replayed per step.

The device counts the rows, so that every step is the same graph. The operator's kept first-order
graph is built anew on the capturing stream, because autograd runs a backward node on the stream of
its forward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasthessian.krylov.basis import Basis
from fasthessian.operators.base import SymmetricOperator

FEW = 8  # steps: a capture costs about as much as making them kernel by kernel
Step = Callable[[Tensor, Tensor, Tensor], None]  # of the cells [made], [made, making], [making]
_FAILED: list[torch.cuda.CUDAGraph] = []  # kept for good, see _mend


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device, because cuBLAS keeps a workspace for each stream it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CapturedStep:
    """Makes a step by replaying a CUDA graph, where it can be captured.

    Args:
        obstacle: why it cannot be captured, if that is known beforehand.
    """

    def __init__(self, obstacle: str | None) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._kept: tuple[Any, ...] = ()
        self._obstacle = obstacle

    @property
    def captured(self) -> bool:
        """Whether there is a graph to replay."""
        return self._graph is not None

    @property
    def words(self) -> str:
        """Whether the steps are captured, or why they are made kernel by kernel."""
        if self._obstacle is not None:
            return f"eager: {self._obstacle}"
        return "captured" if self.captured else "to be captured at the first step"

    def make(self, A: SymmetricOperator, counter: Tensor, size: int, step: Step) -> bool:
        """Enqueue one step, product included; False where it has to be made kernel by kernel.

        The first one is made kernel by kernel, to warm up for the capture.

        Args:
            A: the operator whose product ``step`` makes.
            counter: (2,) int64, [rows made, the row being made]; the step advances it.
            size: rows made so far.
            step: enqueues one step and reads its row from the counter alone.
        """
        if self._graph is not None:
            self._graph.replay()
            A.matvecs += 1
            return True
        return self._obstacle is None and self._warm_up_and_capture(A, counter, size, step)

    def _warm_up_and_capture(
        self, A: SymmetricOperator, counter: Tensor, size: int, step: Step
    ) -> bool:
        side, ahead = _side_stream(A.device), torch.cuda.current_stream(A.device)
        self._obstacle = A._kept.rebuild()
        if self._obstacle is not None:
            return False
        side.wait_stream(ahead)
        with torch.cuda.stream(side):
            counter.fill_(size)
            step(counter[:1], counter, counter[1:])
        graph, made = torch.cuda.CUDAGraph(), A.matvecs
        try:
            # the outer context restores the caller's stream where a failed capture does not
            with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
                step(counter[:1], counter, counter[1:])
            self._graph, self._kept = graph, A._kept.held()
        except RuntimeError as error:
            self._obstacle = f"the capture failed: {str(error).splitlines()[0]}"
            _mend(graph, side, counter)
        A.matvecs = made  # a capture makes no product
        ahead.wait_stream(side)
        return True


def _mend(failed: torch.cuda.CUDAGraph, side: torch.cuda.Stream, like: Tensor) -> None:
    """Do what torch leaves undone when a capture ends in an error.

    By torch's source (2.11; pytorch issues 171263 and 180395), the generator stays in the capture,
    and refuses random numbers, until another capture succeeds. The allocator keeps asking the
    failed graph which stream it captured, so that the graph must not be freed.
    """
    _FAILED.append(failed)
    small = torch.cuda.CUDAGraph()
    with (
        contextlib.suppress(RuntimeError),  # then nothing is mended
        torch.cuda.stream(side),
        torch.cuda.graph(small, stream=side),
    ):
        torch.zeros_like(like)


def obstacle(
    A: SymmetricOperator, basis: Basis, capacity: int, *, wanted: bool, delayed: bool
) -> str | None:
    """Why the steps of a run cannot be captured; None if they can."""
    if not wanted:
        return "graph=False"
    if A.device.type != "cuda":
        return f"{A.device.type} has no CUDA graphs"
    if capacity < FEW:
        return f"{capacity} steps are too few to pay for a capture"
    if not delayed:
        return "only the dcgs2 schedule counts its rows on the device"
    if not basis.graphable:
        return "an offloaded basis is copied in a growing number of pieces"
    if basis.space.kernels.NAME == "reference":
        return "the reference kernels read the counter on the host"
    return A._capture_obstacle()
