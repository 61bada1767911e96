"""The kernel contract in C++ (csrc/): SIMD and OpenMP on the CPU, CUDA on GPUs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch  # before the extension, so that both use torch's OpenMP runtime
from torch import Tensor

from fasthessian.kernels.contract import (
    Count,
    check_block,
    check_pack,
    check_recurrence,
    check_softmax,
    check_stream,
)

NAME = "native"
TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2}  # FhType in csrc/cpu/kernels.h

_reason: str | None = None
try:
    import fasthessian._native as _native
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _reason = str(error)
    if "FASTHESSIAN_ISA" not in _reason:
        _reason = (
            f"the extension is not built ({error}); install a C++17 compiler, then reinstall "
            "fasthessian"
        )


def unavailable(device: torch.device | str = "cpu") -> str | None:
    """Why this backend cannot serve tensors on ``device``; None when it can."""
    device = torch.device(device)
    if _reason is not None or device.type == "cpu":
        return _reason
    if device.type != "cuda":
        return f"it does not serve {device.type}"
    return _no_cuda() or _no_chip(
        torch.cuda.current_device() if device.index is None else device.index
    )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def _no_cuda() -> str | None:
    if not hasattr(_native, "cuda"):
        return "built without CUDA; reinstall with FASTHESSIAN_CUDA=1 and nvcc on PATH"
    devices, runtime, driver, reason = _native.cuda_state()
    if driver == 0:
        return "no NVIDIA driver"
    if driver < runtime and reason is not None:
        return (
            f"the driver's CUDA {_version(driver)} is older than the {_version(runtime)} that "
            "the kernels were built with; Triton's do not need it"
        )
    if reason is not None or devices == 0:
        return str(reason or "no CUDA device")
    return None if torch.cuda.is_available() else "this torch sees no CUDA device"


@functools.cache
def _no_chip(index: int) -> str | None:
    with torch.cuda.device(index):
        chip = _native.cuda_chip(index)
    if chip > 0:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    why = _native.cuda_error(-chip) if chip else "no code for its chip was built"
    return f"device {index} (sm_{major}{minor}): {why}; Triton compiles for the chip it finds"


def describe() -> str:
    """The instruction set in use, the available ones, and the state of CUDA if compiled in."""
    if _native is None:
        return "not built"
    cuda = "built without CUDA"
    if hasattr(_native, "cuda"):
        devices, runtime, _, _ = _native.cuda_state()
        cuda = f"built with CUDA {_version(runtime)}, " + (_no_cuda() or f"{devices} devices")
    return f"{_native.isa()} of {', '.join(_native.isas())}; {cuda}"


class _OtherDevice:
    """The CUDA functions for another device, which is the current one during each call."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __getattr__(self, name: str) -> Any:
        call = getattr(_native.cuda, name)

        def guarded(*args: Any) -> Any:
            with torch.cuda.device(self._index):
                return call(*args)

        return guarded


def _entry(tensor: Tensor) -> tuple[Any, tuple[int, ...]]:
    """The functions for a tensor's device, and their last arguments: threads, or device, stream."""
    if tensor.device.type == "cpu":
        return _native.cpu, (torch.get_num_threads(),)
    index = tensor.device.index
    entry = _native.cuda if index == torch.cuda.current_device() else _OtherDevice(index)
    return entry, (index, torch.cuda.current_stream(index).cuda_stream)


def _count(count: Count, rows: int, entry: Any) -> tuple[int, int]:
    """(address, number) for the count of rows; a GPU reads the count at the address, if not 0."""
    if isinstance(count, Tensor):
        return (0, int(count)) if entry is _native.cpu else (count.data_ptr(), 0)
    return 0, rows if count is None else count


def _small(matrix: Tensor) -> Tensor:
    return matrix.to(torch.float64).contiguous()


def _block(V: Tensor, W: Tensor, h: Tensor | None, count: Count, entry: Any) -> tuple[int, ...]:
    k, n = V.shape
    given = 0
    if h is not None:
        given = h.data_ptr() or W.data_ptr()  # H without rows has no address and is not read
    return (
        V.data_ptr(), V.stride(0), TYPES[V.dtype], k, n,
        W.data_ptr(), W.stride(0), TYPES[W.dtype], W.shape[0],
        given, *_count(count, k, entry),
    )  # fmt: skip


def project_(
    V: Tensor, W: Tensor, H: Tensor | None = None, *, count: Count = None
) -> tuple[Tensor, Tensor]:
    """``W -= H^T V`` if H is given, then return ``C = V W^T`` (k, b) and ``G = W W^T`` (b, b)."""
    check_block(V, W, H, count=count)
    entry, place = _entry(V)
    k, b = V.shape[0], W.shape[0]
    h = None if H is None else _small(H)
    block = _block(V, W, h, count, entry)
    C = torch.empty(k, b, dtype=torch.float64, device=V.device)
    G = torch.empty(b, b, dtype=torch.float64, device=V.device)
    size = entry.workspace(*block, *place)
    work = torch.empty(size, dtype=torch.float64, device=V.device) if size else None
    place_of_work = 0 if work is None else work.data_ptr()
    entry.project(*block, place_of_work, C.data_ptr(), G.data_ptr(), *place)
    return C, G


def update_(
    V: Tensor,
    W: Tensor,
    H: Tensor,
    S: Tensor | None = None,
    *,
    count: Count = None,
    append: float | None = None,
) -> Tensor:
    """``W = S (W - H^T V)``: project_ without dot products. S (b, b) is by default the identity.

    With ``append``, row ``count`` of V becomes ``append`` times the first row of the result, and
    the first row of W becomes its last row. The other rows of W do not change.
    """
    check_block(V, W, H, S, count, append)
    entry, place = _entry(V)
    h, s = _small(H), None if S is None else _small(S)
    entry.update(
        *_block(V, W, h, count, entry), 0 if s is None else s.data_ptr(),
        append is not None, 1.0 if append is None else append, *place,
    )  # fmt: skip
    return W


def recur_(
    C: Tensor, G: Tensor, T: Tensor, gauges: Tensor, *, count: int | Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The scalars of one delayed Gram-Schmidt step of Lanczos: ``reference.recur_`` as a kernel."""
    check_recurrence(C, G, T, gauges, count)
    entry, place = _entry(C)
    at, made = (count.data_ptr(), 0) if isinstance(count, Tensor) else (0, count)
    k, m = C.shape[0], T.shape[0] - 1
    H = torch.empty(k, 2, dtype=torch.float64, device=C.device)
    S = torch.empty(2, 2, dtype=torch.float64, device=C.device)
    entry.recur(
        C.data_ptr(), C.stride(0), G.data_ptr(), G.stride(0), T.data_ptr(), T.stride(0),
        gauges.data_ptr(), gauges.stride(0), k, m, at, made, scale,
        H.data_ptr(), S.data_ptr(), *place,
    )  # fmt: skip
    return H, S


def signs_(out: Tensor, seed: int, offset: int = 0) -> Tensor:
    """Fill out (n,) with +-1: element i is bit ``offset + i`` of the stream (set bit: -1)."""
    check_stream(out, seed, offset)
    entry, place = _entry(out)
    entry.signs(out.data_ptr(), TYPES[out.dtype], out.numel(), seed, offset, *place)
    return out


def normal_(out: Tensor, seed: int, offset: int = 0) -> Tensor:
    """Fill out (n,) with N(0, 1) by Box-Muller in float64: two words give two elements."""
    check_stream(out, seed, offset)
    entry, place = _entry(out)
    entry.normal(out.data_ptr(), TYPES[out.dtype], out.numel(), seed, offset, *place)
    return out


def pack_(out: Tensor, tensors: Sequence[Tensor], alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """``out = beta * out + alpha * concat(tensors)``; with beta = 0, out is not read."""
    check_pack(out, tensors)
    entry, place = _entry(out)
    pieces = [tensor.detach().contiguous() for tensor in tensors]
    entry.pack(
        out.data_ptr(), TYPES[out.dtype],
        [piece.data_ptr() for piece in pieces], [piece.numel() for piece in pieces],
        alpha, beta, *place,
    )  # fmt: skip
    return out


def softmax_curvature_(U: Tensor, Z: Tensor, scale: Tensor) -> Tensor:
    """``u = scale (diag(p) - p p^T) u``, ``p = softmax(z)``: ``reference.softmax_curvature_``."""
    check_softmax(U, Z, scale)
    entry, place = _entry(U)
    entry.softmax_curvature(
        U.data_ptr(), Z.data_ptr(), TYPES[U.dtype], *U.shape, scale.data_ptr(), *place
    )
    return U
