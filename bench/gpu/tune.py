"""``make tune``: find tile configurations of Triton's streams that beat the fixed table, on a GPU.

Every candidate is checked against the reference and timed, for each number of rows k, length n and
type of the basis. Nothing is chosen at run time: a better configuration is entered by hand into
``fasthessian/kernels/triton/tiles.py``, so that the same input keeps giving the same bits.
"""

import argparse
import itertools
import sys
import time
from unittest import mock

import torch
from triton.runtime.errors import TritonError

from bench.gpu.meter import Rows, milliseconds
from bench.gpu.streams import F16, F32, F64, append, compare, corrected, dots, filled, short
from fasthessian.kernels import reference
from fasthessian.kernels.triton import backend as triton_backend
from fasthessian.kernels.triton.tiles import BOTH, DOTS, UPDATE, tile

BLOCKS = (2, 4, 8, 16)  # BK: rows of V at a time
REGISTERS = (80, 96, 128, 168, 255)  # per thread at most


def cases(k, n, dtype, device):
    """The calls that Lanczos makes, in both schedules: (kind, case, V, W)."""
    V, fresh = filled(k + 1, n, dtype, device), filled(2, n, F64 if dtype is F64 else F32, device)
    W = torch.empty_like(fresh)
    yield DOTS, dots(V[:k], W, fresh), V, W
    yield DOTS, dots(V[:k], W[:1], fresh[:1]), V, W[:1]
    yield BOTH, corrected(V[:k], W[:1], fresh[:1]), V, W[:1]
    yield UPDATE, append(V, W, fresh), V, W


def timed(case, shape, expected, device, repeats):
    """Milliseconds with this configuration instead of the table's, after a check of its result."""
    with mock.patch.object(triton_backend, "tile", lambda *_: shape):
        case.restore()
        compare(case.what, case.run(triton_backend), expected)
        return milliseconds(lambda: case.run(triton_backend), device, repeats, warm=1, queued=True)


def tuned(rows, kind, case, V, W, options, end):
    """Add one row: the table's time, the best candidate's, and how many were tried."""
    device = V.device
    case.restore()
    expected = [x.clone() for x in case.run(reference)]
    usual = tile(V, W, kind)
    times, refused = {}, 0
    candidates = [
        (usual.BK, usual.registers),
        *itertools.product(options.blocks, options.registers),
    ]
    for BK, registers in dict.fromkeys(candidates):
        if times and time.monotonic() > end:
            break
        shape = usual._replace(BK=BK, registers=registers)
        try:
            times[BK, registers] = timed(case, shape, expected, device, options.repeats)
        except (RuntimeError, TritonError):  # more registers or shared memory than the chip has
            refused += 1
    best, first = min(times, key=times.get), (usual.BK, usual.registers)
    rows.add(f"{case.what} n={V.shape[1]}", table=first, best=best, ms=times[best],
             over_table=times[best] / times[first], gb_s=case.bytes / times[best] / 1e6,
             tried=len(times), refused=refused)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--n", type=int, nargs="+", default=[100_000, 20_000_000])
    parser.add_argument("--k", type=int, nargs="+", default=[10, 40, 100])
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, metavar="BK")
    parser.add_argument("--registers", type=int, nargs="+", default=REGISTERS)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=480, help="no candidate is begun later")
    parser.add_argument("--json")
    options = parser.parse_args()
    device, rows = torch.device(options.device), Rows(options.json)
    reason = triton_backend.unavailable(device)
    if reason is not None:
        parser.exit(2, f"Triton cannot serve {device}: {reason}\n")
    torch.manual_seed(0)
    end = time.monotonic() + options.seconds
    for n, dtype, k in itertools.product(sorted(options.n), (F32, F16, F64), options.k):
        with rows.section(f"k={k} n={n} {short(dtype)}"):
            for kind, case, V, W in cases(k, n, dtype, device):
                tuned(rows, kind, case, V, W, options, end)
    sys.exit(rows.failed)


if __name__ == "__main__":
    main()
