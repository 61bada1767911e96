"""The second derivative of ``F.linear_cross_entropy`` with options; torch does not have it.

torch computes the gradient in the forward pass, so double backward loses most of H. Here, the loss
of a row is ``s (log sum exp z - z_t)`` with z = W x + b, and its derivatives are formulas with
p = softmax(z). They are computed in chunks of rows, so no tensor has the size of all logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 22  # logits at a time: 16 MiB in float32
Optional = Tensor | None


class LinearLosses(torch.autograd.Function):
    """The loss (N,) of each row of x (N, H), given W (C, H), b (C,) or None, t (N,), s (N,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Optional, t: Tensor, s: Tensor) -> Tensor:
        """The losses."""
        ctx.save_for_backward(x, W, b, t, s)
        out = torch.empty_like(s)
        for rows, z in _logits(x, W, b):
            own = z.gather(1, t[rows, None]).squeeze(1)
            out[rows] = s[rows] * (z.logsumexp(1) - own)
        return out

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Optional, ...]:
        """Gradients of x, W and b."""
        found = LinearLossesBackward.apply(u, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return *found, None, None


class LinearLossesBackward(torch.autograd.Function):
    """``(u, x, W, b) -> (dz W, dz' x, dz' 1)`` with dz = u s (p - e_t)."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, x: Tensor, W: Tensor, b: Optional, t: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor, Optional]:
        """The gradients."""
        ctx.save_for_backward(u, x, W, b, t, s)
        wide = s.dtype
        gx = torch.empty(x.shape, dtype=wide, device=x.device)
        gW = torch.zeros(W.shape, dtype=wide, device=W.device)
        gb = None if b is None else torch.zeros(b.shape, dtype=wide, device=b.device)
        for rows, z in _logits(x, W, b):
            dz = _slopes(z.softmax(1), t[rows]).mul_((u * s)[rows, None])
            gx[rows] = dz @ W.to(wide)
            gW.addmm_(dz.t(), x[rows].to(wide))
            if gb is not None:
                gb += dz.sum(0)
        return gx.to(x.dtype), gW.to(W.dtype), gb if gb is None or b is None else gb.to(b.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cx: Tensor, cW: Tensor, cb: Optional) -> tuple[Optional, ...]:
        """Derivatives of ``u s (p - e_t)'y`` in u, x, W, b, where y = cx W' + x cW' + cb."""
        u, x, W, b, t, s = ctx.saved_tensors
        wide = s.dtype
        gu, gx = torch.empty_like(s), torch.empty(x.shape, dtype=wide, device=x.device)
        gW = torch.zeros(W.shape, dtype=wide, device=W.device)
        gb = None if b is None else torch.zeros(b.shape, dtype=wide, device=b.device)
        cW = cW.to(wide)
        for rows, z in _logits(x, W, b):
            xr, cr, scale = x[rows].to(wide), cx[rows].to(wide), (u * s)[rows, None]
            y = torch.addmm(cr @ W.to(wide).t(), xr, cW.t())
            if cb is not None:
                y += cb
            p = z.softmax(1)
            mean = (p * y).sum(1, keepdim=True)
            gu[rows] = s[rows] * (mean - y.gather(1, t[rows, None])).squeeze(1)
            My = y.sub_(mean).mul_(p).mul_(scale)
            dz = _slopes(p, t[rows]).mul_(scale)
            gx[rows] = torch.addmm(My @ W.to(wide), dz, cW)
            gW.addmm_(My.t(), xr).addmm_(dz.t(), cr)
            if gb is not None:
                gb += My.sum(0)
        return gu, gx.to(x.dtype), gW.to(W.dtype), gb, None, None


def _logits(x: Tensor, W: Tensor, b: Optional) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, and their logits in float32 or wider."""
    height = max(1, CHUNK // len(W))
    for first in range(0, len(x), height):
        rows = slice(first, first + height)
        z = F.linear(x[rows].to(W.dtype), W, None if b is None else b.to(W.dtype))
        yield rows, z.to(_wide(x))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _slopes(p: Tensor, t: Tensor) -> Tensor:
    """Subtract e_t from p in place."""
    return p.scatter_add_(1, t[:, None], p.new_full((len(t), 1), -1.0))


def _losses(
    x: Tensor, W: Tensor, t: Tensor, b: Optional, weight: Optional, ignored: int
) -> tuple[Tensor, Tensor]:
    valid = t != ignored
    t = torch.where(valid, t, 0)
    s = valid.to(_wide(x))
    if weight is not None:
        s = s * weight.detach().to(s)[t]
    with torch.autocast(x.device.type, enabled=False):
        return LinearLosses.apply(x, W, b, t, s), s  # type: ignore[no-untyped-call]


def _reduced(
    x: Tensor, W: Tensor, t: Tensor, b: Optional, weight: Optional, reduction: str, ignored: int,
    *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    losses, s = _losses(x, W, t, b, weight, ignored)
    total = losses.sum() / (s.sum() if reduction == "mean" else 1.0)
    # torch also returns the gradients that it computed
    return total.to(x.dtype), *(x.new_empty(0) for _ in range(3))


def _each(
    x: Tensor, W: Tensor, t: Tensor, b: Optional, weight: Optional, ignored: int, *options: Any
) -> Tensor:
    return _losses(x, W, t, b, weight, ignored)[0].to(x.dtype)


# Replacements of torch's functions, by name.
FORMULAS: dict[str, Callable[..., Any]] = {
    "GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked_default": _reduced,
    "GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked_no_reduction_default": _each,
}
