"""The numbers that a Lanczos run computes on its device, and their copies on the host."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

Numbers = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class Coefficients:
    """T, the gauges and the row counter of a run of at most m rows, on the operator's device.

    Attributes:
        T: (m + 1, m + 1) float64. Rows and columns of final basis rows hold V A V^T; the row after
            them holds the couplings of the candidate (over its norm in dcgs2).
        gauges: (m + 1, 3) float64. Per row: the candidate's |u|^2, its part nu^2 outside the basis,
            and the largest difference of q_i'A q_j and q_j'A q_i.
        counter: (2,) int64, advanced on the device: [rows made, the row being made].
        cells: (m + 1, m + 4), T and the gauges side by side.
    """

    def __init__(self, m: int, device: torch.device) -> None:
        self.cells = torch.zeros(m + 1, m + 4, dtype=torch.float64, device=device)
        self.T, self.gauges = self.cells[:, : m + 1], self.cells[:, m + 1 :]
        self._norms = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64, device=device)
        self.counter = torch.zeros(2, dtype=torch.int64, device=device)

    def set_row(self, j: int, column: Tensor, nu2: Tensor) -> None:
        """Row j of cgs2: its dots with rows 0..j, and the squared norm of the next candidate."""
        T, gauges = self.T, self.gauges
        if j:
            gauges[j, 2] = (column[:j] - T[j, :j]).abs().max()
        T[:j, j] = T[j, :j]
        T[j, j] = column[j]
        T[j + 1, : j + 1] = 0.0
        T[j + 1, j] = nu2.clamp(min=0).sqrt()
        self.set_candidate(j + 1, nu2)

    def set_candidate(self, size: int, norm2: Tensor | float) -> None:
        """The squared norm, a number or of one element, of the candidate after ``size`` rows."""
        torch.mul(self._norms, norm2, out=self.gauges[size : size + 1])

    def reset(self, T: Tensor) -> None:
        """Replace everything by T (size + 1, size + 1), the candidate's row included."""
        self.cells.zero_()
        self.T[: len(T), : len(T)] = T.to(self.T.device)
        self.counter.fill_(len(T) - 1)


class CoefficientsCopy:
    """A copy on the host of the coefficients of ``size`` rows and of the row after them.

    That row is the candidate's. With ``final``, the candidate has become a row since. On a GPU the
    copy is enqueued: it waits for the work enqueued before it, and the host waits in ``wait``.

    Attributes:
        size, final: as given.
        cells: (size + 1, m + 4), as those of ``Coefficients``.
    """

    def __init__(self, cells: Tensor, size: int, final: bool = False) -> None:
        self.size, self.final = size, final
        cells = cells[: size + 1]
        self._event: torch.cuda.Event | None = None
        if cells.device.type == "cuda":
            self.cells = torch.empty(cells.shape, dtype=cells.dtype, device="cpu", pin_memory=True)
            self.cells.copy_(cells, non_blocking=True)
            self._event = torch.cuda.current_stream(cells.device).record_event()
        else:
            self.cells = cells.clone()

    def wait(self) -> CoefficientsCopy:
        """Wait for the copy, but not for work that was enqueued after it."""
        if self._event is not None:
            self._event.synchronize()
        return self

    @functools.cached_property
    def numbers(self) -> Numbers:
        """``cells`` as an array in the same memory; small sums of it are faster than torch's."""
        return self.cells.numpy()

    @property
    def beta(self) -> float:
        """The candidate's norm."""
        return math.sqrt(max(float(self.numbers[-1, -3]), 0.0))

    @property
    def T(self) -> Tensor:
        """(size + 1, size + 1); the candidate's row is last."""
        return self.cells[:, : self.size + 1]
