"""Where the rows of a Krylov basis are kept, and the two operations that pass over all of them.

* ``full``: rows of the operator's dtype on its device.
* ``compressed``: float16 rows times one scale, half the memory and half the traffic of float32.
  Entries of a unit vector are about n^(-1/2). They are stored times n^(1/2), so that float16 rounds
  them to 2^-12 of their size (measured: orthogonality 2e-4 after 100 steps). CB-GMRES of Ginkgo
  (Aliaga, Anzt, Grutzmacher, Quintana-Orti, Tomas 2020) compresses its basis in the same way.
* ``offload``: rows in pinned host memory. They pass through two buffers on the GPU: while the
  kernels work on one, the other is filled.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fasthessian.errors import InputError, InputTypeError, InsufficientMemoryError
from fasthessian.kernels.contract import MAX_BLOCK, Count
from fasthessian.krylov.space import Space
from fasthessian.memory import available_bytes, readable
from fasthessian.vectors import ALIGN, stride_bytes

FORMATS = ("full", "compressed", "offload")
LARGEST = 65504.0  # of float16
# Bytes of V that are rotated at a time. That bounds the memory beside V; smaller tiles would stay
# in cache, but where another job runs, each of their many parallel regions waits for a thread.
TILE = 128 << 20


class Basis:
    """Rows of a basis in one tensor ``stored`` (rows, width), V = stored / scale.

    ``dots`` and ``update_`` pass over the stored rows: dots come out, and coefficients go in, in
    the units of the stored rows (see ``components``).
    """

    def __init__(self, stored: Tensor, scale: float, space: Space) -> None:
        self.stored, self.scale, self.space = stored, scale, space

    @property
    def graphable(self) -> bool:
        """Whether ``dots`` and ``update_`` can be captured in a CUDA graph."""
        return True

    def components(self, C: Tensor) -> Tensor:
        """From dots C to the H with which ``update_`` subtracts ``V^T V w``."""
        return C / self.scale**2

    def dots(self, W: Tensor, H: Tensor | None = None, *, count: Count) -> tuple[Tensor, Tensor]:
        """``Space.dots`` over the first ``count`` rows."""
        return self.space.dots(self.stored, W, H, count=count)

    def update_(
        self,
        W: Tensor,
        H: Tensor,
        S: Tensor | None = None,
        *,
        count: Count,
        append: bool = False,
    ) -> None:
        """``kernels.update_`` over the first ``count`` rows; ``append`` makes row ``count``."""
        scale = self.scale if append else None
        self.space.kernels.update_(self.stored, W, H, S, count=count, append=scale)

    def project_out_(self, w: Tensor, *, count: int) -> None:
        """Subtract from w (1, n) its parts along the first ``count`` rows."""
        C, _ = self.dots(w, count=count)
        self.update_(w, self.components(C), count=count)

    def store(self, row: int, v: Tensor) -> None:
        """Make v (n,) the row ``row``."""
        self.stored[row].copy_(v * self.scale)

    def rotate(self, S: Tensor, out: Tensor | None = None) -> None:
        """Write ``S^T V`` for S (size, p) to out (p, n); without out to the first p rows.

        That is ``update_`` of zeros by -S: V is read once, and sums are taken in float64.
        """
        size, p = S.shape
        H = S.to(self._device) * (-1.0 if out is None else -1.0 / self.scale)
        width = max(1, TILE // (size * self.stored.element_size()) // ALIGN) * ALIGN
        n, dtype = self.stored.shape[1], self.space.dtype
        buffer = torch.empty(p, min(width, n), dtype=dtype, device=self._device)
        for start in range(0, n, width):
            columns = slice(start, start + width)
            V = self.stored[:size, columns].to(self._device)
            W = (buffer[:, : V.shape[1]] if out is None else out[:, columns]).zero_()
            for first in range(0, p, MAX_BLOCK):
                block = slice(first, first + MAX_BLOCK)
                self.space.kernels.update_(V, W[block], H[:, block].contiguous())
            if out is None:
                self.stored[:p, columns].copy_(W)

    @property
    def _device(self) -> torch.device:
        return self.stored.device


class Offloaded(Basis):
    """Rows in host memory; each pass copies them through two buffers of ``chunk`` rows."""

    def __init__(self, stored: Tensor, space: Space, chunk: int) -> None:
        super().__init__(stored, 1.0, space)
        self._chunk = chunk
        # one row more than is copied: the finished row is made there
        self._buffers = [space.rows(chunk + 1) for _ in range(2)]
        self._copies: torch.cuda.Stream | None = None
        if space.device.type == "cuda":
            self._copies = torch.cuda.Stream(space.device)  # type: ignore[no-untyped-call]
        self._used: list[torch.cuda.Event | None] = [None, None]

    @property
    def graphable(self) -> bool:
        """Never: the number of copies grows with the basis."""
        return False

    @property
    def _device(self) -> torch.device:
        return self.space.device

    def dots(self, W: Tensor, H: Tensor | None = None, *, count: Count) -> tuple[Tensor, Tensor]:
        """One pass without H; two with H, because all rows are subtracted before the dots."""
        if H is not None:
            self.update_(W, H, count=count)
        C = torch.zeros(self.stored.shape[0], W.shape[0], dtype=torch.float64, device=W.device)
        G = None
        for buffer, first, rows in self._chunks(_known(count)):
            part, G = self.space.dots(buffer, W, count=rows)
            C[first : first + rows] = part[:rows]
        if G is None:
            G = self.space.gram(W)
        return C, G

    def update_(
        self,
        W: Tensor,
        H: Tensor,
        S: Tensor | None = None,
        *,
        count: Count,
        append: bool = False,
    ) -> None:
        """The kernel's ``update_`` chunk by chunk; the last one mixes by S and appends."""
        total = _known(count)
        chunks = list(range(0, total, self._chunk)) or [0]
        part = torch.zeros(self._chunk + 1, W.shape[0], dtype=torch.float64, device=W.device)
        for buffer, first, rows in self._chunks(total) if total else [(self._buffers[0], 0, 0)]:
            part[:rows] = H[first : first + rows]
            last = first == chunks[-1]
            self.space.kernels.update_(
                buffer, W, part, S if last else None, count=rows,
                append=1.0 if last and append else None,
            )  # fmt: skip
            if last and append:
                self.stored[total].copy_(buffer[rows], non_blocking=True)

    def _chunks(self, total: int) -> Iterator[tuple[Tensor, int, int]]:
        """(buffer, first row, rows); each is copied while the kernels work on the other one."""
        starts = range(0, total, self._chunk)
        if self._copies is not None:  # the work so far appends rows and reads the buffers
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
        arrived = [self._fetch(i % 2, start, total) for i, start in enumerate(starts[:1])]
        for i, start in enumerate(starts):
            if i + 1 < len(starts):
                arrived.append(self._fetch((i + 1) % 2, starts[i + 1], total))
            event = arrived[i]
            if event is not None:
                torch.cuda.current_stream(self._device).wait_event(event)
            yield self._buffers[i % 2], start, min(self._chunk, total - start)
            if self._copies is not None:
                self._used[i % 2] = torch.cuda.current_stream(self._device).record_event()

    def _fetch(self, which: int, start: int, total: int) -> torch.cuda.Event | None:
        """Enqueue the copy of rows from ``start`` on into a buffer, after its last reader."""
        rows = min(self._chunk, total - start)
        stream = self._copies
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            used = self._used[which]
            if stream is not None and used is not None:
                stream.wait_event(used)
            source = self.stored[start : start + rows]
            self._buffers[which][:rows].copy_(source, non_blocking=True)
            return stream.record_event() if stream is not None else None


def _known(count: Count) -> int:
    if not isinstance(count, int):
        raise InputTypeError(f"an offloaded basis needs its count on the host, got {count!r}")
    return count


def allocate(kind: str, rows: int, space: Space, extra_vectors: int = 0) -> Basis:
    """A basis of ``rows`` rows in one of FORMATS, if it fits together with ``extra_vectors``.

    Raises:
        ValueError: an unknown format, or ``offload`` for an operator that is not on a GPU.
        MemoryError: it does not fit; the message says what would.
    """
    device = space.device
    if kind not in FORMATS:
        raise InputError(f"basis must be one of {', '.join(FORMATS)}, got {kind!r}")
    if kind == "offload" and device.type != "cuda":
        raise InputError(
            f"basis='offload' keeps the rows of a GPU's operator in host memory, but this operator "
            f"is on {device}; use 'full' or 'compressed'"
        )
    n, dtype = space.slice.width, space.dtype
    stored = torch.float16 if kind == "compressed" else dtype
    if kind == "offload":
        # at most 1 GiB each, and an eighth of the free memory of the GPU
        room = min(1 << 30, available_bytes(device) // 8)
        chunk = max(1, min(rows, room // stride_bytes(n, dtype) - 1))
        check_room(kind, rows, n, dtype, dtype, torch.device("cpu"), device, 0)
        check_room(kind, 2 * (chunk + 1), n, dtype, dtype, device, device, 2 + extra_vectors)
        pinned = torch.empty(rows, n, dtype=dtype, device="cpu", pin_memory=True)
        return Offloaded(pinned, space, chunk)
    check_room(kind, rows, n, stored, dtype, device, device, 2 + extra_vectors)
    scale = min(math.sqrt(space.n), LARGEST) if kind == "compressed" else 1.0
    return Basis(space.rows(rows, stored), scale, space)


def check_room(
    kind: str,
    rows: int,
    n: int,
    stored: torch.dtype,
    dtype: torch.dtype,
    where: torch.device,
    device: torch.device,
    vectors: int,
) -> None:
    """MemoryError unless ``rows`` rows of the ``stored`` type fit into the memory of ``where``.

    ``vectors`` of the operator's ``dtype`` must fit, too: the candidate, its product, results.
    """
    row, free = stride_bytes(n, stored), available_bytes(where)
    extra, pinned = vectors * stride_bytes(n, dtype), kind == "offload" and where.type == "cpu"
    needs = _pinned(rows * row) if pinned else rows * row + extra
    if needs <= free:
        return
    ways = []
    half = rows * stride_bytes(n, torch.float16) + extra
    if kind == "full" and half <= free:
        ways.append(f"basis='compressed' needs {readable(half)}")
    if kind in ("full", "compressed") and device.type == "cuda":
        away, host = _pinned(rows * stride_bytes(n, dtype)), available_bytes(torch.device("cpu"))
        if away <= host:
            ways.append(
                f"basis='offload' needs {readable(away)} of the {readable(host)} of the host"
            )
    room = _pinned(free + 1) // 2 if pinned else free - extra
    if room >= row and (kind in ("full", "compressed") or pinned):
        rows_fit = "1 row" if room < 2 * row else f"{room // row} rows"
        ways.append(f"{rows_fit} would fit (fewer steps or pairs, or a smaller ncv)")
    ways = ways or ["use a machine with more memory"]
    raise InsufficientMemoryError(
        f"the basis of {rows} rows of {n} {str(stored).removeprefix('torch.')} numbers needs "
        f"{readable(needs)} on {where}, {readable(free)} are free; {', or '.join(ways)}"
    )


def _pinned(size: int) -> int:
    """What torch allocates for a pinned block of so many bytes: the next power of two."""
    return 1 << (size - 1).bit_length()
