"""Flat vectors: named tensors as one contiguous row and back, and padded rows of a basis."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fasthessian import kernels
from fasthessian.errors import InputError, InputTypeError

ALIGN, PAGE = 64, 4096  # bytes: a cache line; the stride at which rows fall into the same cache set
LARGE = 4 << 20  # bytes from which the operating system is asked for pages of zeros


def real(t: Tensor) -> Tensor:
    """A complex tensor as real numbers, with a last dimension of 2; a real tensor unchanged."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def like(v: Tensor, p: Tensor) -> Tensor:
    """The ``real`` tensor v in the dtype of p, complex where p is."""
    if not p.is_complex():
        return v.to(p.dtype)
    # a view would need an even offset in v
    return torch.complex(*v.to(p.dtype.to_real()).unbind(-1))


class Layout:
    """Where each named tensor is in the flat vector of length n.

    A complex tensor is stored as ``torch.view_as_real``: its shape here ends in 2.

    Attributes: ``names``, ``shapes``, ``dims`` (of the tensors as given), ``n``, ``dtype``,
    ``device``.

    Example:
        >>> import torch
        >>> from fasthessian.vectors import Layout
        >>> layout = Layout({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
        >>> layout.n
        8
        >>> layout.unflatten(torch.arange(8.0))["bias"]
        tensor([6., 7.])
    """

    def __init__(self, named: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
        """``dtype`` is that of the vectors, by default the first tensor's."""
        if not named:
            raise InputError("a layout needs at least one named tensor, got none")
        first = next(iter(named.values()))
        self.names: tuple[str, ...] = tuple(named)
        self.shapes: tuple[torch.Size, ...] = tuple(real(t).shape for t in named.values())
        self.dims: tuple[int, ...] = tuple(t.dim() for t in named.values())
        self.dtype: torch.dtype = dtype or first.dtype.to_real()
        self.device: torch.device = first.device
        self._sizes = [shape.numel() for shape in self.shapes]
        self.n: int = sum(self._sizes)

    def subset(self, positions: Sequence[int]) -> Layout:
        """The layout of the tensors at these positions only."""
        meta = {self.names[i]: torch.empty(self.shapes[i], device="meta") for i in positions}
        chosen = Layout(meta, self.dtype)
        chosen.device, chosen.dims = self.device, tuple(self.dims[i] for i in positions)
        return chosen

    def views(self, v: Tensor) -> list[Tensor]:
        """The pieces of v (n,) in their shapes, sharing v's memory."""
        if v.shape != (self.n,):
            raise InputError(f"v must have shape ({self.n},), got {tuple(v.shape)}")
        pieces = torch.split(v, self._sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """The named views of v (n,); writing into one writes into v."""
        return dict(zip(self.names, self.views(v), strict=True))

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """A new vector (n,) from tensors by name, or in the order of ``names``.

        Raises:
            ValueError: a name or shape differs from the layout.
            TypeError: a dtype or device differs from the layout.
        """
        if isinstance(tensors, Mapping):
            if set(tensors) != set(self.names):
                odd = sorted(set(tensors).symmetric_difference(self.names))[:5]
                raise InputError(f"tensors must have the names of .layout; these differ: {odd}")
            tensors = [tensors[name] for name in self.names]
        if len(tensors) != len(self.names):
            raise InputError(f"tensors must be {len(self.names)} in number, got {len(tensors)}")
        tensors = [real(tensor) for tensor in tensors]
        for name, shape, tensor in zip(self.names, self.shapes, tensors, strict=True):
            if tensor.shape != shape:
                raise InputError(
                    f"the tensor for {name!r} must have shape {tuple(shape)}, "
                    f"got {tuple(tensor.shape)}"
                )
            if tensor.dtype != self.dtype or tensor.device != self.device:
                raise InputTypeError(
                    f"the tensor for {name!r} must be {self.dtype} on {self.device}, "
                    f"got {tensor.dtype} on {tensor.device}; use .to()"
                )
        out = torch.empty(self.n, dtype=self.dtype, device=self.device)
        kernels.select(self.device).pack_(out, [tensor.detach() for tensor in tensors])
        return out


def stride_bytes(n: int, dtype: torch.dtype) -> int:
    """Bytes from one row of ``empty_rows`` to the next."""
    stride = -(-n * dtype.itemsize // ALIGN) * ALIGN
    return stride + ALIGN if stride % PAGE == 0 else stride


def empty_rows(k: int, n: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A zeroed (k, n) tensor whose rows start on cache lines.

    The leading dimension is padded to a multiple of 64 bytes, plus 64 if that is a multiple of
    4096: rows at the same offset of a page would evict each other from the cache.
    """
    stride = stride_bytes(n, dtype) // dtype.itemsize
    large = k * stride * dtype.itemsize >= LARGE
    if large and torch.device(device).type == "cpu" and sys.platform == "linux":
        return _pages(k * stride, dtype).view(k, stride)[:, :n]
    return torch.zeros(k, stride, dtype=dtype, device=device)[:, :n]


def _pages(count: int, dtype: torch.dtype) -> Tensor:
    """So many zeros, in pages that take memory when they are first written.

    Rows that a run never reaches cost nothing then, and the others no pass of zeros before. Huge
    pages are left to the system's setting: on a virtual machine their first writes took twice the
    time, and reading them was not faster.
    """
    # private: after a fork both processes have pages of their own, as of any other tensor
    pages = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)
