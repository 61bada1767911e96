"""The Triton kernel of ``softmax_curvature_``. Imports triton.

Tensors have the axes (rows, groups of classes, F classes of a group). Each thread owns a group. It
keeps its own sums, relative to the largest logit that it has read, so no thread waits for another
one before the row has been read. The axis F is in registers. If rows are aligned, the classes of a
group are adjacent; otherwise the groups are adjacent. In both cases a warp loads neighbours.
"""

import triton
import triton.language as tl


@triton.jit
def _origin(top):
    """The number that is subtracted from logits: their maximum, or 0 if all are -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _shrink(top, most):
    """The factor that turns sums relative to ``top`` into sums relative to ``most``."""
    return tl.where(top == most, 1.0, tl.exp(top - most)).to(tl.float64)


@triton.jit
def _load(U, Z, at, index, left, live, FULL: tl.constexpr):
    """Logits and tangents in float32 or float64; -inf and 0 beyond the last class."""
    mask = live
    if not FULL:
        mask = mask & (index < left)
    return tl.load(Z + at, mask=mask, other=float("-inf")), tl.load(U + at, mask=mask, other=0.0)


@triton.jit
def _add(U, Z, at, index, left, live, top, total, dot, FULL: tl.constexpr):
    z, u = _load(U, Z, at, index, left, live, FULL)
    numbers = tl.where(z == z, z, float("-inf"))  # only because the interpreter warns of NaN
    most = tl.maximum(top, tl.max(numbers, axis=2, keep_dims=True))
    shrink = _shrink(top, most)
    e = tl.exp(z - _origin(most)).to(tl.float64)
    total = total * shrink + tl.sum(e, axis=2, keep_dims=True)
    dot = dot * shrink + tl.sum(e * u.to(tl.float64), axis=2, keep_dims=True)
    return most, total, dot


@triton.jit
def _write(U, Z, at, index, left, live, used, exists, zero, mean, weight, FULL: tl.constexpr):
    z, u = _load(U, Z, at, index, left, live, FULL)
    mask = exists
    if not FULL:
        mask = mask & (index < left)
    tl.store(U + at, tl.where(used, tl.exp(z - zero) * weight * (u - mean), 0.0), mask=mask)


@triton.jit(do_not_specialize=["outer", "classes", "line"])
def curvature(
    U, Z, scale, outer: tl.int64, classes: tl.int64, line: tl.int64,
    R: tl.constexpr, T: tl.constexpr, F: tl.constexpr, UNIT: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Write ``u = scale (p u - p (p . u))``, ``p = softmax(z)``, for R rows.

    ``line`` is the number of classes if FLAT, otherwise the number of adjacent rows. It is given in
    units of UNIT, so that the compiler knows its divisibility.
    """
    r = tl.arange(0, R)[:, None, None]
    t, f = tl.arange(0, T)[None, :, None], tl.arange(0, F)[None, None, :]
    program = tl.program_id(0).to(tl.int64)
    if FLAT:
        gap = 1
        count = line * UNIT
        row = program * R + r
        exists = row < outer
        base = row * count
    else:
        gap = line * UNIT
        count = classes
        tiles = (gap + R - 1) // R
        column = program % tiles * R + r
        exists = column < gap
        row = program // tiles * gap + column
        base = program // tiles * gap * count + column
    if UNIT > 1:
        index = t * F + f
    else:
        index = f * T + t
    factor = tl.load(scale + row, mask=exists, other=0.0)
    used = factor != 0
    if FLAT:
        live = exists & used
    else:  # with a mask that differs between rows, 16 bytes would need four loads
        live = exists
    at = base + index * gap

    whole = count // (T * F) * (T * F)
    top = tl.full((R, T, 1), float("-inf"), Z.dtype.element_ty)
    total = tl.zeros((R, T, 1), tl.float64)
    dot = tl.zeros((R, T, 1), tl.float64)
    for k in range(0, whole, T * F):
        top, total, dot = _add(U, Z, at + k * gap, index, 0, live, top, total, dot, True)
    for k in range(whole, count, T * F):
        top, total, dot = _add(U, Z, at + k * gap, index, count - k, live, top, total, dot, False)
    most = tl.max(top, axis=1, keep_dims=True)
    shrink = _shrink(top, most)
    total = tl.sum(total * shrink, axis=1, keep_dims=True)
    mean = (tl.sum(dot * shrink, axis=1, keep_dims=True) / total).to(U.dtype.element_ty)
    weight = (factor / total).to(U.dtype.element_ty)
    zero = _origin(most)
    for k in range(0, whole, T * F):
        _write(U, Z, at + k * gap, index, 0, live, used, exists, zero, mean, weight, True)
    for k in range(whole, count, T * F):
        _write(U, Z, at + k * gap, index, count - k, live, used, exists, zero, mean, weight, False)
