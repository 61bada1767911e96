"""What every backend accepts: one validation for the arguments of the kernel contract."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)
MAX_BLOCK = 8


def _rows(name: str, rows: Tensor) -> None:
    if rows.dim() != 2 or rows.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be a 2-D float32 or float64 tensor of rows, "
            f"got shape {tuple(rows.shape)} of {rows.dtype}"
        )
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise ValueError(
            f"{name} must have unit stride along its rows, got strides {rows.stride()}; "
            f"pass {name}.contiguous()"
        )


def check_block(V: Tensor, W: Tensor, H: Tensor | None, S: Tensor | None = None) -> None:
    """Raise ValueError unless V (k, n), W (b, n), H (k, b) and S (b, b) fit the contract."""
    _rows("V", V)
    _rows("W", W)
    k, n = V.shape
    b = W.shape[0]
    if W.shape[1] != n:
        raise ValueError(f"V and W must have rows of one length, got {n} and {W.shape[1]}")
    if not 1 <= b <= MAX_BLOCK:
        raise ValueError(f"W must have 1 to {MAX_BLOCK} rows, got {b}; split the block")
    for name, small, shape in (("H", H, (k, b)), ("S", S, (b, b))):
        if small is not None and tuple(small.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(small.shape)}")
    for name, other in (("W", W), ("H", H), ("S", S)):
        if other is not None and other.device != V.device:
            raise ValueError(f"V is on {V.device} but {name} is on {other.device}; move one")


def check_stream(out: Tensor, seed: int, offset: int) -> None:
    """Raise unless ``out`` is a contiguous float vector and seed and offset fit 64 and 62 bits."""
    if out.dim() != 1 or out.dtype not in FLOATS or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous 1-D float32 or float64 tensor, "
            f"got shape {tuple(out.shape)} of {out.dtype}"
        )
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    if not 0 <= offset < 2**62:
        raise ValueError(f"offset must be in [0, 2**62), got {offset}")


def check_pack(out: Tensor, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError unless ``tensors`` fill the flat vector ``out`` exactly."""
    if out.dim() != 1 or out.dtype not in FLOATS or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous 1-D float32 or float64 tensor, "
            f"got shape {tuple(out.shape)} of {out.dtype}"
        )
    total = 0
    for tensor in tensors:
        total += tensor.numel()
        if tensor.dtype != out.dtype or tensor.device != out.device:
            raise ValueError(
                f"tensors must be {out.dtype} on {out.device} like out, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if total != out.numel():
        raise ValueError(f"tensors hold {total} numbers but out has room for {out.numel()}")
