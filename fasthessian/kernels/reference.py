"""The kernel contract in plain torch: specification, fallback and reference for tests.

Every backend module has these functions. They read V (k, n) and accumulate in float64. Only
``append`` writes into V. Each column tile of W is rounded to W's dtype once, after the whole
subtraction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fasthessian.kernels.contract import (
    CANCELLED,
    Count,
    check_block,
    check_pack,
    check_recurrence,
    check_softmax,
    check_stream,
)

NAME = "reference"
TILE = 1 << 16  # columns converted to float64 at a time: a temporary has at most k * 512 KiB
LOGITS = 1 << 17  # logits converted to float64 at a time, at least one row: 1 MiB
SIGNS, NORMAL = 0, 1  # third counter word of Philox: each seed has two separate streams


def unavailable(device: torch.device | str = "cpu") -> str | None:
    """Why this backend cannot serve tensors on ``device``; None when it can."""
    return None


def _live(V: Tensor, count: Count) -> Tensor:
    """The rows of V that take part. A count on an accelerator is not read by the host."""
    if count is None:
        return V
    if isinstance(count, int) or count.device.type == "cpu":
        return V[: int(count)]
    return torch.where((torch.arange(len(V), device=V.device) < count)[:, None], V, 0)


def project_(
    V: Tensor, W: Tensor, H: Tensor | None = None, *, count: Count = None
) -> tuple[Tensor, Tensor]:
    """``W -= H^T V`` if H is given, then return ``C = V W^T`` (k, b) and ``G = W W^T`` (b, b).

    V (k, n) is float64, float32 or float16; W (b, n) is float64 or float32; b is at most 8. Only
    the first ``count`` rows of V and H take part (default: all; a tensor of one int64 is read on
    its device). The other rows of C are 0. The dot products are those of the rounded W, summed in
    float64.
    """
    check_block(V, W, H, count=count)
    C = torch.zeros(V.shape[0], W.shape[0], dtype=torch.float64, device=V.device)
    G = torch.zeros(W.shape[0], W.shape[0], dtype=torch.float64, device=V.device)
    for start in range(0, V.shape[1], TILE):
        v = _live(V[:, start : start + TILE], count).double()
        w = W[:, start : start + TILE]
        if H is not None:
            w.copy_(w.double() - _live(H, count).double().T @ v)
        w64 = w.double()
        C[: len(v)] += v @ w64.T
        G += w64 @ w64.T
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

    With ``append``, row ``count`` of V, which is free, becomes ``append`` times the first row of
    the result: the finished basis row. The first row of W becomes the last row of the result: the
    next candidate. The other rows of W do not change.
    """
    check_block(V, W, H, S, count, append)
    for start in range(0, V.shape[1], TILE):
        tile = V[:, start : start + TILE]
        w = W[:, start : start + TILE]
        result = w.double() - _live(H, count).double().T @ _live(tile, count).double()
        if S is not None:
            result = S.double() @ result
        if append is None:
            w.copy_(result)
            continue
        row = torch.as_tensor(count, device=V.device).reshape(1)
        tile.index_copy_(0, row, (append * result[:1]).to(V.dtype))
        w[0].copy_(result[-1])
    return W


def recur_(
    C: Tensor, G: Tensor, T: Tensor, gauges: Tensor, *, count: int | Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The scalars of one delayed Gram-Schmidt step of Lanczos, from the dot products of u and A u.

    C (k, 2) and G (2, 2) are those of ``project_`` for W = [u, w], w = A u.

    On entry, row j = ``count`` of T (m + 1, m + 1) holds the couplings of the candidate u to the
    final rows, divided by the norm of u. On return they are multiplied by that norm, the diagonal
    is set, and row j + 1 is ready for the next candidate. Row j of ``gauges`` (m + 1, 3) becomes
    |u|^2, its part nu^2 outside the basis, and the largest difference between q_i'Aq_j and
    q_j'Aq_i. ``scale`` is that of the stored rows, V = stored / scale. If ``count`` is a tensor of
    two int64, it is read on the device and advanced from [j, .] to [j + 1, j].

    Returns:
        H (k, 2) and S (2, 2) for ``update_(V, [u, w], H, S, append=scale)``. Both are 0 if u is
        linearly dependent: nu^2 <= 1e-4 |u|^2.
    """
    check_recurrence(C, G, T, gauges, count)
    j = int(count if isinstance(count, int) else count[0])
    if isinstance(count, Tensor):
        count.copy_(torch.tensor([j + 1, j]))
    s, z = C[:j, 0] / scale, C[:j, 1] / scale
    nu2 = G[0, 0] - s @ s
    fresh = nu2 > CANCELLED * G[0, 0]
    nu, t = torch.sqrt(nu2), (G[0, 1] - s @ z) / nu2
    coupling = (z - T[:j, :j] @ s) / nu
    link = T[j, :j].clone()
    alpha = t - link @ s
    T[j, :j] = T[:j, j] = torch.where(fresh, nu * link, 0.0)
    T[j, j] = torch.where(fresh, alpha, 0.0)
    T[j + 1, : j + 1] = 0.0
    T[j + 1, j] = 1.0
    asymmetry = (coupling - nu * link).abs().max() if j else torch.zeros_like(nu)
    gauges[j] = torch.stack((G[0, 0], nu2, torch.where(fresh, asymmetry, 0.0)))
    H = torch.zeros_like(C)
    H[:j] = torch.where(fresh, C[:j] / scale**2, 0.0)
    S = torch.stack((1 / nu, torch.zeros_like(nu), -t / nu, 1 / nu)).reshape(2, 2)
    return H, torch.where(fresh, S, 0.0)


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
    """The Philox blocks of elements offset .. offset + n, and how many elements precede these."""
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
    """``out = beta * out + alpha * concat(tensors)``; with beta = 0, out is not read."""
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


def softmax_curvature_(U: Tensor, Z: Tensor, scale: Tensor) -> Tensor:
    """``u = scale (diag(p) - p p^T) u`` with ``p = softmax(z)``, for each row u of U and z of Z.

    This is the product with the Hessian of the cross-entropy with respect to its logits. U and Z
    (o, c, i) hold o i rows over c classes, scale (o, i) is float64, and all are contiguous. A row
    with scale 0 becomes 0, even if it contains NaN.
    """
    check_softmax(U, Z, scale)
    outer, classes, inner = U.shape
    if U.numel() == 0:
        return U
    width = min(inner, max(1, LOGITS // classes))
    height = max(1, LOGITS // (classes * width))
    for top, left in itertools.product(range(0, outer, height), range(0, inner, width)):
        u, z, factor = (
            X[top : top + height, ..., left : left + width] for X in (U, Z, scale.unsqueeze(1))
        )
        p, wide = torch.softmax(z.double(), 1), u.double()
        product = factor * p * (wide - (p * wide).sum(1, keepdim=True))
        u.copy_(torch.where(factor == 0, 0.0, product))
    return U
