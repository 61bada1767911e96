"""The streams of the kernel contract on a GPU: checked against the reference, then timed.

The bytes of a case are the minimum: V and W read once, each result written once. The ceiling is a
device-to-device copy in the same run; its bytes are those read and those written.
"""

import argparse
import itertools
import sys
from dataclasses import dataclass

import torch

from bench.gpu.meter import Rows, milliseconds
from fasthessian import kernels
from fasthessian.vectors import empty_rows

F16, F32, F64 = torch.float16, torch.float32, torch.float64
DEPTHS, WIDTHS, SIDE = (10, 40, 100), (1, 2, 8), (40,)  # k and b of float32; k of the others
TENSORS = 65  # as in a ResNet-20


@dataclass
class Case:
    """One call: ``run(backend)`` returns what is compared; ``rival()`` is the same call in torch.

    ``restore()`` resets the inputs and fills the outputs with NaN.
    """

    what: str
    bytes: int
    restore: object
    run: object
    rival: object = None


def short(dtype):
    return str(dtype).removeprefix("torch.")


def filled(k, n, dtype, device):
    """Random rows; zeros could run faster than data."""
    rows = empty_rows(k, n, dtype, device)
    for row in rows:
        row.copy_(torch.randn(n, device=device))
    return rows


def blocks(n, dtype, device):
    """project_ and update_ over rows of one dtype."""
    depths, widths = (DEPTHS, WIDTHS) if dtype is F32 else (SIDE, WIDTHS[:2])
    V = filled(max(depths) + 1, n, dtype, device)
    fresh = filled(max(widths), n, F64 if dtype is F64 else F32, device)
    W = torch.empty_like(fresh)
    for k in depths:
        for b in widths:
            yield dots(V[:k], W[:b], fresh[:b])
        yield corrected(V[:k], W[:1], fresh[:1])
        yield append(V[: k + 1], W[:2], fresh[:2])
        V[k].copy_(fresh[0])  # this row belongs to the next depth


def case_of(what, V, W, words, run, rival, restore):
    """A case that moves every row of V and ``words`` rows of W's length and dtype."""
    rival = rival if V.dtype is W.dtype else None  # torch has no product of two dtypes
    moved = V.shape[1] * (len(V) * V.dtype.itemsize + words * W.dtype.itemsize)
    return Case(f"{what} {short(V.dtype)}", moved, restore, run, rival)


def dots(V, W, fresh):
    def run(backend):
        return backend.project_(V, W)

    def rival():
        return V @ W.T, W @ W.T

    what = f"project b={len(W)} k={len(V)}"
    return case_of(what, V, W, len(W), run, rival, lambda: W.copy_(fresh))


def corrected(V, W, fresh):
    H = 1e-4 * torch.randn(len(V), 1, dtype=F64, device=V.device)
    h = H.to(W.dtype)

    def run(backend):
        return *backend.project_(V, W, H), W

    def rival():
        W.addmm_(h.T, V, alpha=-1)
        return V @ W.T, W @ W.T

    what = f"project with H b=1 k={len(V)}"
    return case_of(what, V, W, 2, run, rival, lambda: W.copy_(fresh))


def append(V, W, fresh):
    """V (k + 1, n): the call writes the last row."""
    k = len(V) - 1
    H = 1e-4 * torch.randn(k + 1, 2, dtype=F64, device=V.device)
    S = torch.tensor([[0.9, 0.1], [-0.1, 0.9]], dtype=F64, device=V.device)
    h, mix = H[:k].to(W.dtype), S.to(W.dtype)

    def run(backend):
        backend.update_(V, W, H, S, count=k, append=0.5)
        return V[k], W[0]

    def rival():
        made = mix @ W.addmm_(h.T, V[:k], alpha=-1)
        V[k].copy_(made[0])
        W[0].copy_(made[1])

    def restore():
        W.copy_(fresh)
        V[k].fill_(float("nan"))

    # k rows read and one written, two rows of W read and one written
    return case_of(f"update S append b=2 k={k}", V, W, 3, run, rival, restore)


def vectors(n, device):
    """signs_, normal_ and pack_ on one vector."""
    out, source = torch.empty(n, device=device), torch.randn(n, device=device)
    cuts = [n * i // TENSORS for i in range(TENSORS + 1)]
    pieces = [source[a:b].clone() for a, b in itertools.pairwise(cuts)]

    def poison():
        out.fill_(float("nan"))

    yield Case("signs float32", 4 * n, poison, lambda backend: (backend.signs_(out, 7, 3),))
    yield Case("normal float32", 4 * n, poison, lambda backend: (backend.normal_(out, 7, 3),),
               lambda: (out.normal_(),))  # fmt: skip
    yield Case(f"pack {TENSORS} tensors float32", 8 * n, poison,
               lambda backend: (backend.pack_(out, pieces, 0.5),),
               lambda: (torch.cat(pieces, out=out),))  # fmt: skip


def logits(n, device):
    """softmax_curvature_ of two vocabularies, one not a multiple of 16 bytes, and of pixels."""
    for classes, inner in ((50304, 1), (50257, 1), (21, 4096)):
        shape = (max(1, n // (classes * inner)), classes, inner)
        fresh, Z = torch.randn(2, *shape, device=device)
        Z *= 0.1  # with this and the scale, tangents keep their size over repeated calls
        scale = torch.full((shape[0], inner), float(classes), dtype=F64, device=device)
        what = f"softmax curvature of {classes}" + (f" x {inner}" if inner > 1 else "")
        yield curvature(what, fresh.clone(), Z, scale, fresh)


def curvature(what, U, Z, scale, fresh):
    narrow = scale[:, None].float()

    def rival():
        p = torch.softmax(Z, 1)
        return (narrow * (p * U - p * (p * U).sum(1, keepdim=True)),)

    def run(backend):
        return (backend.softmax_curvature_(U, Z, scale),)

    return Case(what, 12 * Z.numel(), lambda: U.copy_(fresh), run, rival)


def compare(what, found, expected):
    """Raise if the largest difference exceeds a bound relative to the largest entry."""
    for a, b in zip(found, expected, strict=True):
        error = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-300)
        if not error <= (2e-3 if b.dtype is F16 else 2e-6):
            raise AssertionError(f"{what} differs from the reference by {error:.1e}")


def measure(case, names, rows, device, ceiling, repeats):
    """Check, then time, one case on every backend and on torch."""
    case.restore()
    expected = [x.clone() for x in case.run(kernels.BACKENDS["reference"])]
    contenders = {name: (lambda b=kernels.BACKENDS[name]: case.run(b)) for name in names}
    if case.rival is not None:
        contenders["torch"] = case.rival
    for name, call in contenders.items():
        with rows.section(f"{case.what}, {name}"):
            case.restore()
            found = call()
            if name != "torch":
                compare(f"{case.what} by {name}", found, expected)
            few = name == "reference"  # slow: one launch per tile and operation; not under test
            count, warm = (min(5, repeats), 1) if few else (repeats, 3)
            ms = milliseconds(call, device, count, warm, queued=True)
            speed = case.bytes / ms / 1e6
            rows.add(case.what, backend=name, bytes=case.bytes, ms=ms, gb_s=speed,
                     of_copy=speed / ceiling)  # fmt: skip


def copied(rows, n, device, repeats):
    """GB/s of a copy of n floats, 1.6 GB by default: much larger than any cache."""
    source = torch.randn(n, device=device)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), device, repeats, queued=True)
    speed = 2 * source.nbytes / ms / 1e6
    rows.add("copy device to device", backend="torch", bytes=2 * source.nbytes, ms=ms,
             gb_s=speed, of_copy=1.0)  # fmt: skip
    return speed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--n", type=int, default=20_000_000)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json")
    options = parser.parse_args()
    device, n, rows = torch.device(options.device), options.n, Rows(options.json)
    names = [name for name in kernels.AUTOMATIC[device.type]
             if kernels.BACKENDS[name].unavailable(device) is None]  # fmt: skip
    torch.manual_seed(0)
    ceiling = copied(rows, 20 * n, device, options.repeats)
    for dtype in (F32, F16, F64):
        with rows.section(f"streams {short(dtype)}"):
            for case in blocks(n, dtype, device):
                measure(case, names, rows, device, ceiling, options.repeats)
    with rows.section("vectors"):
        for case in itertools.chain(vectors(n, device), logits(n, device)):
            measure(case, names, rows, device, ceiling, options.repeats)
    sys.exit(rows.failed)


if __name__ == "__main__":
    main()
