"""One conformance suite for every backend and instruction set, against float64 references.

Tolerances are error budgets: kernels accumulate in float64 and round W once, so dots are within
the rounding of float64 sums and a corrected W within one rounding of its own dtype.
"""

import os
import subprocess
import sys

import pytest
import torch

from fasthessian import kernels
from fasthessian.kernels import native, reference

BACKENDS = [name for name, module in kernels.BACKENDS.items() if module.unavailable() is None]
F32, F64 = torch.float32, torch.float64
SHAPES = [  # k, n, and numbers by which the rows are padded and shifted off alignment
    (0, 5, 0), (1, 1, 3), (3, 7, 3), (5, 1023, 0), (4, 1024, 0), (9, 1025, 3), (40, 4099, 5),
    (101, 20001, 0),
]  # fmt: skip


@pytest.fixture(params=BACKENDS)
def backend(request):
    return kernels.BACKENDS[request.param]


def rows(k, n, dtype, seed, pad=0):
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(k, n + pad, generator=generator, dtype=F64).to(dtype)
    return buffer[:, pad // 2 : pad // 2 + n]


def expected(V, W, H=None, S=None):
    """The contract in float64 with plain matrix products, W rounded once to its dtype."""
    W64 = W.double()
    if H is not None:
        W64 = W64 - H.T @ V.double()
    if S is not None:
        W64 = S @ W64
    rounded = W64.to(W.dtype).double()
    return rounded, V.double() @ rounded.T, rounded @ rounded.T


def assert_within_rounding(found, want, scale, eps):
    error = (found - want).abs()
    assert bool((error <= 4 * eps * scale + 1e-300).all()), f"{(error / scale).max():.2e} of {eps}"


@pytest.mark.parametrize(("k", "n", "pad"), SHAPES)
@pytest.mark.parametrize("b", [1, 2, 3, 8])
@pytest.mark.parametrize(("vtype", "wtype"), [(F32, F32), (F64, F64), (F32, F64), (F64, F32)])
def test_project_and_update_match_float64(backend, k, n, b, vtype, wtype, pad):
    V, W = rows(k, n, vtype, 1, pad), rows(b, n, wtype, 2, pad)
    H, S = rows(k, b, F64, 3), rows(b, b, F64, 4)
    before = V.clone()
    eps64, eps = torch.finfo(F64).eps, torch.finfo(wtype).eps
    magnitude = W.double().abs() + H.abs().T @ V.double().abs()

    C, G = backend.project_(V, W)
    _, want_C, want_G = expected(V, W)
    dot_scale = V.double().abs() @ W.double().abs().T + 1e-300
    assert C.shape == (k, b) and C.dtype == F64 and G.shape == (b, b) and G.dtype == F64
    assert_within_rounding(C, want_C, dot_scale * max(n, 1) ** 0.5, eps64)
    assert_within_rounding(G, want_G, W.double().abs() @ W.double().abs().T * n**0.5, eps64)

    corrected = rows(b, n, wtype, 2, pad)
    C, G = backend.project_(V, corrected, H)
    want_W, _, _ = expected(V, W, H)
    assert_within_rounding(corrected.double(), want_W, magnitude * (1 + (k * eps64 / eps)), eps)
    _, want_C, want_G = expected(V, corrected)  # the dots are those of the numbers stored
    scale = V.double().abs() @ corrected.double().abs().T * n**0.5 + 1e-300
    assert_within_rounding(C, want_C, scale, eps64)
    scale = corrected.double().abs() @ corrected.double().abs().T * n**0.5
    assert_within_rounding(G, want_G, scale, eps64)

    for mix in (None, S):
        updated = rows(b, n, wtype, 2, pad)
        assert backend.update_(V, updated, H, mix) is updated
        want_W, _, _ = expected(V, W, H, mix)
        reach = magnitude if mix is None else mix.abs() @ magnitude
        assert_within_rounding(updated.double(), want_W, reach * (1 + k * eps64 / eps), eps)
    assert torch.equal(V, before)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_same_bits_for_any_number_of_threads(name):
    backend = kernels.BACKENDS[name]
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            V, W, H = rows(7, 50001, F32, 1), rows(2, 50001, F32, 2), rows(7, 2, F64, 3)
            C, G = backend.project_(V, W, H)
            signs = backend.signs_(torch.empty(70001), 3, 17)
            normal = backend.normal_(torch.empty(70001), 3, 17)
            packed = backend.pack_(torch.ones(70000), [torch.ones(70000) / 3], 0.7, 0.3)
            found.append((C, G, W, signs, normal, packed))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_same_bits_twice(backend):
    V, H = rows(30, 9001, F32, 1), rows(30, 2, F64, 3)
    runs = []
    for _ in range(2):
        W = rows(2, 9001, F32, 2)
        runs.append((*backend.project_(V, W, H), W))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_is_carried_through(backend, bad):
    V, W = rows(3, 2000, F32, 1), rows(2, 2000, F32, 2)
    V[1, 1999] = bad
    C, G = backend.project_(V, W)
    assert not torch.isfinite(C[1]).any() and torch.isfinite(C[[0, 2]]).all()
    assert torch.isfinite(G).all()
    backend.update_(V, W, torch.ones(3, 2, dtype=F64))
    assert not torch.isfinite(W[:, 1999]).any() and torch.isfinite(W[:, :1999]).all()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 10007])
@pytest.mark.parametrize("offset", [0, 1, 31, 128, 1000003, 2**40 + 5])
def test_random_streams_match_the_reference(backend, dtype, n, offset):
    seed = 0x1234_5678_9ABC_DEF0
    signs = backend.signs_(torch.full((n,), 7.0, dtype=dtype), seed, offset)
    assert torch.equal(signs, reference.signs_(torch.empty(n, dtype=dtype), seed, offset))
    assert bool((signs.abs() == 1).all())
    normal = backend.normal_(torch.full((n,), 7.0, dtype=dtype), seed, offset)
    want = reference.normal_(torch.empty(n, dtype=dtype), seed, offset)
    torch.testing.assert_close(normal, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-14)


def test_random_streams_are_pieces_of_one_stream(backend):
    whole = backend.normal_(torch.empty(1000), 5, 0)
    parts = [backend.normal_(torch.empty(333), 5, 0), backend.normal_(torch.empty(667), 5, 333)]
    assert torch.equal(whole, torch.cat(parts))
    whole = backend.signs_(torch.empty(1000), 5, 0)
    parts = [backend.signs_(torch.empty(333), 5, 0), backend.signs_(torch.empty(667), 5, 333)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, backend.signs_(torch.empty(1000), 6, 0))


def test_philox_known_answers():
    """The vectors published with Random123 for counter and key all zeros and all ones."""
    words = reference._philox(torch.tensor([0]), 0, 0)
    assert words.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


def test_random_streams_have_the_right_moments(backend):
    x = backend.normal_(torch.empty(200_000, dtype=F64), 11)
    moments = [(x**p).mean().item() for p in (1, 2, 3, 4)]
    for found, want, spread in zip(
        moments, (0, 1, 0, 3), (1, 2**0.5, 15**0.5, 96**0.5), strict=True
    ):
        assert abs(found - want) < 5 * spread / 200_000**0.5
    s = backend.signs_(torch.empty(200_000, dtype=F64), 11)
    assert abs(s.mean().item()) < 5 / 200_000**0.5
    assert abs((s[1:] * s[:-1]).mean().item()) < 5 / 200_000**0.5


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5])
def test_pack(backend, dtype, beta):
    sizes = [(3, 4), (0,), (1,), (), (40001,), (8, 2)]
    tensors = [
        rows(1, max(1, torch.Size(s).numel()), dtype, i).reshape(-1) for i, s in enumerate(sizes)
    ]
    tensors = [t[: torch.Size(s).numel()].reshape(s) for t, s in zip(tensors, sizes, strict=True)]
    tensors.append(rows(6, 9, dtype, 50).T)  # not contiguous
    flat = torch.cat([t.reshape(-1) for t in tensors]).double()
    out = torch.full((flat.numel(),), float("nan") if beta == 0 else 2.0, dtype=dtype)
    want = 0.3 * flat + (0 if beta == 0 else 2.0 * beta)
    assert backend.pack_(out, tensors, 0.3, beta) is out
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=4 * eps, atol=4 * eps)


BAD = [
    (lambda b: b.project_(torch.ones(2, 5), torch.ones(9, 5)), "1 to 8 rows"),
    (lambda b: b.project_(torch.ones(2, 5), torch.ones(1, 6)), "one length"),
    (lambda b: b.project_(torch.ones(2, 5).half(), torch.ones(1, 5)), "V must be"),
    (lambda b: b.project_(torch.ones(5, 2).T, torch.ones(1, 5)), "unit stride"),
    (
        lambda b: b.update_(torch.ones(2, 5), torch.ones(1, 5), torch.ones(1, 2)),
        "H must have shape",
    ),
    (lambda b: b.signs_(torch.ones(5), -1), "seed"),
    (lambda b: b.normal_(torch.ones(5), 1, -1), "offset"),
    (lambda b: b.normal_(torch.ones(5, dtype=torch.int64), 1), "out must be"),
    (lambda b: b.pack_(torch.ones(5), [torch.ones(4)]), "room for 5"),
    (lambda b: b.pack_(torch.ones(5), [torch.ones(5, dtype=F64)]), "tensors must be"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments_are_one_clear_line(backend, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(backend)
    assert "\n" not in str(caught.value)


def test_select_prefers_native_and_names_its_reasons(monkeypatch):
    assert kernels.select("cpu", "reference") is reference
    monkeypatch.setenv("FASTHESSIAN_BACKEND", "reference")
    assert kernels.select("cpu") is reference
    monkeypatch.setenv("FASTHESSIAN_BACKEND", "cobol")
    with pytest.raises(ValueError, match="native, reference"):
        kernels.select("cpu")
    monkeypatch.delenv("FASTHESSIAN_BACKEND")
    assert kernels.select("meta") is reference
    with pytest.raises(RuntimeError, match="does not serve meta"):
        kernels.select("meta", "native")
    monkeypatch.setattr(native, "_reason", "the extension is not built")
    assert kernels.select("cpu") is reference
    assert "no: the extension is not built" in kernels.doctor()
    with pytest.raises(RuntimeError, match="not built"):
        kernels.select("cpu", "native")


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_passes_this_suite(isa):
    """The same tests in a process where FASTHESSIAN_ISA forces the level."""
    if native.unavailable() is not None:
        pytest.skip(f"no native backend: {native.unavailable()}")
    if isa not in native._native.isas():
        pytest.skip(f"this processor has no {isa}")
    if os.environ.get("FASTHESSIAN_ISA"):
        pytest.skip("already inside the forced process")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-k",
        "native",
        "-p",
        "no:cacheprovider",
        __file__,
    ]
    env = {**os.environ, "FASTHESSIAN_ISA": isa}
    check = "import sys; from fasthessian import _native as m; sys.exit(m.isa() != sys.argv[1])"
    assert subprocess.run([sys.executable, "-c", check, isa], env=env).returncode == 0
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


def test_unknown_instruction_set_is_named(tmp_path):
    if native.unavailable() is not None:
        pytest.skip(f"no native backend: {native.unavailable()}")
    code = "from fasthessian.kernels import native; print(native.unavailable())"
    env = {**os.environ, "FASTHESSIAN_ISA": "mmx"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "FASTHESSIAN_ISA=mmx" in run.stdout and "accepted: generic" in run.stdout


def test_one_openmp_runtime_is_mapped():
    """A second libgomp would make every call that alternates with torch 1000 times slower."""
    if native.unavailable() is not None:
        pytest.skip(f"no native backend: {native.unavailable()}")
    code = "import fasthessian; print(open('/proc/self/maps').read())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    paths = {line.split()[-1] for line in run.stdout.splitlines() if line}
    assert len({path for path in paths if "libgomp" in path or "libomp" in path}) == 1
