"""What a Lanczos run writes down on its device, and its way to the host without a stop."""

from __future__ import annotations

import torch
from torch import Tensor


class Ledger:
    """T, the gauges and the counter of a run of at most m rows, on the operator's device.

    Attributes:
        T: (m + 1, m + 1) float64; rows and columns up to the last final row are V H V^T, the row
            behind them holds the couplings of the candidate (over its norm in dcgs2).
        gauges: (m + 1, 3) float64; per row the candidate's |u|^2, its part outside the basis, and
            how far q_i'H q_j and q_j'H q_i differ at most.
        counter: (2,) int64, advanced on the device: [rows made, the row being made].
    """

    def __init__(self, m: int, device: torch.device) -> None:
        self.cells = torch.zeros(m + 1, m + 4, dtype=torch.float64, device=device)
        self.T, self.gauges = self.cells[:, : m + 1], self.cells[:, m + 1 :]
        self.counter = torch.zeros(2, dtype=torch.int64, device=device)

    def write(self, j: int, column: Tensor, nu2: Tensor) -> None:
        """Row j of cgs2: its dots with rows 0..j, and the squared norm of the next candidate."""
        T, gauges = self.T, self.gauges
        if j:
            gauges[j, 2] = (column[:j] - T[j, :j]).abs().max()
        T[:j, j] = T[j, :j]
        T[j, j] = column[j]
        T[j + 1, : j + 1] = 0.0
        T[j + 1, j] = nu2.clamp(min=0).sqrt()
        gauges[j + 1, :2] = nu2
        gauges[j + 1, 2] = 0.0

    def candidate(self, size: int, norm2: Tensor | float) -> None:
        """Note the squared norm of the candidate behind ``size`` rows."""
        self.gauges[size, :2] = norm2
        self.gauges[size, 2] = 0.0

    def rewrite(self, T: Tensor) -> None:
        """Start again from T (size + 1, size + 1), candidate's row included."""
        self.cells.zero_()
        self.T[: len(T), : len(T)] = T.to(self.T.device)
        self.counter.fill_(len(T) - 1)


class State:
    """The ledger up to the row behind ``size`` rows, copied behind the work enqueued so far.

    That row is the candidate's, or with ``final`` that of a candidate that was made a row since.
    """

    def __init__(self, ledger: Ledger, size: int, final: bool = False) -> None:
        self.size, self.final = size, final
        cells = ledger.cells[: size + 1]
        self._event: torch.cuda.Event | None = None
        if cells.device.type == "cuda":
            self._cells = torch.empty(cells.shape, dtype=cells.dtype, device="cpu", pin_memory=True)
            self._cells.copy_(cells, non_blocking=True)
            self._event = torch.cuda.current_stream(cells.device).record_event()
        else:
            self._cells = cells.clone()

    def wait(self) -> State:
        """Wait for the copy - for nothing that was enqueued after it."""
        if self._event is not None:
            self._event.synchronize()
        return self

    @property
    def T(self) -> Tensor:
        """(size + 1, size + 1), candidate's row last."""
        return self._cells[:, : self.size + 1]

    @property
    def gauges(self) -> Tensor:
        """(size + 1, 3), candidate's row last."""
        return self._cells[:, -3:]
