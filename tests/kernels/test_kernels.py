"""One conformance suite for every backend and instruction set, against float64 references.

Tolerances are error budgets. Kernels accumulate in float64 and round W once. So dot products have
the rounding of float64 sums, and a corrected W has one rounding in its own dtype.
"""

import pytest
import torch

from fasthessian.kernels import reference
from tests.support.backends import ROWS
from tests.support.kernel_cases import F16, F32, F64, each_backend, rows

SHAPES = [  # k, n, and by how many numbers the rows are padded and shifted, so not aligned
    (0, 5, 0), (1, 1, 3), (3, 7, 3), (5, 1023, 0), (4, 1024, 0), (9, 1025, 3), (40, 4099, 5),
    (3, 0, 0), (101, 20001, 0),
]  # fmt: skip
TYPES = [(F32, F32), (F64, F64), (F32, F64), (F64, F32), (F16, F32), (F16, F64)]


def expected(V, W, H=None, S=None):
    """The contract in float64 by plain matrix products on the CPU; W is rounded once."""
    V64, W64 = V.cpu().double(), W.cpu().double()
    if H is not None:
        W64 = W64 - H.cpu().T @ V64
    if S is not None:
        W64 = S.cpu() @ W64
    rounded = W64.to(W.dtype).double()
    return rounded, V64 @ rounded.T, rounded @ rounded.T


def assert_within_rounding(found, want, scale, eps):
    error = (found.cpu() - want).abs()
    worst = (error / scale).max() if error.numel() else 0
    assert bool((error <= 4 * eps * scale + 1e-300).all()), f"{worst:.2e} of {eps}"


def assert_same(found, want):
    """Equal except for the order of a float64 sum, which depends on the rows of V on a GPU."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, want, rtol=4 * eps, atol=1e3 * torch.finfo(F64).eps)


def widths(row, k, vtype, wtype):
    if row.slow and k in (5, 101):  # rows that are not aligned; others with 1025 and 4099 numbers
        return (2,)
    if not row.slow or (vtype, wtype) == (F32, F32):
        return 1, 2, 3, 8
    # with float16, the size of the block changes how threads share its rows
    return (1, 2, 8) if vtype is F16 else (2,)


@each_backend
@pytest.mark.parametrize(("k", "n", "pad"), SHAPES)
@pytest.mark.parametrize(("vtype", "wtype"), TYPES, ids=lambda t: str(t).removeprefix("torch."))
def test_project_and_update_match_float64(row, k, n, vtype, wtype, pad):
    backend = row.module()
    for b in widths(row, k, vtype, wtype):
        V, W = rows(k, n, vtype, 1, pad, row.device), rows(b, n, wtype, 2, pad, row.device)
        H, S = rows(k, b, F64, 3, 0, row.device), rows(b, b, F64, 4, 0, row.device)
        before = V.clone()
        eps64, eps = torch.finfo(F64).eps, torch.finfo(wtype).eps
        absolute, root = V.cpu().double().abs(), max(n, 1) ** 0.5
        magnitude = W.cpu().double().abs() + H.cpu().abs().T @ absolute

        C, G = backend.project_(V, W)
        _, want_C, want_G = expected(V, W)
        size = W.cpu().double().abs()
        assert C.shape == (k, b) and C.dtype == F64 and G.shape == (b, b) and G.dtype == F64
        assert C.device == V.device and G.device == V.device
        assert_within_rounding(C, want_C, absolute @ size.T * root + 1e-300, eps64)
        assert_within_rounding(G, want_G, size @ size.T * root + 1e-300, eps64)

        corrected = rows(b, n, wtype, 2, pad, row.device)
        C, G = backend.project_(V, corrected, H)
        want_W, _, _ = expected(V, W, H)
        reach = magnitude * (1 + k * eps64 / eps)
        assert_within_rounding(corrected.double(), want_W, reach, eps)
        _, want_C, want_G = expected(V, corrected)  # dot products use the stored numbers
        size = corrected.cpu().double().abs()
        assert_within_rounding(C, want_C, absolute @ size.T * root + 1e-300, eps64)
        assert_within_rounding(G, want_G, size @ size.T * root + 1e-300, eps64)

        for mix in (None, S):
            updated = rows(b, n, wtype, 2, pad, row.device)
            assert backend.update_(V, updated, H, mix) is updated
            want_W, _, _ = expected(V, W, H, mix)
            spread = reach if mix is None else mix.cpu().abs() @ reach
            assert_within_rounding(updated.double(), want_W, spread, eps)
        assert torch.equal(V, before)


@each_backend
@pytest.mark.parametrize("vtype", [F32, F64, F16])
@pytest.mark.parametrize(("k", "count", "n"), [(1, 0, 65), (9, 4, 1025), (40, 39, 4099)])
def test_rows_beyond_the_count_are_not_used(row, vtype, k, count, n):
    """Even if they hold NaN, and if the count is on the device."""
    backend, wtype = row.module(), F64 if vtype is F64 else F32
    V, H = rows(k, n, vtype, 1, 0, row.device), rows(k, 2, F64, 3, 0, row.device)
    V[count:], H[count:] = float("nan"), float("nan")
    W = rows(2, n, wtype, 2, 0, row.device)
    first, first_G = backend.project_(V[:count], W)
    fixed = W.clone()
    second, second_G = backend.project_(V[:count], fixed, H[:count])
    updated = backend.update_(V[:count], W.clone(), H[:count])
    cell = torch.tensor([count], dtype=torch.int64, device=row.device)
    for given in (count, cell):
        C, G = backend.project_(V, W, count=given)
        assert_same(C[:count], first), assert_same(G, first_G)
        assert C.shape == (k, 2) and not bool(C[count:].any())
        again = W.clone()
        C, G = backend.project_(V, again, H, count=given)
        assert_same(C[:count], second), assert_same(G, second_G), assert_same(again, fixed)
        assert not bool(C[count:].any())
        assert_same(backend.update_(V, W.clone(), H, count=given), updated)
    assert int(cell) == count


@each_backend
@pytest.mark.parametrize(("vtype", "wtype"), TYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("pad", [0, 3])
def test_append_stores_a_row_and_the_next_candidate(row, vtype, wtype, pad):
    backend = row.module()
    for k, n, count, b in ((1, 1, 0, 1), (3, 129, 2, 2), (10, 2051, 7, 2), (10, 2051, 9, 3)):
        H, S = rows(k, b, F64, 3, 0, row.device), rows(b, b, F64, 4, 0, row.device)
        for given in (count, torch.tensor([count], device=row.device)):
            V, W = rows(k, n, vtype, 1, pad, row.device), rows(b, n, wtype, 2, pad, row.device)
            before, old = V.clone(), W.clone()
            assert backend.update_(V, W, H, S, count=given, append=3.0) is W
            result = S.cpu() @ (
                old.cpu().double() - H[:count].cpu().T @ before[:count].cpu().double()
            )
            reach = S.cpu().abs() @ (
                old.cpu().double().abs()
                + H[:count].cpu().abs().T @ before[:count].cpu().double().abs()
            )
            # half an ulp of the row's dtype (of subnormals for float16), plus rounding in float64
            half = torch.finfo(vtype).eps / 2 * 3 * result[0].abs() + 3e-8 * (vtype is F16)
            row_error = (V[count].cpu().double() - 3 * result[0]).abs()
            assert bool((row_error <= half + 4 * torch.finfo(F64).eps * 3 * reach[0]).all())
            assert_within_rounding(W[0].double(), result[-1], reach[-1], torch.finfo(wtype).eps)
            others = [i for i in range(k) if i != count]
            assert torch.equal(V[others], before[others]) and torch.equal(W[1:], old[1:])


@each_backend
def test_half_precision_rows_are_rounded_to_nearest_even(row):
    """Every float16, the midpoints between neighbours, and numbers beyond the largest float16."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(F16)
    finite = every[torch.isfinite(every)].double().sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    edges = torch.tensor([65519.9, 65520.0, 1e30, -65520.0, 1e-30, float("inf"), float("nan")])
    values = torch.cat([every.double(), middle, middle * (1 + 1e-6), edges.double()]).float()
    V = torch.zeros(1, len(values), dtype=F16, device=row.device)
    W = values[None].clone().to(row.device)
    none = torch.zeros(1, 1, dtype=F64, device=row.device)
    row.module().update_(V, W, none, count=0, append=1.0)
    torch.testing.assert_close(V[0].cpu(), values.to(F16), rtol=0, atol=0, equal_nan=True)
    one = torch.ones(1, 1, dtype=F64, device=row.device)
    W.zero_()
    row.module().update_(V, W, -one)
    torch.testing.assert_close(W[0].cpu(), values.to(F16).float(), rtol=0, atol=0,
                               equal_nan=True)  # fmt: skip


def recurrence(j, m, seed):
    """C, G, T, gauges of a run with j rows, whose candidate is nearly orthogonal to the rows."""
    generator = torch.Generator().manual_seed(seed)
    C = torch.randn(m, 2, generator=generator, dtype=F64)
    C[:, 0] *= 1e-7
    C[j:] = 0
    G = torch.tensor([[2.25, 0.4], [0.4, 9.0]], dtype=F64)
    T = torch.randn(m + 1, m + 1, generator=generator, dtype=F64)
    return C, G, (T + T.T) / 2, torch.full((m + 1, 3), 7.0, dtype=F64)


@each_backend
@pytest.mark.parametrize(("j", "m"), [(0, 1), (0, 5), (3, 5), (40, 41), (100, 130), (600, 700)])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_recurrence_matches_the_reference(row, j, m, scale):
    given = recurrence(j, m, 1)
    want = [x.clone() for x in given]
    want_H, want_S = reference.recur_(*want, count=j, scale=scale)
    for count in (j, torch.tensor([j, -5], device=row.device)):
        wide = torch.zeros(m + 1, m + 9, dtype=F64, device=row.device)  # T and gauges share rows
        T, gauges = wide[:, : m + 1], wide[:, m + 4 : m + 7]
        C, G = given[0].to(row.device), given[1].to(row.device)
        T.copy_(given[2])
        gauges.copy_(given[3])
        H, S = row.module().recur_(C, G, T, gauges, count=count, scale=scale)
        for found, expect in ((H, want_H), (S, want_S), (T, want[2]), (gauges, want[3])):
            torch.testing.assert_close(found.cpu(), expect, rtol=1e-12, atol=1e-12)
        if not isinstance(count, int):
            assert count.tolist() == [j + 1, j]
        assert not wide[:, m + 1 : m + 4].any() and not wide[:, m + 7 :].any()


@each_backend
@pytest.mark.parametrize("cause", ["inside the basis", "zero", "nan in u", "nan in w"])
def test_recurrence_reports_a_dependent_candidate(row, cause):
    j, m = 4, 6
    C, G, T, gauges = (x.to(row.device) for x in recurrence(j, m, 2))
    if cause == "inside the basis":
        C[0, 0] = 1.5 - 1e-9
    elif cause == "zero":
        C.zero_(), G.zero_()
    elif cause == "nan in u":
        G[0, 0] = C[2, 0] = float("nan")
    else:
        G[0, 1] = C[2, 1] = float("nan")
    before = T.clone()
    H, S = row.module().recur_(C, G, T, gauges, count=j)
    if cause == "nan in w":
        assert torch.isnan(T[j, j]) and torch.isnan(gauges[j, 2])
        return
    assert not H.any() and not S.any()
    assert not T[j, : j + 1].any() and not T[: j + 1, j].any()
    assert T[j + 1, : j + 1].tolist() == [0.0] * j + [1.0]
    assert torch.equal(T[:j, :j], before[:j, :j])
    gauges = gauges.cpu()
    assert not gauges[j, 1] > 1e-4 * gauges[j, 0] and gauges[j, 2] == 0


NATIVE_CPU = [row for row in ROWS if str(row) == "native"]


@pytest.mark.parametrize("row", NATIVE_CPU, ids=str)
def test_same_bits_for_any_number_of_threads(row):
    backend = row.module()
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            V, W, H = rows(7, 50001, F32, 1), rows(2, 50001, F32, 2), rows(7, 2, F64, 3)
            C, G = backend.project_(V, W, H)
            half, S = V.half(), rows(2, 2, F64, 4)
            backend.update_(half, W, H, S, count=6, append=2.0)
            signs = backend.signs_(torch.empty(70001), 3, 17)
            normal = backend.normal_(torch.empty(70001), 3, 17)
            packed = backend.pack_(torch.ones(70000), [torch.ones(70000) / 3], 0.7, 0.3)
            found.append((C, G, W, half, signs, normal, packed))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@each_backend
def test_two_calls_have_the_same_bits(row):
    backend = row.module()
    V, H = rows(30, 9001, F32, 1, 0, row.device), rows(30, 2, F64, 3, 0, row.device)
    runs = []
    for seed in (1, 2):
        if hasattr(backend, "seed"):
            backend.seed(seed)  # a different order of the simulated threads
        W = rows(2, 9001, F32, 2, 0, row.device)
        runs.append((*backend.project_(V, W, H), W, *backend.project_(V, W)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@each_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate(row, bad):
    backend = row.module()
    V, W = rows(3, 2000, F32, 1, 0, row.device), rows(2, 2000, F32, 2, 0, row.device)
    V[1, 1999] = bad
    C, G = backend.project_(V, W)
    assert not torch.isfinite(C[1]).any() and torch.isfinite(C[[0, 2]]).all()
    assert torch.isfinite(G).all()
    backend.update_(V, W, torch.ones(3, 2, dtype=F64, device=row.device))
    assert not torch.isfinite(W[:, 1999]).any() and torch.isfinite(W[:, :1999]).all()
