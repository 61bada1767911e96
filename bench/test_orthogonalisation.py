"""Orthogonalise one new vector against 40 of 11e6 float32, and each stream against a plain read."""

import statistics

import pytest
import torch
from conftest import median, rounds

from fasthessian import kernels
from fasthessian.vectors import empty_rows

K, N = 40, 11_000_000
SCALE = N**0.5  # of float16 rows, as a compressed basis stores them


@pytest.fixture(scope="module")
def basis():
    """40 orthonormal rows (by CholeskyQR2) and two more random ones."""
    backend = kernels.select("cpu")
    rows = empty_rows(K + 2, N, torch.float32, "cpu")
    for i, row in enumerate(rows):
        backend.normal_(row, 1, i * N)
    V = rows[:K]
    for _ in range(2):
        L = torch.linalg.cholesky((V @ V.T).double())
        for start in range(0, N, 1 << 18):
            tile = V[:, start : start + (1 << 18)]
            tile.copy_(torch.linalg.solve_triangular(L, tile.double(), upper=False))
    return rows


def four_gemv(V, w):
    """CGS2 as torch writes it: two rounds of mv and addmv."""
    for _ in range(2):
        w.addmv_(V.T, torch.mv(V, w), alpha=-1)
    w /= w.norm()


def per_vector(vectors, w):
    """One pass of dot and out-of-place axpy over a Python list, as hessian-eigenthings does."""
    for v in vectors:
        w = -torch.dot(v, w).item() * v + w
    return w / w.norm().item()


def dcgs2(backend, V, W, scale=1.0):
    """One delayed step: both vectors projected, then corrected and mixed."""
    C, G = backend.project_(V, W)
    C /= scale
    nu2 = G[0, 0] - C[:, 0] @ C[:, 0]
    nu, t = nu2.sqrt(), (G[0, 1] - C[:, 0] @ C[:, 1]) / nu2
    S = torch.stack((torch.stack((1 / nu, 0 * nu)), torch.stack((-t / nu, 1 / nu))))
    backend.update_(V, W, C / scale, S)


def cgs2(backend, V, w):
    C, _ = backend.project_(V, w)
    C, G = backend.project_(V, w, C)
    nu = (G[0, 0] - C[:, 0] @ C[:, 0]).sqrt()
    backend.update_(V, w, C, (1 / nu).reshape(1, 1))


def overlap(V, w):
    """Largest |cos| of the angle between w and the rows of V."""
    return float((kernels.reference.project_(V, w[None])[0].abs().max()) / w.double().norm())


def test_orthogonalisation(basis, row, benchmark):
    backend = kernels.select("cpu", "native")
    V, W, w = basis[:K], basis[K:], basis[K]
    fresh = W.clone()
    vectors = list(V)
    contenders = {
        "dcgs2": lambda: dcgs2(backend, V, W),
        "cgs2": lambda: cgs2(backend, V, W[:1]),
        "gemv": lambda: four_gemv(V, w),
        "loop": lambda: per_vector(vectors, w),
    }

    def prepare():
        W.copy_(fresh)

    for name, bound in (("dcgs2", 1e-7), ("cgs2", 1e-7), ("gemv", 1e-6)):
        prepare()
        contenders[name]()
        assert overlap(V, w) < bound, name
    half = empty_rows(K + 2, N, torch.float16, "cpu")
    half.copy_(basis * SCALE)
    contenders["dcgs2, float16"] = lambda: dcgs2(backend, half[:K], W, SCALE)
    prepare()
    contenders["dcgs2, float16"]()
    assert overlap(V, w) < 1e-3
    times = rounds(contenders, 9, prepare)
    middle = median(times)
    row("DCGS2 against four-GEMV CGS2 (torch)", middle["gemv"] / middle["dcgs2"], target=">= 1.8")
    row("CGS2 against four-GEMV CGS2 (torch)", middle["gemv"] / middle["cgs2"])
    row(
        "DCGS2 against one pass of per-vector loop", middle["loop"] / middle["dcgs2"], target=">= 8"
    )
    row("DCGS2 on a float16 basis against four-GEMV CGS2 (float32)",
        middle["gemv"] / middle["dcgs2, float16"])  # fmt: skip
    row("DCGS2: float32 basis over float16 basis", middle["dcgs2"] / middle["dcgs2, float16"])
    prepare()
    benchmark.pedantic(contenders["dcgs2"], rounds=3, setup=prepare)


def test_streams_against_a_plain_read(basis, row):
    """Bytes a second of each pass over those of a plain read right before it; median of rounds."""
    backend = kernels.select("cpu", "native")
    W, fresh = basis[K:], basis[K:].clone()
    half = empty_rows(K + 2, N, torch.float16, "cpu")
    half.copy_(basis * SCALE)
    H, S = torch.zeros(K, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    one = H[:, :1].contiguous()
    for rows, name, goal in ((basis, "", ">= 0.9"), (half, " of a float16 basis", None)):
        V, size, everything = rows[:K], rows.element_size(), rows.shape[0] * rows.stride(0)
        passes = {  # and the float32 words of W: project reads its rows, the others write them too
            "project stream (2 rows of W)": (lambda V=V: backend.project_(V, W), 2, goal),
            "update stream (2 rows of W)": (lambda V=V: backend.update_(V, W, H, S), 4, goal),
            "corrected projection (1 row of W)": (
                lambda V=V: backend.project_(V, W[:1], one), 2, None,
            ),
        }  # fmt: skip
        W.copy_(fresh)
        want, _ = kernels.reference.project_(V, W)
        for what, (stream, _, _) in passes.items():
            found = stream()
            assert torch.equal(W, fresh), what  # H is zero and S the identity
            if found is not W:
                b = found[0].shape[1]
                torch.testing.assert_close(
                    found[0], want[:, :b], rtol=0, atol=1e-8 * float(V[0].norm())
                )
        contenders = {}
        for what, (stream, _, _) in passes.items():
            contenders[f"read before {what}"] = lambda rows=rows: plain_read(rows)
            contenders[what] = stream
        times = rounds(contenders, 15, lambda: W.copy_(fresh))
        for what, (_, words, target) in passes.items():
            share = (K * size + words * 4) * N / (everything * size)
            shares = [
                share * read / own
                for read, own in zip(times[f"read before {what}"], times[what], strict=True)
            ]
            row(f"{what}{name} over a plain read", statistics.median(shares), target=target)
        reads = [t for what in passes for t in times[f"read before {what}"]]
        speed = everything * size / statistics.median(reads)
        row(f"plain read{name}", speed / 1e9, "GB/s", slowest=everything * size / max(reads) / 1e9,
            fastest=everything * size / min(reads) / 1e9)  # fmt: skip


def plain_read(basis):
    """Sum of all bytes with every thread: torch's float32 sum over the flat buffer."""
    flat = basis.as_strided((basis.shape[0] * basis.stride(0),), (1,))
    return flat.view(torch.float32).sum()
