"""The kernel contract in Triton, for NVIDIA and AMD GPUs, and for a CPU by Triton's interpreter.

Triton is imported at first use. With ``TRITON_INTERPRET=1`` at that time, CPU tensors are served.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import itertools
import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasthessian.kernels import reference
from fasthessian.kernels.contract import (
    Count,
    check_block,
    check_pack,
    check_recurrence,
    check_softmax,
    check_stream,
)
from fasthessian.kernels.triton.tiles import (
    BOTH,
    DOTS,
    THREADS,
    UPDATE,
    Tile,
    logits_tile,
    power,
    tile,
)

NAME = "triton"
OLDEST = (3, 6)
CHUNK_BYTES = 1 << 16  # of W per program; must fit L1, since it is read again per BK rows of V
STEPS = 8  # maximum of tiles per program of project, which share one sum across threads
SUM_OUTPUTS = 8  # sums over chunks per program, which reads 64 bytes of every chunk
PROGRAMS = 4  # maximum of programs in the interpreter, where each takes milliseconds
PACKED = 4096  # numbers per program of pack
TABLES = 64  # maximum of cached pointer tables of pack


def unavailable(device: torch.device | str = "cpu") -> str | None:
    """Why this backend cannot serve tensors on ``device``; None when it can."""
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if device.type == "cpu":
        return None if _interpreted() else "CPU tensors need TRITON_INTERPRET=1 (slow, for tests)"
    if device.type != "cuda":  # also the name of ROCm's devices
        return f"it does not serve {device.type}"
    if not torch.cuda.is_available():
        return "this torch sees no CUDA or ROCm device"
    if _interpreted():
        return "TRITON_INTERPRET=1 serves CPU tensors only; unset it"
    return _cannot_compile()


def _interpreted() -> bool:
    if "fasthessian.kernels.triton.rows" in sys.modules:
        return bool(_kernels()[0].INTERPRETED)
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _cannot_compile() -> str | None:
    try:
        version: str = importlib.import_module("triton").__version__
    except Exception as error:  # a broken installation may raise anything
        return f"Triton does not import ({type(error).__name__}: {error}); reinstall it"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers and numbers < OLDEST:  # a private build may have no version number
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST))}; pip install -U triton"
    named = os.environ.get("CC")
    if not any(map(shutil.which, [named] if named is not None else ["gcc", "clang"])):
        return "Triton builds its launcher with a C compiler, and finds none; put gcc on PATH"
    return None


def describe() -> str:
    """The version, and whether kernels are compiled or interpreted."""
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    try:
        version = importlib.import_module("triton").__version__
    except Exception as error:  # a broken installation may raise anything
        return f"does not import ({type(error).__name__}: {error})"
    return f"{version}, {'interpreted' if _interpreted() else 'compiled at first use'}"


@functools.cache
def _kernels() -> tuple[Any, ...]:
    names = ("rows", "vectors", "softmax")
    return tuple(importlib.import_module(f"fasthessian.kernels.triton.{name}") for name in names)


@functools.cache
def _hardware(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, threads in a warp)."""
    chip = torch.cuda.get_device_properties(device)
    return chip.multi_processor_count, getattr(chip, "warp_size", 32)


def _launch(kernel: Any, device: torch.device, programs: int, *args: Any, **options: Any) -> None:
    """Run ``programs`` programs on the current stream, each of THREADS or ``threads`` threads."""
    threads, registers = options.pop("threads", THREADS), options.pop("registers", None)
    if device.type != "cpu":
        options |= {"num_warps": threads // _hardware(device)[1], "num_stages": 1}
        if registers is not None and torch.version.hip is None:
            options["maxnreg"] = registers
    with _at(device):
        kernel[(programs,)](*args, **options)


def _at(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context that kernels run in. The interpreter's NumPy must not warn of NaN or overflow."""
    return np.errstate(all="ignore") if device.type == "cpu" else torch.cuda.device(device)


def _cut(V: Tensor, W: Tensor, kind: int) -> tuple[Tile, int]:
    """The tile, and the number of tiles per program of project."""
    shape, n = tile(V, W, kind), V.shape[1]
    if V.device.type == "cpu":
        groups = power(-(-n // (shape.F * PROGRAMS * 2)), 16)
        return shape._replace(T=groups, BK=4 * shape.BK), 2
    columns = shape.T * shape.F
    most = CHUNK_BYTES // (shape.B * columns * W.itemsize)
    if kind == BOTH:  # a program reads its columns of V twice, so they must fit L2
        most = shape.B // 4
    fair = n // (columns * 4 * _hardware(V.device)[0])
    return shape, max(1, min(most, STEPS, fair))


def _rows(A: Tensor, aligned: bool) -> tuple[Tensor, int, int]:
    """A, its leading dimension in units, and the unit in numbers: 16 bytes, or 1 if not aligned."""
    ld, unit = (A.stride(0) if A.shape[0] > 1 else 0), (16 // A.itemsize if aligned else 1)
    return A, ld // unit, unit


def _matrix(M: Tensor | None) -> tuple[Tensor | None, int, int]:
    if M is None:
        return None, 0, 0
    if M.dtype is torch.bfloat16:
        M = M.float()  # the interpreter would read its bits as an integer
    return M, M.stride(0), M.stride(1)


def project_(
    V: Tensor, W: Tensor, H: Tensor | None = None, *, count: Count = None
) -> tuple[Tensor, Tensor]:
    """``W -= H^T V`` if H is given, then return ``C = V W^T`` (k, b) and ``G = W W^T`` (b, b)."""
    check_block(V, W, H, count=count)
    if H is not None and torch.version.hip is not None:
        # on ROCm a barrier does not order stores to global memory: dot products need a new kernel
        update_(V, W, H, count=count)
        H = None
    (k, n), b, device = V.shape, W.shape[0], V.device
    streams = _kernels()[0]
    shape, steps = _cut(V, W, DOTS if H is None else BOTH)
    chunks = -(-n // (shape.T * shape.F * steps))
    live, on_device = k if count is None else count, isinstance(count, Tensor)
    (v, ldv, unit_v), (w, ldw, unit_w) = (_rows(A, shape.parts > 0) for A in (V, W))
    sums = torch.empty(k + b, b, dtype=torch.float64, device=device)
    parts = torch.empty(chunks, k + b, b, dtype=torch.float64, device=device)
    if chunks:
        _launch(
            streams.project, device, chunks,
            v, ldv, w, ldw, *_matrix(H), parts, live, k, b, n, steps,
            B=shape.B, BK=shape.BK, T=shape.T, F=shape.F, PARTS=shape.parts,
            UNIT_V=unit_v, UNIT_W=unit_w, ON_DEVICE=on_device, registers=shape.registers,
        )  # fmt: skip
    outputs, at_once = SUM_OUTPUTS, 512 if chunks > 64 else 32
    if device.type == "cpu":
        outputs, at_once = power(-(-sums.numel() // PROGRAMS)), 2
    _launch(
        streams.total, device, -(-sums.numel() // outputs),
        parts, sums, live, k, b, chunks, BC=at_once, BO=outputs, ON_DEVICE=on_device,
        threads=2 * THREADS,
    )  # fmt: skip
    return sums[:k], sums[k:]


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
    (k, n), b = V.shape, W.shape[0]
    shape, _ = _cut(V, W, UPDATE)
    (v, ldv, unit_v), (w, ldw, unit_w) = (_rows(A, shape.parts > 0) for A in (V, W))
    if n:
        _launch(
            _kernels()[0].update, V.device, -(-n // (shape.T * shape.F)),
            v, ldv, w, ldw, *_matrix(H), *_matrix(S), k if count is None else count, b, n,
            1.0 if append is None else append,
            B=shape.B, BK=shape.BK, T=shape.T, F=shape.F, PARTS=shape.parts,
            UNIT_V=unit_v, UNIT_W=unit_w, APPEND=append is not None,
            ON_DEVICE=isinstance(count, Tensor), registers=shape.registers,
        )  # fmt: skip
    return W


def recur_(
    C: Tensor, G: Tensor, T: Tensor, gauges: Tensor, *, count: int | Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The scalars of one delayed Gram-Schmidt step of Lanczos: ``reference.recur_`` as a kernel."""
    check_recurrence(C, G, T, gauges, count)
    k = C.shape[0]
    rows, threads = (16, 128) if T.shape[0] <= 256 else (8, 512)
    H = torch.empty(k, 2, dtype=torch.float64, device=C.device)
    S = torch.empty(2, 2, dtype=torch.float64, device=C.device)
    _launch(
        _kernels()[1].recur, C.device, 1,
        C, C.stride(0), G, T, T.stride(0), gauges, gauges.stride(0), count, k, 1 / scale, H, S,
        R=rows, L=threads, ON_DEVICE=isinstance(count, Tensor),
        threads=threads, registers=min(255, 65536 // threads),
    )  # fmt: skip
    return H, S


def _fill(kernel: Any, out: Tensor, seed: int, offset: int, per_block: int, blocks: int) -> Tensor:
    first, skip = divmod(offset, per_block)
    total = -(-(skip + out.numel()) // per_block)
    if out.device.type == "cpu":
        blocks = power(-(-total // PROGRAMS))
    if out.numel():
        args = (out, out.numel(), seed, first, skip)
        _launch(kernel, out.device, -(-total // blocks), *args, BLOCKS=blocks)
    return out


def signs_(out: Tensor, seed: int, offset: int = 0) -> Tensor:
    """Fill out (n,) with +-1: element i is bit ``offset + i`` of the stream (set bit: -1)."""
    check_stream(out, seed, offset)
    return _fill(_kernels()[1].signs, out, seed, offset, 128, 16)


def normal_(out: Tensor, seed: int, offset: int = 0) -> Tensor:
    """Fill out (n,) with N(0, 1) by Box-Muller in float64: two words give two elements."""
    check_stream(out, seed, offset)
    return _fill(_kernels()[1].normal, out, seed, offset, 4, 256)


_tables: OrderedDict[Any, tuple[Tensor, Tensor]] = OrderedDict()


def _table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """``numbers`` on the device without waiting: a cached copy, or a new one by pinned memory."""
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=torch.int64)
    key = (device, torch.cuda.current_stream(device), numbers)
    if key not in _tables:
        host = torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=True)
        _tables[key] = host, host.to(device, non_blocking=True)
        if len(_tables) > TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return _tables[key][1]


def pack_(out: Tensor, tensors: Sequence[Tensor], alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """``out = beta * out + alpha * concat(tensors)``; with beta = 0, out is not read."""
    check_pack(out, tensors)
    n, device = out.numel(), out.device
    if n == 0:
        return out
    pieces = [tensor.detach().contiguous() for tensor in tensors if tensor.numel()]
    ends = list(itertools.accumulate(piece.numel() for piece in pieces))
    bases = [
        piece.data_ptr() - (end - piece.numel()) * out.itemsize
        for piece, end in zip(pieces, ends, strict=True)
    ]
    with _at(device):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # each replay would read the table's host memory again, which may have been reused by
            # then; torch.cat passes its pointers by value
            flat = torch.cat([piece.view(-1) for piece in pieces])
            return reference.pack_(out, [flat], alpha, beta)
        table = _table((*bases, *ends), device)
    chunk, block = PACKED, 1024
    if device.type == "cpu":
        chunk = -(-n // PROGRAMS)
        block = power(chunk)
    _launch(
        _kernels()[1].pack, device, -(-n // chunk),
        out, table, len(pieces), n, chunk, alpha, beta, BN=block, ADD=beta != 0.0,
    )  # fmt: skip
    return out


def softmax_curvature_(U: Tensor, Z: Tensor, scale: Tensor) -> Tensor:
    """``u = scale (diag(p) - p p^T) u``, ``p = softmax(z)``: ``reference.softmax_curvature_``."""
    check_softmax(U, Z, scale)
    outer, classes, inner = U.shape
    if U.numel() == 0:
        return U
    flat = inner == 1
    line, numbers = classes if flat else inner, 16 // U.itemsize
    aligned = line % numbers == 0 and U.data_ptr() % 16 == 0 and Z.data_ptr() % 16 == 0
    unit = numbers if aligned else 1
    shape = logits_tile(U, unit, PROGRAMS if U.device.type == "cpu" else None)
    programs = -(-outer // shape.R) if flat else outer * -(-inner // shape.R)
    _launch(
        _kernels()[2].curvature, U.device, programs,
        U, Z, scale, outer, classes, line // unit,
        R=shape.R, T=shape.T, F=shape.F, UNIT=unit, FLAT=flat,
        threads=shape.threads, registers=shape.registers,
    )  # fmt: skip
    return U
