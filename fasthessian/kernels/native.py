"""The kernel contract by the C++ extension (csrc/): CPU tensors, SIMD and OpenMP."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch  # before the extension, so that both share torch's OpenMP runtime
from torch import Tensor

from fasthessian.kernels.contract import check_block, check_pack, check_stream

NAME = "native"

_native: Any = None
_reason: str | None = None
try:
    _native = importlib.import_module("fasthessian._native")
except ImportError as error:
    _reason = str(error)
    if "FASTHESSIAN_ISA" not in _reason:
        _reason = (
            f"the extension is not built ({error}); install a C++17 compiler, then reinstall "
            "fasthessian"
        )


def unavailable() -> str | None:
    """Why this backend cannot serve here; None when it can."""
    return _reason


def supports(device: torch.device) -> bool:
    """Whether tensors on ``device`` are served."""
    return device.type == "cpu"


def describe() -> str:
    """The instruction set in use, those that could be, and what CUDA said if compiled in."""
    cuda = "built without CUDA"
    if hasattr(_native, "cuda"):
        devices, runtime, driver, reason = _native.cuda()
        cuda = f"built with CUDA {runtime // 1000}.{runtime % 1000 // 10}, "
        cuda += "no NVIDIA driver" if driver == 0 else reason or f"{devices} devices"
    return f"{_native.isa()} of {', '.join(_native.isas())}; {cuda}"


def _small(matrix: Tensor) -> Tensor:
    return matrix.to(torch.float64).contiguous()


def project_(V: Tensor, W: Tensor, H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``W -= H^T V`` if H is given, then return ``C = V W^T`` (k, b) and ``G = W W^T`` (b, b)."""
    check_block(V, W, H)
    (k, n), b = V.shape, W.shape[0]
    C = torch.empty(k, b, dtype=torch.float64)
    G = torch.empty(b, b, dtype=torch.float64)
    h = None if H is None else _small(H)
    _native.project(
        V.data_ptr(), V.stride(0), V.dtype is torch.float64, k, n,
        W.data_ptr(), W.stride(0), W.dtype is torch.float64, b,
        0 if h is None else h.data_ptr(), 0, C.data_ptr(), G.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return C, G


def update_(V: Tensor, W: Tensor, H: Tensor, S: Tensor | None = None) -> Tensor:
    """``W = S (W - H^T V)``: project_ without the dots; S (b, b) mixes rows, default identity."""
    check_block(V, W, H, S)
    (k, n), b = V.shape, W.shape[0]
    h, s = _small(H), None if S is None else _small(S)
    _native.project(
        V.data_ptr(), V.stride(0), V.dtype is torch.float64, k, n,
        W.data_ptr(), W.stride(0), W.dtype is torch.float64, b,
        h.data_ptr(), 0 if s is None else s.data_ptr(), 0, 0, torch.get_num_threads(),
    )  # fmt: skip
    return W


def signs_(out: Tensor, seed: int, offset: int = 0) -> Tensor:
    """Fill out (n,) with +-1: element i is bit ``offset + i`` of the stream (set bit: -1)."""
    check_stream(out, seed, offset)
    _native.signs(
        out.data_ptr(), out.dtype is torch.float64, out.numel(), seed, offset,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def normal_(out: Tensor, seed: int, offset: int = 0) -> Tensor:
    """Fill out (n,) with N(0, 1) by Box-Muller in float64: two words give two elements."""
    check_stream(out, seed, offset)
    _native.normal(
        out.data_ptr(), out.dtype is torch.float64, out.numel(), seed, offset,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def pack_(out: Tensor, tensors: Sequence[Tensor], alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """``out = beta * out + alpha * concat(tensors)``; beta = 0 does not read out."""
    check_pack(out, tensors)
    pieces = [tensor.detach().contiguous() for tensor in tensors]
    _native.pack(
        out.data_ptr(), out.dtype is torch.float64,
        [piece.data_ptr() for piece in pieces], [piece.numel() for piece in pieces],
        alpha, beta, torch.get_num_threads(),
    )  # fmt: skip
    return out
