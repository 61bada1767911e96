"""The Triton kernels that read the rows of V: ``project`` and ``update``. Imports triton.

A column tile has T groups of F numbers; F numbers of V are 16 bytes. All tensors of a kernel have
the axes (rows of W, rows of V, T F columns); an axis that a tensor does not use has length 1. So
each thread owns one group of every row, loads are 16 bytes wide, sums over rows and groups stay in
registers, and no tile changes its layout through shared memory. In Triton 3.6 and 3.7 this does not
hold with other axes or another order of the axes. All arithmetic is in float64. Only the last tile
masks columns. It is compiled separately (FULL = False), so any n is read 16 bytes at a time.

PARTS is the number of 16-byte loads per group of W. It is 0 if rows are not aligned. A thread then
owns F numbers with a distance of T, so that a warp still loads neighbours.
"""

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # its value when the kernels were created
# a new value of these arguments must not compile a new kernel
PROJECT_SIZES = ["ldv", "ldw", "hk", "hb", "count", "k", "b", "n", "steps"]
UPDATE_SIZES = ["ldv", "ldw", "hk", "hb", "si", "sr", "count", "b", "n"]


@triton.jit
def _place(
    A, ld, rows, live, start, n,
    i: tl.constexpr, PARTS: tl.constexpr, T: tl.constexpr, F: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Pointers to part i of the numbers of each thread in rows (., ., 1), and a mask."""
    if PARTS == 0:
        j = tl.arange(0, T * F)
        group, own = j % T, j // T * T
    else:
        P: tl.constexpr = F // PARTS
        j = tl.arange(0, T * P)
        group, own = j // P * F, i * P + j % P
    mask = rows < live
    if not FULL:  # a thread stores the number of remaining columns, not their positions
        left = tl.minimum(n - start, T * F).to(tl.int32) - group
        mask = mask & (own < left)[None, None, :]
    return A + start + rows.to(tl.int64) * ld + (group + own)[None, None, :], mask


@triton.jit
def _part(
    A, ld, rows, live, start, n,
    i: tl.constexpr, PARTS: tl.constexpr, T: tl.constexpr, F: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    at, mask = _place(A, ld, rows, live, start, n, i, PARTS, T, F, FULL)
    x = tl.load(at, mask=mask, other=0.0)
    return tl.reshape(x, (x.shape[0], x.shape[1], T, F // PARTS))


@triton.jit
def _load(
    A, ld, rows, live, start, n,
    PARTS: tl.constexpr, T: tl.constexpr, F: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Rows (., ., 1) of A at columns start .. start + T F; 0 for rows that are not live.

    Each thread joins the parts that it loaded, so no data moves between threads.
    """
    if PARTS < 2:
        at, mask = _place(A, ld, rows, live, start, n, 0, PARTS, T, F, FULL)
        x = tl.load(at, mask=mask, other=0.0)
    elif PARTS == 2:
        x = _part(A, ld, rows, live, start, n, 0, 2, T, F, FULL)
        y = _part(A, ld, rows, live, start, n, 1, 2, T, F, FULL)
        x = tl.permute(tl.join(x, y), (0, 1, 2, 4, 3))
    else:
        x = _part(A, ld, rows, live, start, n, 0, 4, T, F, FULL)
        y = _part(A, ld, rows, live, start, n, 1, 4, T, F, FULL)
        z = _part(A, ld, rows, live, start, n, 2, 4, T, F, FULL)
        u = _part(A, ld, rows, live, start, n, 3, 4, T, F, FULL)
        x = tl.permute(tl.join(tl.join(x, y), tl.join(z, u)), (0, 1, 2, 5, 4, 3))
    return tl.reshape(x, (x.shape[0], x.shape[1], T * F))


@triton.jit
def _store_part(
    A, ld, rows, live, start, n, x,
    i: tl.constexpr, PARTS: tl.constexpr, T: tl.constexpr, F: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    at, mask = _place(A, ld, rows, live, start, n, i, PARTS, T, F, FULL)
    tl.store(at, tl.reshape(x, (x.shape[0], x.shape[1], T * F // PARTS)), mask=mask)


@triton.jit
def _store(
    A, ld, rows, live, start, n, x,
    PARTS: tl.constexpr, T: tl.constexpr, F: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The inverse of _load: x rounded once to A's type."""
    X: tl.constexpr = x.shape[0]
    Y: tl.constexpr = x.shape[1]
    x = x.to(A.dtype.element_ty)
    if PARTS < 2:
        at, mask = _place(A, ld, rows, live, start, n, 0, PARTS, T, F, FULL)
        tl.store(at, x, mask=mask)
    elif PARTS == 2:
        x, y = tl.split(tl.permute(tl.reshape(x, (X, Y, T, 2, F // 2)), (0, 1, 2, 4, 3)))
        _store_part(A, ld, rows, live, start, n, x, 0, 2, T, F, FULL)
        _store_part(A, ld, rows, live, start, n, y, 1, 2, T, F, FULL)
    else:
        xy, zu = tl.split(tl.permute(tl.reshape(x, (X, Y, T, 2, 2, F // 4)), (0, 1, 2, 5, 4, 3)))
        x, y = tl.split(xy)
        z, u = tl.split(zu)
        _store_part(A, ld, rows, live, start, n, x, 0, 4, T, F, FULL)
        _store_part(A, ld, rows, live, start, n, y, 1, 4, T, F, FULL)
        _store_part(A, ld, rows, live, start, n, z, 2, 4, T, F, FULL)
        _store_part(A, ld, rows, live, start, n, u, 3, 4, T, F, FULL)


@triton.jit
def _small(M, i, si, j, sj, mask):
    """M[i, j] for i and j along the first two axes: (., ., 1), with fewer numbers than threads.

    With more numbers, Triton would choose a layout for them and convert V's tiles to it.
    """
    return tl.load(M + i * si + j * sj, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _subtract(
    V, ldv, W, ldw, H, hk, hb, live, b, start, n,
    B: tl.constexpr, BK: tl.constexpr, T: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """W - H^T V of one tile: (B, 1, T F)."""
    r = tl.arange(0, B)[:, None, None]
    w = _load(W, ldw, r, b, start, n, PARTS, T, F, FULL).to(tl.float64)
    for first in range(0, live, BK):
        rows = first + tl.arange(0, BK)[None, :, None]
        v = _load(V, ldv, rows, live, start, n, min(PARTS, 1), T, F, FULL).to(tl.float64)
        h = _small(H, rows.to(tl.int64), hk, r, hb, (rows < live) & (r < b))
        w -= tl.sum(h * v, axis=1, keep_dims=True)
    return w


@triton.jit
def _dots(
    A, lda, live, W, ldw, b, P, start, steps, n,
    B: tl.constexpr, BK: tl.constexpr, T: tl.constexpr, F: tl.constexpr,
    PARTS_A: tl.constexpr, PARTS_W: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """P[row, r] = A[row] . W[r] over ``steps`` tiles. After the first rows, W is read from L1.

    Each thread adds up its tiles. Then there is one sum across threads per BK rows.
    """
    r = tl.arange(0, B)
    for first in range(0, live, BK):
        rows = first + tl.arange(0, BK)
        a_rows, w_rows = rows[None, :, None], r[:, None, None]
        sums = tl.zeros((B, BK, T), tl.float64)
        for step in range(steps):
            at = start + step * (T * F)
            a = _load(A, lda, a_rows, live, at, n, PARTS_A, T, F, FULL).to(tl.float64)
            w = _load(W, ldw, w_rows, b, at, n, PARTS_W, T, F, FULL).to(tl.float64)
            if PARTS_W > 0:
                sums += tl.sum(tl.reshape(w * a, (B, BK, T, F)), axis=3)
            else:
                sums += tl.sum(tl.reshape(w * a, (B, BK, F, T)), axis=2)
        at = P + rows[None, :].to(tl.int64) * b + r[:, None]
        tl.store(at, tl.sum(sums, axis=2), mask=(rows < live)[None, :] & (r < b)[:, None])


@triton.jit
def _chunk(
    V, ldv, W, ldw, H, hk, hb, P, live, k, b, start, steps, n,
    B: tl.constexpr, BK: tl.constexpr, T: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    if H is not None:
        r = tl.arange(0, B)[:, None, None]
        for step in range(steps):
            at = start + step * (T * F)
            w = _subtract(V, ldv, W, ldw, H, hk, hb, live, b, at, n, B, BK, T, F, PARTS, FULL)
            _store(W, ldw, r, b, at, n, w, PARTS, T, F, FULL)
        tl.debug_barrier()  # the dot products read numbers that other threads stored
    GK: tl.constexpr = B if B < BK else BK
    _dots(W, ldw, b, W, ldw, b, P + k.to(tl.int64) * b, start, steps, n,
          B, GK, T, F, PARTS, PARTS, FULL)  # fmt: skip
    _dots(V, ldv, live, W, ldw, b, P, start, steps, n, B, BK, T, F, min(PARTS, 1), PARTS, FULL)


@triton.jit(do_not_specialize=PROJECT_SIZES)
def project(
    V, ldv: tl.int64, W, ldw: tl.int64, H, hk: tl.int64, hb: tl.int64, P, count,
    k: tl.int64, b: tl.int32, n: tl.int64, steps: tl.int32,
    B: tl.constexpr, BK: tl.constexpr, T: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr,
    UNIT_V: tl.constexpr, UNIT_W: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """W -= H^T V if H is given, then P[program] = [V W^T; W W^T] (k + b, b) for its columns.

    Leading dimensions are given in units, so that the compiler knows their divisibility.
    """
    live = _rows_that_take_part(count, ON_DEVICE)
    # the masked chunk starts first
    chunk = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    start = chunk * steps * (T * F)
    mine = P + chunk * (k + b) * b
    if start + steps * (T * F) <= n:
        _chunk(V, ldv * UNIT_V, W, ldw * UNIT_W, H, hk, hb, mine, live, k, b, start, steps, n,
               B, BK, T, F, PARTS, True)  # fmt: skip
    else:
        _chunk(V, ldv * UNIT_V, W, ldw * UNIT_W, H, hk, hb, mine, live, k, b, start, steps, n,
               B, BK, T, F, PARTS, False)  # fmt: skip


@triton.jit
def _rows_that_take_part(count, ON_DEVICE: tl.constexpr):
    if ON_DEVICE:
        live = tl.load(count).to(tl.int32)
    else:
        live = count
    return live


@triton.jit(do_not_specialize=["count", "k", "b", "chunks"])
def total(
    P, out, count, k: tl.int64, b: tl.int32, chunks: tl.int32,
    BC: tl.constexpr, BO: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """out[i] = sum of P[chunk, i] over chunks, in fixed order; 0 for rows from ``count`` to k."""
    live = _rows_that_take_part(count, ON_DEVICE)
    size = (k + b) * b
    i = tl.program_id(0).to(tl.int64) * BO + tl.arange(0, BO)
    row = i // b
    kept = (i < size) & ((row < live) | (row >= k))
    sums = tl.zeros((BC, BO), tl.float64)
    for first in range(0, chunks, BC):
        chunk = first + tl.arange(0, BC)
        at = P + chunk[:, None].to(tl.int64) * size + i[None, :]
        sums += tl.load(at, mask=(chunk < chunks)[:, None] & kept[None, :], other=0.0)
    tl.store(out + i, tl.sum(sums, axis=0), mask=i < size)


@triton.jit
def _mixed(S, si, sr, i, w, b, B: tl.constexpr):
    """Row i of S w: (1, 1, T F)."""
    r = tl.arange(0, B)[:, None, None]
    s = _small(S, i, si, r.to(tl.int64), sr, r < b)
    return tl.sum(s * w, axis=0, keep_dims=True)


@triton.jit
def _row(i: tl.constexpr, w, B: tl.constexpr):
    """Row i of w: (1, 1, T F). The compiler turns this sum of bits into a selection."""
    r = tl.arange(0, B)[:, None, None]
    bits = tl.where(r == i, w.to(tl.int64, bitcast=True), 0)
    return tl.sum(bits, axis=0, keep_dims=True).to(tl.float64, bitcast=True)


@triton.jit
def _update_tile(
    V, ldv, W, ldw, H, hk, hb, S, si, sr, live, b, start, n, scale,
    B: tl.constexpr, BK: tl.constexpr, T: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr,
    APPEND: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, B)[:, None, None]
    one = tl.zeros((1, 1, 1), tl.int32)
    w = _subtract(V, ldv, W, ldw, H, hk, hb, live, b, start, n, B, BK, T, F, PARTS, FULL)
    free = V + live.to(tl.int64) * ldv
    if S is None:
        if APPEND:  # the index masks all rows except the first, then all except the last
            _store(free, 0, r, 1, start, n, w * scale, min(PARTS, 1), T, F, FULL)
            _store(W, 0, tl.where(r == b - 1, 0, 1), 1, start, n, w, PARTS, T, F, FULL)
        else:  # row by row (with S too), since the addresses of all rows do not fit registers
            for i in tl.static_range(B):
                x = _row(i, w, B)
                _store(W, ldw, one + i, b, start, n, x, PARTS, T, F, FULL)
    elif APPEND:
        x = _mixed(S, si, sr, 0, w, b, B)
        _store(free, 0, one, 1, start, n, x * scale, min(PARTS, 1), T, F, FULL)
        x = _mixed(S, si, sr, b - 1, w, b, B)
        _store(W, 0, one, 1, start, n, x, PARTS, T, F, FULL)
    else:
        for i in range(b):
            x = _mixed(S, si, sr, i, w, b, B)
            _store(W, ldw, one + i, b, start, n, x, PARTS, T, F, FULL)


@triton.jit(do_not_specialize=UPDATE_SIZES)
def update(
    V, ldv: tl.int64, W, ldw: tl.int64, H, hk: tl.int64, hb: tl.int64, S, si: tl.int64,
    sr: tl.int64, count, b: tl.int32, n: tl.int64, scale: tl.float64,
    B: tl.constexpr, BK: tl.constexpr, T: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr,
    UNIT_V: tl.constexpr, UNIT_W: tl.constexpr, APPEND: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Store W' = S (W - H^T V) in W. With APPEND: its first row in V[count], its last in W[0]."""
    live = _rows_that_take_part(count, ON_DEVICE)
    # the masked chunk starts first
    chunk = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    start = chunk * (T * F)
    if start + T * F <= n:
        _update_tile(V, ldv * UNIT_V, W, ldw * UNIT_W, H, hk, hb, S, si, sr, live, b, start, n,
                     scale, B, BK, T, F, PARTS, APPEND, True)  # fmt: skip
    else:
        _update_tile(V, ldv * UNIT_V, W, ldw * UNIT_W, H, hk, hb, S, si, sr, live, b, start, n,
                     scale, B, BK, T, F, PARTS, APPEND, False)  # fmt: skip
