"""The kernel contract in plain torch: the specification, the fallback and the oracle.

Every backend module has these functions. They read V (k, n), never write it, and accumulate in
float64. Each column tile of W is rounded to W's dtype once, after the whole subtraction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fasthessian.kernels.contract import check_block, check_pack, check_stream

NAME = "reference"
TILE = 1 << 16  # columns widened to float64 at a time: bounds the temporary at k * 512 KiB
SIGNS, NORMAL = 0, 1  # third counter word of Philox: the two streams of one seed never meet


def unavailable() -> str | None:
    """Why this backend cannot serve here; None when it can."""
    return None


def supports(device: torch.device) -> bool:
    """Whether tensors on ``device`` are served."""
    return True


def project_(V: Tensor, W: Tensor, H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``W -= H^T V`` if H is given, then return ``C = V W^T`` (k, b) and ``G = W W^T`` (b, b)."""
    check_block(V, W, H)
    C = torch.zeros(V.shape[0], W.shape[0], dtype=torch.float64, device=V.device)
    G = torch.zeros(W.shape[0], W.shape[0], dtype=torch.float64, device=V.device)
    for start in range(0, V.shape[1], TILE):
        v = V[:, start : start + TILE].double()
        w = W[:, start : start + TILE]
        if H is not None:
            w.copy_(w.double() - H.double().T @ v)
        w64 = w.double()
        C += v @ w64.T
        G += w64 @ w64.T
    return C, G


def update_(V: Tensor, W: Tensor, H: Tensor, S: Tensor | None = None) -> Tensor:
    """``W = S (W - H^T V)``: project_ without the dots; S (b, b) mixes rows, default identity."""
    check_block(V, W, H, S)
    for start in range(0, V.shape[1], TILE):
        w = W[:, start : start + TILE]
        w64 = w.double() - H.double().T @ V[:, start : start + TILE].double()
        w.copy_(w64 if S is None else S.double() @ w64)
    return W


def _philox(counter: Tensor, kind: int, seed: int) -> Tensor:
    """Philox 4x32-10 (Salmon et al. 2011): counters (m,) -> words (m, 4) in [0, 2**32), int64."""
    mask = 0xFFFFFFFF
    c0, c1 = counter & mask, (counter >> 32) & mask
    c2, c3 = torch.full_like(counter, kind), torch.zeros_like(counter)
    k0, k1 = seed & mask, seed >> 32
    for _ in range(10):
        # int64 products wrap modulo 2**64, so both halves of the 64-bit product are exact bits
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & mask) ^ c1 ^ k0,
            p1 & mask,
            ((p0 >> 32) & mask) ^ c3 ^ k1,
            p0 & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack((c0, c1, c2, c3), dim=1)


def _words(out: Tensor, seed: int, offset: int, per_block: int, kind: int) -> tuple[Tensor, int]:
    """The Philox blocks that cover elements offset .. offset + n, and the first one's position."""
    check_stream(out, seed, offset)
    first = offset // per_block
    last = (offset + out.numel() + per_block - 1) // per_block
    counter = torch.arange(first, last, dtype=torch.int64, device=out.device)
    return _philox(counter, kind, seed), offset - first * per_block


def signs_(out: Tensor, seed: int, offset: int = 0) -> Tensor:
    """Fill out (n,) with +-1: element i is bit ``offset + i`` of the stream (set bit: -1)."""
    words, skip = _words(out, seed, offset, 128, SIGNS)
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=out.device)) & 1
    return out.copy_(1 - 2 * bits.reshape(-1)[skip : skip + out.numel()])


def normal_(out: Tensor, seed: int, offset: int = 0) -> Tensor:
    """Fill out (n,) with N(0, 1) by Box-Muller in float64: two words give two elements."""
    words, skip = _words(out, seed, offset, 4, NORMAL)
    uniform = (words.double() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(uniform[:, 0::2]))
    angle = (2.0 * math.pi) * uniform[:, 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return out.copy_(pairs.reshape(-1)[skip : skip + out.numel()])


def pack_(out: Tensor, tensors: Sequence[Tensor], alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """``out = beta * out + alpha * concat(tensors)``; beta = 0 does not read out."""
    check_pack(out, tensors)
    start = 0
    for tensor in tensors:
        piece = out[start : start + tensor.numel()]
        start += tensor.numel()
        if beta == 0.0:
            torch.mul(tensor.reshape(-1), alpha, out=piece)
        else:
            piece.mul_(beta).add_(tensor.reshape(-1), alpha=alpha)
    return out
