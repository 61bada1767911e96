"""The symmetric operator, and the function that answers requests for its products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasthessian import kernels
from fasthessian.distributed.ranks import ALONE, Ranks
from fasthessian.distributed.slices import Slice
from fasthessian.errors import InputError, InputTypeError
from fasthessian.operators.kept import Kept
from fasthessian.operators.request import Batches, Request
from fasthessian.operators.torch_state.scopes import grad_mode, no_inference_mode, restored

FLOATS = (torch.float32, torch.float64)
# The largest accepted |u'Av - v'Au| / (||Au|| + ||Av||) for u and v from N(0, 1). It is far above
# rounding and above the error of finite differences. If A is not symmetric, the ratio is about 0.1.
ASYMMETRY = {torch.float32: 5e-3, torch.float64: 1e-5}


def finite(x: Tensor) -> bool:
    """Whether all numbers are finite. A finite sum proves it and is 15 times as fast to check."""
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())


class SymmetricOperator:
    """A symmetric n x n matrix, defined by its products: ``A @ v = matvec(v)``.

    Args:
        matvec: maps a vector (n,) to A v (n,), both with the given dtype and device. It gets one
            vector at a time and must not write into it.
        n: the size, at least 1.
        dtype: ``torch.float32`` or ``torch.float64``.
        device: the device of the vectors.
        check: compare u'Av with v'Au for random u and v before the first product. The two extra
            calls of ``matvec`` are not counted in ``matvecs``.

    Attributes:
        n, dtype, device: as given.
        matvecs: the number of products so far; a block of b vectors counts as b products.

    ``A @ v`` takes one vector (n,) or b vectors as rows (b, n). It returns the same shape.

    Raises:
        ValueError: a shape is wrong, a product holds NaN or Inf, or ``matvec`` is not symmetric.
        TypeError: a wrong dtype or device.

    Example:
        >>> import torch, fasthessian as fh
        >>> M = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> A = fh.SymmetricOperator(lambda v: M @ v, 2)
        >>> A @ torch.tensor([1.0, 0.0])
        tensor([2., 1.])
        >>> A.matvecs
        1
    """

    n: int
    dtype: torch.dtype
    device: torch.device
    matvecs: int
    slice: Slice  # the part of a vector that the operator's products take and return

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        n: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        check: bool = True,
    ) -> None:
        if not callable(matvec):
            raise InputTypeError(f"matvec must be callable, got {type(matvec).__name__}")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"n must be a positive integer, got {n!r}")
        if dtype not in FLOATS:
            raise InputTypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self._matvec = matvec
        self._probe_pending = check
        self._set_size(n, dtype, torch.device(device))

    def _set_size(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.n, self.dtype, self.matvecs = n, dtype, 0
        self.slice = Slice.of(n)
        # "cuda" means the current device: store the index of that device
        self.device = torch.empty(0, device=device).device

    def __repr__(self) -> str:
        """Class, size, dtype, device and the number of products so far."""
        return (
            f"{type(self).__name__}(n={self.n}, dtype={self.dtype}, device={self.device}, "
            f"matvecs={self.matvecs})"
        )

    @restored
    def __matmul__(self, v: Tensor) -> Tensor:
        """A v for v (n,), or the products with the rows of v (b, n)."""
        self._check_vector("v", v, (1, 2))
        with no_inference_mode():  # the result is an ordinary tensor in every mode
            V = v.detach().reshape(-1, self.n)
            if V.is_inference() or not V.is_contiguous():
                V = V.clone(memory_format=torch.contiguous_format)
            out = torch.empty_like(V)
            multiply([Request(self, V, out)])
            return out.view(v.shape)

    # The algorithms (krylov/) use the members below and ``multiply``, which answers their requests
    # for products. The members say what an operator keeps, how exact its products are, and whether
    # a CUDA graph can capture them.

    _kept = Kept()
    _ranks: Ranks = ALONE  # whose products are summed

    @property
    def _probes(self) -> Ranks:
        """The ranks that independent random vectors are divided over."""
        return self._matrix._ranks.probes

    def _agree(self, call: Mapping[str, str] | None = None) -> None:
        """Let the ranks agree on what their products have in common, before a run.

        ``call``: the algorithm and its arguments, which must be the same on all ranks.
        """

    @property
    def _matrix(self) -> SymmetricOperator:
        """The operator that makes the products: this one, or the one that this is a block of."""
        return self

    def _batches(self) -> Batches:
        """How the loss is divided; an operator without a loss is one batch."""
        return Batches() if self._matrix is self else self._matrix._batches()

    def _relative_error(self) -> float:
        """The relative error of a product that is known in advance: here only rounding."""
        return torch.finfo(self.dtype).eps

    def _capture_obstacle(self) -> str | None:
        """Why a product cannot be captured in a CUDA graph; None if it can."""
        return "a matvec may depend on more than its argument"

    def _multiply(self, requests: Sequence[Request]) -> None:
        """Make the requested products with this operator or with its blocks."""
        if self._probe_pending:
            self._probe()
            self._probe_pending = False
        for request in requests:
            for v, row in zip(request.V.detach(), request.out, strict=True):
                row.copy_(self._single_product(v))

    def _single_product(self, v: Tensor) -> Tensor:
        version = v._version
        with grad_mode(True):  # matvec may differentiate, even if it is called under no_grad
            w = self._matvec(v)
        if not isinstance(w, Tensor):
            raise InputTypeError(f"matvec must return a torch.Tensor, got {type(w).__name__}")
        if w.shape != (self.n,):
            raise InputError(f"matvec must return shape ({self.n},), got {tuple(w.shape)}")
        if w.dtype != self.dtype or w.device != self.device:
            raise InputTypeError(
                f"matvec must return {self.dtype} on {self.device}, got {w.dtype} on {w.device}"
            )
        if v._version != version:
            raise InputError("matvec wrote into its argument; return a new tensor instead")
        return w.detach()

    def _probe(self) -> None:
        """Raise ValueError if u'Av and v'Au differ by more than rounding for random u and v."""
        u, v = (torch.empty(self.n, dtype=self.dtype, device=self.device) for _ in range(2))
        backend = kernels.select(self.device)
        backend.normal_(u, 1, 0)  # not signs: with small n, u'Av = v'Au could hold by chance
        backend.normal_(v, 2, 0)
        Au, Av = self._single_product(u).double(), self._single_product(v).double()
        if not bool(torch.isfinite(Au).all() and torch.isfinite(Av).all()):
            raise InputError("matvec returned NaN or Inf for a random vector")
        uAv, vAu = float(u.double() @ Av), float(v.double() @ Au)
        if abs(uAv - vAu) > ASYMMETRY[self.dtype] * float(Au.norm() + Av.norm()):
            raise InputError(
                f"matvec is not symmetric: u'Av = {uAv:.6g} but v'Au = {vAu:.6g} for random u, v; "
                f"pass a symmetric one, or check=False if its error is meant"
            )

    def _check_vector(self, name: str, v: Any, dims: tuple[int, ...]) -> None:
        n = self.slice.width
        shapes = " or ".join({1: f"({n},)", 2: f"(b, {n})"}[dim] for dim in dims)
        if not isinstance(v, Tensor):
            raise InputTypeError(
                f"{name} must be a torch.Tensor of shape {shapes}, got {type(v).__name__}"
            )
        if v.dim() not in dims or v.shape[-1] != n:
            raise InputError(f"{name} must have shape {shapes}, got {tuple(v.shape)}")
        if v.dtype != self.dtype or v.device != self.device:
            raise InputTypeError(
                f"{name} must be {self.dtype} on {self.device}, got {v.dtype} on {v.device}; "
                f"use {name}.to()"
            )
        if dims == (2,) and n > 1 and v.stride(1) != 1:
            raise InputError(
                f"{name} must have contiguous rows, got strides {v.stride()}; "
                f"use {name}.contiguous()"
            )

    def gather(self, rows: Tensor) -> Tensor:
        """Whole vectors (k, n) from the slices (k, n_r) of all ranks, as sharded runs return them.

        Every rank must call it. Whole vectors are returned as they are. One vector may have the
        shape (n_r,).
        """
        ranks = self._matrix._ranks
        if not ranks or not any(ranks.any([rows.shape[-1] != self.n])):
            return rows
        n, width, _, held, _ = Slice.of(self.n, ranks)
        if rows.shape[-1] != held:
            raise InputError(f"rows must have {held} or {n} columns, got {tuple(rows.shape)}")
        piece = torch.zeros(width, dtype=rows.dtype, device=rows.device)
        row = torch.empty(ranks.size * width, dtype=rows.dtype, device=rows.device)
        whole = torch.empty(*rows.shape[:-1], n, dtype=rows.dtype, device=rows.device)
        outs = whole.view(-1, n)
        for v, out in zip(rows.reshape(len(outs), held), outs, strict=True):
            piece[:held] = v
            ranks.gather_(row, piece)
            out.copy_(row[:n])
        return whole

    def to_scipy(self) -> Any:
        """This operator as a ``scipy.sparse.linalg.LinearOperator`` on NumPy arrays."""
        from scipy.sparse.linalg import LinearOperator

        dtype = np.dtype(str(self.dtype).removeprefix("torch."))

        def matmat(X: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            rows = torch.from_numpy(np.ascontiguousarray(X.T, dtype=dtype)).to(self.device)
            return np.asarray((self @ rows).cpu().numpy().T)

        def matvec(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return matmat(x.reshape(-1, 1))[:, 0]

        return LinearOperator(
            (self.n, self.n), matvec=matvec, rmatvec=matvec, matmat=matmat, rmatmat=matmat,
            dtype=dtype,
        )  # fmt: skip


@restored
def multiply(requests: Iterable[Request]) -> None:
    """Write the products of all requests into their ``out``.

    Requests for operators that share a matrix are answered together, in one pass over the data.

    Raises:
        ValueError: V or ``out`` has a wrong shape, or the product of a request that is not
            deferred holds NaN or Inf.
        TypeError: V or ``out`` has a wrong dtype or device.
    """
    shared: dict[int, list[Request]] = {}
    for request in requests:
        A, V, out = request.operator, request.V, request.out
        _check_request(request)
        if V.is_inference() or out.is_inference():  # autograd cannot save or write these
            out.copy_(A @ V)
        elif len(V):
            shared.setdefault(id(A._matrix), []).append(request)
    for group in shared.values():
        with no_inference_mode(), grad_mode(False):
            group[0].operator._matrix._multiply(group)
        for request in group:
            _count_products(request)


def _check_request(request: Request) -> None:
    """Raise unless V (b, n) fits the operator and the product fits ``out`` (b, n)."""
    A, V, out = request.operator, request.V, request.out
    A._check_vector("V", V, (2,))
    A._check_vector("out", out, (2,))
    if V.shape != out.shape:
        raise InputError(f"out must have V's shape {tuple(V.shape)}, got {tuple(out.shape)}")


def _count_products(request: Request) -> None:
    """Raise ValueError if a product is not finite; otherwise count the products."""
    A = request.operator
    if not request.deferred and not finite(request.out):
        if not finite(request.V):
            raise InputError("v holds NaN or Inf; a product needs finite numbers")
        raise InputError(f"{A} returned NaN or Inf for a finite vector")
    A.matvecs += len(request.V)


def operator(A: Any) -> SymmetricOperator:
    """Return ``A``, or raise a TypeError that shows how to make an operator."""
    if not isinstance(A, SymmetricOperator):
        raise InputTypeError(
            f"A must be an operator, got {type(A).__name__}; make one with "
            "fh.Hessian(model, criterion, data) or fh.SymmetricOperator(matvec, n)"
        )
    return A
