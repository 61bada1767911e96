"""Checks of the arguments of the kernel contract, shared by all backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasthessian.errors import InputError

FLOATS = (torch.float32, torch.float64)
STORED = (*FLOATS, torch.float16)  # dtypes that a basis V may be stored in
MAX_BLOCK = 8
CANCELLED = 1e-4  # u is linearly dependent if a smaller share of |u|^2 is outside the basis

Count = int | Tensor | None  # number of rows of V that take part; the kernel reads a tensor


def _rows(name: str, rows: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if rows.dim() != 2 or rows.dtype not in dtypes:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(
            f"{name} must be a 2-D {accepted} tensor of rows, "
            f"got shape {tuple(rows.shape)} of {rows.dtype}"
        )
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise InputError(
            f"{name} must have unit stride along its rows, got strides {rows.stride()}; "
            f"pass {name}.contiguous()"
        )


def _count(count: Count, most: int, like: Tensor, cells: int = 1) -> None:
    if isinstance(count, Tensor):
        if count.dtype != torch.int64 or count.numel() != cells or count.device != like.device:
            raise InputError(
                f"count must be an int64 tensor of {cells} on {like.device}, got "
                f"{count.numel()} of {count.dtype} on {count.device}"
            )
        if count.device.type != "cpu":
            return  # reading it would wait for the device; kernels stay within V's rows
        count = int(count.flatten()[0])
    if count is not None and not 0 <= count <= most:
        raise InputError(f"count must be in 0..{most}, got {count}")


def _smalls(V: Tensor, smalls: Sequence[tuple[str, Tensor | None, tuple[int, ...]]]) -> None:
    for name, small, shape in smalls:
        if small is None:
            continue
        if tuple(small.shape) != shape:
            raise InputError(f"{name} must have shape {shape}, got {tuple(small.shape)}")
        if small.device != V.device:
            raise InputError(f"V is on {V.device} but {name} is on {small.device}; move one")


def check_block(
    V: Tensor,
    W: Tensor,
    H: Tensor | None,
    S: Tensor | None = None,
    count: Count = None,
    append: float | None = None,
) -> None:
    """Raise ValueError unless V (k, n), W (b, n), H (k, b), S (b, b) and count fit the contract."""
    _rows("V", V, STORED)
    _rows("W", W, FLOATS)
    k, n = V.shape
    b = W.shape[0]
    if W.shape[1] != n:
        raise InputError(f"V and W must have rows of one length, got {n} and {W.shape[1]}")
    if not 1 <= b <= MAX_BLOCK:
        raise InputError(f"W must have 1 to {MAX_BLOCK} rows, got {b}; split the block")
    if W.device != V.device:
        raise InputError(f"V is on {V.device} but W is on {W.device}; move one")
    _smalls(V, (("H", H, (k, b)), ("S", S, (b, b))))
    if append is None:
        _count(count, k, V)
    elif count is None:
        raise InputError("append needs count, the index of the free row of V")
    else:
        _count(count, k - 1, V)


def check_recurrence(C: Tensor, G: Tensor, T: Tensor, gauges: Tensor, count: int | Tensor) -> None:
    """Raise ValueError unless C (k, 2), G (2, 2), T (m + 1, m + 1) and gauges (m + 1, 3) fit."""
    m = T.shape[0] - 1
    _smalls(
        C,
        (
            ("C", C, (C.shape[0], 2)),
            ("G", G, (2, 2)),
            ("T", T, (m + 1, m + 1)),
            ("gauges", gauges, (m + 1, 3)),
        ),
    )
    for name, small in (("C", C), ("G", G), ("T", T), ("gauges", gauges)):
        if small.dtype != torch.float64 or small.stride(-1) != 1:
            raise InputError(
                f"{name} must be float64 with unit stride along its rows, got {small.dtype} "
                f"with strides {small.stride()}"
            )
    _count(count, min(C.shape[0], m - 1), C, cells=2)


def check_stream(out: Tensor, seed: int, offset: int) -> None:
    """Raise unless ``out`` is a contiguous float vector, seed has 64 bits and offset 62 bits."""
    if out.dim() != 1 or out.dtype not in FLOATS or not out.is_contiguous():
        raise InputError(
            f"out must be a contiguous 1-D float32 or float64 tensor, "
            f"got shape {tuple(out.shape)} of {out.dtype}"
        )
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must be in [0, 2**64), got {seed}")
    if not 0 <= offset < 2**62:
        raise InputError(f"offset must be in [0, 2**62), got {offset}")


def check_pack(out: Tensor, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError unless ``tensors`` fill the flat vector ``out`` exactly."""
    if out.dim() != 1 or out.dtype not in FLOATS or not out.is_contiguous():
        raise InputError(
            f"out must be a contiguous 1-D float32 or float64 tensor, "
            f"got shape {tuple(out.shape)} of {out.dtype}"
        )
    total = 0
    for tensor in tensors:
        total += tensor.numel()
        if tensor.dtype != out.dtype or tensor.device != out.device:
            raise InputError(
                f"tensors must be {out.dtype} on {out.device} like out, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if total != out.numel():
        raise InputError(f"tensors hold {total} numbers but out has room for {out.numel()}")


def check_softmax(U: Tensor, Z: Tensor, scale: Tensor) -> None:
    """Raise ValueError unless U and Z (o, c, i) and scale (o, i) fit and are contiguous."""
    if U.dim() != 3 or U.dtype not in FLOATS:
        raise InputError(
            f"U must be a float32 or float64 tensor (outer, classes, inner), got shape "
            f"{tuple(U.shape)} of {U.dtype}; give a matrix of rows as (rows, classes, 1)"
        )
    rows = (U.shape[0], U.shape[2])
    for name, tensor, shape, dtype in (
        ("U", U, tuple(U.shape), U.dtype),
        ("Z", Z, tuple(U.shape), U.dtype),
        ("scale", scale, rows, torch.float64),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != U.device:
            raise InputError(
                f"{name} must have shape {shape} of {dtype} on {U.device} to fit U, got "
                f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise InputError(
                f"{name} must be contiguous, got strides {tensor.stride()}; "
                f"pass {name}.contiguous()"
            )
