"""The Triton kernels on single vectors and scalars: recurrence, random vectors, packing."""

import triton
import triton.language as tl

from fasthessian.kernels import contract

CANCELLED = tl.constexpr(contract.CANCELLED)
TWO_PI = tl.constexpr(6.283185307179586)
# a new value of these arguments must not compile a new kernel
RECUR_SIZES = ["ldc", "ldt", "lda", "count", "k"]


@triton.jit(do_not_specialize=RECUR_SIZES)
def recur(
    C, ldc: tl.int64, G, M, ldt: tl.int64, gauges, lda: tl.int64, count,
    k: tl.int32, shrink: tl.float64, H, S,
    R: tl.constexpr, L: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """``reference.recur_`` by one program. M is T, read in tiles (R, L); shrink is 1 / scale."""
    if ON_DEVICE:
        j = tl.load(count).to(tl.int32)
    else:
        j = count
    link_row = M + j.to(tl.int64) * ldt
    ss = tl.zeros((L,), tl.float64)
    sz = tl.zeros((L,), tl.float64)
    ls = tl.zeros((L,), tl.float64)
    for first in range(0, j, L):
        i = first + tl.arange(0, L)
        s = tl.load(C + i * ldc, mask=i < j, other=0.0) * shrink
        ss += s * s
        sz += s * (tl.load(C + i * ldc + 1, mask=i < j, other=0.0) * shrink)
        ls += s * tl.load(link_row + i, mask=i < j, other=0.0)
    uu = tl.load(G)
    nu2 = uu - tl.sum(ss, axis=0)
    fresh = nu2 > uu * CANCELLED
    nu = tl.sqrt(nu2)
    over = 1.0 / nu
    t = (tl.load(G + 1) - tl.sum(sz, axis=0)) / nu2

    worst = tl.zeros((R,), tl.float64)
    broken = tl.zeros((R,), tl.int32)  # counts NaN, because a maximum would lose it
    for first in range(0, j, R):
        i = first + tl.arange(0, R)
        products = tl.zeros((R, L), tl.float64)
        for left in range(0, j, L):
            c = left + tl.arange(0, L)
            s = tl.load(C + c * ldc, mask=c < j, other=0.0) * shrink
            inside = (i < j)[:, None] & (c < j)[None, :]
            at = M + (i.to(tl.int64) * ldt)[:, None] + c[None, :]
            products += tl.load(at, mask=inside, other=0.0) * s[None, :]
        z = tl.load(C + i * ldc + 1, mask=i < j, other=0.0) * shrink
        link = tl.load(link_row + i, mask=i < j, other=0.0)
        gap = tl.abs((z - tl.sum(products, axis=1)) * over - nu * link)
        gap = tl.where(i < j, gap, 0.0)
        broken += (gap != gap).to(tl.int32)
        worst = tl.maximum(worst, gap)
    asymmetry = tl.where(tl.sum(broken, axis=0) > 0, float("nan"), tl.max(worst, axis=0))
    alpha = t - tl.sum(ls, axis=0)

    tl.debug_barrier()  # all threads have read the numbers that are overwritten below
    for first in range(0, j, L):
        i = first + tl.arange(0, L)
        coupled = tl.where(fresh, nu * tl.load(link_row + i, mask=i < j, other=0.0), 0.0)
        tl.store(link_row + i, coupled, mask=i < j)
        tl.store(M + i.to(tl.int64) * ldt + j, coupled, mask=i < j)
        tl.store(link_row + ldt + i, tl.zeros((L,), tl.float64), mask=i < j)
    tl.store(link_row + j, tl.where(fresh, alpha, 0.0))
    tl.store(link_row + ldt + j, 1.0)
    mine = gauges + j.to(tl.int64) * lda
    tl.store(mine, uu)
    tl.store(mine + 1, nu2)
    tl.store(mine + 2, tl.where(fresh, asymmetry, 0.0))
    for first in range(0, k, L):
        i = first + tl.arange(0, L)
        for column in tl.static_range(2):
            c = tl.load(C + i * ldc + column, mask=i < j, other=0.0)
            h = tl.where(fresh, c * shrink * shrink, 0.0)
            tl.store(H + i * 2 + column, h, mask=i < k)
    tl.store(S, tl.where(fresh, over, 0.0))
    tl.store(S + 1, 0.0)
    tl.store(S + 2, tl.where(fresh, -t * over, 0.0))
    tl.store(S + 3, tl.where(fresh, over, 0.0))
    if ON_DEVICE:
        tl.store(count, (j + 1).to(tl.int64))
        tl.store(count + 1, j.to(tl.int64))


@triton.jit
def _philox(counter, kind: tl.constexpr, seed):
    """Four words per 64-bit counter; the third counter word separates signs from normals."""
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero + kind, zero)


@triton.jit
def _spread(out, word, start, n):
    """Write the 32 bits of each word to out[start ..] as +-1; a set bit is -1."""
    bit = tl.arange(0, 32)[None, :]
    value = 1 - 2 * ((word[:, None] >> bit.to(tl.uint32)) & 1).to(tl.int32)
    i = start[:, None] + bit
    tl.store(out + i, value.to(out.dtype.element_ty), mask=(i >= 0) & (i < n))


@triton.jit(do_not_specialize=["n", "seed", "first", "skip"])
def signs(
    out, n: tl.int64, seed: tl.uint64, first: tl.int64, skip: tl.int64, BLOCKS: tl.constexpr
):  # fmt: skip
    """The bits of the Philox blocks from ``first`` on, 128 per block, without ``skip`` bits."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    x0, x1, x2, x3 = _philox(first + block, 0, seed)
    start = block * 128 - skip
    _spread(out, x0, start, n)
    _spread(out, x1, start + 32, n)
    _spread(out, x2, start + 64, n)
    _spread(out, x3, start + 96, n)


@triton.jit
def _cos_sin(c):
    """Cosine and sine of 2 pi (c + 1/2) 2^-32, where c has 32 bits.

    By Taylor series around the nearest quarter turn, which is found exactly. Their error is below
    rounding. The functions of libdevice would need a stack to reduce huge angles.
    """
    quarter = (c + 0x20000000) >> 30
    rest = (c << 2).to(tl.int32, bitcast=True) >> 2  # in 2^-30 quarter turns
    x = TWO_PI * ((rest.to(tl.float64) + 0.5) * 2.0**-32)
    z = x * x
    sine = 1 / 6227020800 - z / 1307674368000
    sine = 1 / 362880 - z * (1 / 39916800 - z * sine)
    sine = 1 / 120 - z * (1 / 5040 - z * sine)
    sine = x - x * z * (1 / 6 - z * sine)
    cosine = 1 / 87178291200 - z / 20922789888000
    cosine = 1 / 3628800 - z * (1 / 479001600 - z * cosine)
    cosine = 1 / 24 - z * (1 / 720 - z * (1 / 40320 - z * cosine))
    cosine = 1 - z * (0.5 - z * cosine)
    odd = (quarter & 1) == 1
    a, b = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) == 2, -a, a), tl.where((quarter & 2) == 2, -b, b)


@triton.jit
def _normal_pair(a, c):
    """Box-Muller of two words: (., 2)."""
    u = (a.to(tl.float64) + 0.5) * 2.0**-32
    radius = tl.sqrt(-2.0 * tl.log(u))
    cosine, sine = _cos_sin(c)
    return tl.join(radius * cosine, radius * sine)


@triton.jit(do_not_specialize=["n", "seed", "first", "skip"])
def normal(
    out, n: tl.int64, seed: tl.uint64, first: tl.int64, skip: tl.int64, BLOCKS: tl.constexpr
):  # fmt: skip
    """The normals of the Philox blocks from ``first`` on, 4 per block, without ``skip`` ones."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    x0, x1, x2, x3 = _philox(first + block, 1, seed)
    pairs = tl.join(_normal_pair(x0, x1), _normal_pair(x2, x3))  # (BLOCKS, 2, pair)
    within = tl.arange(0, 2)[None, :, None] + 2 * tl.arange(0, 2)[None, None, :]
    i = (block * 4 - skip)[:, None, None] + within
    tl.store(out + i, pairs.to(out.dtype.element_ty), mask=(i >= 0) & (i < n))


@triton.jit(do_not_specialize=["tensors", "n", "chunk"])
def pack(
    out, table, tensors: tl.int32, n: tl.int64, chunk: tl.int64, alpha: tl.float64,
    beta: tl.float64, BN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Write alpha * concat (+ beta * out) to ``chunk`` elements of out per program.

    ``table`` (2, tensors) holds, for each tensor, the address that element 0 of out would have in
    it, and the index in out of the element after its last.
    """
    done = tl.program_id(0).to(tl.int64) * chunk
    stop = tl.minimum(done + chunk, n)
    low, high = 0, tensors - 1  # search for the first tensor that ends after ``done``
    while low < high:
        middle = (low + high) // 2
        after = tl.load(table + tensors + middle) > done
        low = tl.where(after, low, middle + 1)
        high = tl.where(after, middle, high)
    while done < stop:
        source = tl.load(table + low).to(tl.pointer_type(out.dtype.element_ty))
        end = tl.minimum(tl.load(table + tensors + low), stop)
        for start in range(done, end, BN):
            i = start + tl.arange(0, BN)
            x = tl.load(source + i, mask=i < end).to(tl.float64) * alpha
            if ADD:
                x += tl.load(out + i, mask=i < end).to(tl.float64) * beta
            tl.store(out + i, x.to(out.dtype.element_ty), mask=i < end)
        done = end
        low += 1
