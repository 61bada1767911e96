"""A Lanczos step as one CUDA graph: product, both streams and the scalars, replayed per step.

The row that a step makes is counted on the device, so that every step is the same graph. The kept
first-order graph is built anew on the capturing stream, because autograd runs a backward node on
the stream of its forward.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fasthessian.krylov.lanczos import Lanczos

FEW = 8  # steps: a capture costs about as much as making them kernel by kernel
_FAILED: list[torch.cuda.CUDAGraph] = []  # kept for good, see _mend


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device, because cuBLAS keeps a workspace for each stream it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Replay:
    """Makes the steps of a run: by replaying a captured one, or kernel by kernel."""

    def __init__(self, run: Lanczos, wanted: bool) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._kept: tuple[Any, ...] = ()
        self._reason = _obstacle(run, wanted)

    @property
    def words(self) -> str:
        """Whether the steps are captured, or why they are made kernel by kernel."""
        if self._reason is not None:
            return f"eager: {self._reason}"
        return "captured" if self._graph is not None else "to be captured at the first step"

    def step(self, run: Lanczos) -> bool:
        """Enqueue one step, product included; False where it has to be made kernel by kernel.

        The first is made kernel by kernel, to warm up for the capture.
        """
        if self._graph is not None:
            self._graph.replay()
            run.A.matvecs += 1
            return True
        return self._reason is None and self._warm_up_and_capture(run)

    def _warm_up_and_capture(self, run: Lanczos) -> bool:
        device, counter = run.A.device, run.ledger.counter
        side, ahead = _side_stream(device), torch.cuda.current_stream(device)
        self._reason = run.A._kept.rebuild()
        if self._reason is not None:
            return False
        side.wait_stream(ahead)
        with torch.cuda.stream(side):
            counter.fill_(run.size)
            run.delayed_step(counter[:1], counter, counter[1:])
        graph, made = torch.cuda.CUDAGraph(), run.A.matvecs
        try:
            # the outer context brings the caller's stream back where a failed capture does not
            with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
                run.delayed_step(counter[:1], counter, counter[1:])
            self._graph, self._kept = graph, run.A._kept.held()
        except RuntimeError as error:
            self._reason = f"the capture failed: {str(error).splitlines()[0]}"
            _mend(graph, side, counter)
        run.A.matvecs = made  # a capture makes no product
        ahead.wait_stream(side)
        return True


def _mend(failed: torch.cuda.CUDAGraph, side: torch.cuda.Stream, like: Tensor) -> None:
    """What torch leaves undone where a capture ends in an error.

    By its source (2.11; pytorch issues 171263 and 180395): the generator stays in the capture, and
    refuses random numbers, until another one succeeds; and the allocator keeps asking the failed
    graph which stream it captured, so it may not be freed.
    """
    _FAILED.append(failed)
    small = torch.cuda.CUDAGraph()
    with (
        contextlib.suppress(RuntimeError),  # then it is as it was
        torch.cuda.stream(side),
        torch.cuda.graph(small, stream=side),
    ):
        torch.zeros_like(like)


def _obstacle(run: Lanczos, wanted: bool) -> str | None:
    """Why the steps of a run cannot be captured; None if they can."""
    if not wanted:
        return "graph=False"
    if run.A.device.type != "cuda":
        return f"{run.A.device.type} has no CUDA graphs"
    if run.capacity < FEW:
        return f"{run.capacity} steps are too few to pay for a capture"
    if not run.delayed:
        return "only the dcgs2 schedule counts its rows on the device"
    if not run.basis.graphable:
        return "an offloaded basis is copied in a growing number of pieces"
    if run.kernels.NAME == "reference":
        return "the reference kernels read the counter on the host"
    return run.A._capture_obstacle()
