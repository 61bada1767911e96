"""The C++ extension, csrc/bindings.cpp: addresses, strides and sizes of tensors, all as numbers.

Types are those of `native.TYPES`. The last arguments say where to work: a number of threads, or a
device and a stream.
"""

# fmt: off
from collections.abc import Sequence

class _Cpu:
    def workspace(
        self, v: int, ldv: int, vtype: int, k: int, n: int, w: int, ldw: int, wtype: int, b: int,
        h: int, count_at: int, count: int, threads: int, /,
    ) -> int: ...
    def project(
        self, v: int, ldv: int, vtype: int, k: int, n: int, w: int, ldw: int, wtype: int, b: int,
        h: int, count_at: int, count: int, workspace: int, c: int, g: int, threads: int, /,
    ) -> None: ...
    def update(
        self, v: int, ldv: int, vtype: int, k: int, n: int, w: int, ldw: int, wtype: int, b: int,
        h: int, count_at: int, count: int, s: int, append: bool, scale: float, threads: int, /,
    ) -> None: ...
    def recur(
        self, c: int, ldc: int, g: int, ldg: int, t: int, ldt: int, gauges: int, ldgauges: int,
        k: int, m: int, count_at: int, count: int, scale: float, h: int, s: int, threads: int, /,
    ) -> None: ...
    def signs(
        self, out: int, type: int, n: int, seed: int, offset: int, threads: int, /,
    ) -> None: ...
    def normal(
        self, out: int, type: int, n: int, seed: int, offset: int, threads: int, /,
    ) -> None: ...
    def pack(
        self, out: int, type: int, pieces: Sequence[int], sizes: Sequence[int], alpha: float,
        beta: float, threads: int, /,
    ) -> None: ...
    def softmax_curvature(
        self, u: int, z: int, type: int, outer: int, classes: int, inner: int, scale: int,
        threads: int, /,
    ) -> None: ...

class _Cuda:
    def workspace(
        self, v: int, ldv: int, vtype: int, k: int, n: int, w: int, ldw: int, wtype: int, b: int,
        h: int, count_at: int, count: int, device: int, stream: int, /,
    ) -> int: ...
    def project(
        self, v: int, ldv: int, vtype: int, k: int, n: int, w: int, ldw: int, wtype: int, b: int,
        h: int, count_at: int, count: int, workspace: int, c: int, g: int, device: int,
        stream: int, /,
    ) -> None: ...
    def update(
        self, v: int, ldv: int, vtype: int, k: int, n: int, w: int, ldw: int, wtype: int, b: int,
        h: int, count_at: int, count: int, s: int, append: bool, scale: float, device: int,
        stream: int, /,
    ) -> None: ...
    def recur(
        self, c: int, ldc: int, g: int, ldg: int, t: int, ldt: int, gauges: int, ldgauges: int,
        k: int, m: int, count_at: int, count: int, scale: float, h: int, s: int, device: int,
        stream: int, /,
    ) -> None: ...
    def signs(
        self, out: int, type: int, n: int, seed: int, offset: int, device: int, stream: int, /,
    ) -> None: ...
    def normal(
        self, out: int, type: int, n: int, seed: int, offset: int, device: int, stream: int, /,
    ) -> None: ...
    def pack(
        self, out: int, type: int, pieces: Sequence[int], sizes: Sequence[int], alpha: float,
        beta: float, device: int, stream: int, /,
    ) -> None: ...
    def softmax_curvature(
        self, u: int, z: int, type: int, outer: int, classes: int, inner: int, scale: int,
        device: int, stream: int, /,
    ) -> None: ...

cpu: _Cpu
cuda: _Cuda  # only in a build with CUDA, like the functions cuda_*

def isa() -> str:
    """The instruction set in use."""

def isas() -> list[str]:
    """The instruction sets that this processor has kernels for."""

def cuda_state() -> tuple[int, int, int, str | None]:
    """The number of devices, the versions of runtime and driver, and the error if there is one."""

def cuda_chip(device: int, /) -> int:
    """10 major + minor of the device's chip; 0 without kernels for it; minus an error's number."""

def cuda_error(error: int, /) -> str:
    """The text of an error's number."""
