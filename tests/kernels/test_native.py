"""The C++ kernels on a CPU: instruction sets, OpenMP, and every way in which a pass is divided.

A pass reads rows of V in groups of 6, 4, 2 and 1, rows of W in groups of 2 and 1, and columns in
runs of up to 32768. The conformance suite (test_kernels.py) does not depend on these numbers and is
too small to reach most of them. Matrix products in float64 are the reference. The error budget is
that of the suite.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fasthessian.kernels import native, reference

pytestmark = pytest.mark.slow

F16, F32, F64 = torch.float16, torch.float32, torch.float64
MISSING = native.unavailable()
needs_native = pytest.mark.skipif(MISSING is not None, reason=f"no native backend: {MISSING}")
types = pytest.mark.parametrize(
    ("vtype", "wtype"),
    [(F32, F32), (F64, F64), (F32, F64), (F64, F32), (F16, F32), (F16, F64)],
    ids=lambda t: str(t).removeprefix("torch."),
)


def window(numbers, dtype):
    """Rows (k, n) that are not aligned, in a buffer that is NaN everywhere else."""
    k, n = numbers.shape
    buffer = torch.full((k + 2, n + 40), float("nan"), dtype=dtype)
    inner = buffer[1 : k + 1, 3 : n + 3]
    inner.copy_(numbers)
    return buffer, inner


def close(found, want, scale, eps):
    error = (found.double() - want).abs()
    return bool((error <= 4 * eps * scale + 1e-300).all())  # also False for NaN


def check(k, n, b, vtype, wtype):
    """Check every kind of pass over V (k, n) and W (b, n): values, and no access outside."""
    eps64, eps = torch.finfo(F64).eps, torch.finfo(wtype).eps
    generator = torch.Generator().manual_seed(3)
    around, V = window(torch.randn(k, n, generator=generator, dtype=F64), vtype)
    outside = torch.isnan(around)
    given = torch.randn(b, n, generator=generator, dtype=F64).to(wtype)
    H = torch.randn(k, b, generator=generator, dtype=F64)
    S = torch.randn(b, b, generator=generator, dtype=F64)
    V64, W64, size = V.double(), given.double(), given.double().abs()
    reach = (size + H.abs().T @ V64.abs()) * (1 + k * eps64 / eps)
    corrected = W64 - H.T @ V64
    passes = {
        "project": lambda W: native.project_(V, W),
        "fused": lambda W: native.project_(V, W, H),
        "update": lambda W: native.update_(V, W, H),
        "mixed": lambda W: native.update_(V, W, H, S),
    }
    wants = {"project": W64, "fused": corrected, "update": corrected, "mixed": S @ corrected}
    scales = {"project": size * 0, "fused": reach, "update": reach, "mixed": S.abs() @ reach}
    for name, run in passes.items():
        buffer, W = window(given, wtype)
        found = run(W)
        what = f"{name} of k={k}, n={n}, b={b}"
        assert close(W, wants[name], scales[name], eps), what
        assert int(torch.isnan(buffer).sum()) == buffer.numel() - b * n, f"{what} wrote outside"
        if isinstance(found, tuple):
            stored, root = W.double(), n**0.5
            C, G = found
            assert close(C, V64 @ stored.T, V64.abs() @ stored.abs().T * root, eps64), what
            assert close(G, stored @ stored.T, stored.abs() @ stored.abs().T * root, eps64), what
    if k > 1:
        append(V, H[: k - 1], S, given)
    assert torch.equal(torch.isnan(around), outside)


def append(V, H, S, old):
    """The last row of V becomes 0.5 times the first row of S (W - H^T V); W becomes the last."""
    k = len(V)
    before = V.clone()
    buffer, W = window(old, old.dtype)
    V64 = V[: k - 1].double()
    native.update_(V, W, torch.cat([H, H[:1]]), S, count=k - 1, append=0.5)
    want = S @ (old.double() - H.T @ V64)
    scale = S.abs() @ (old.double().abs() + H.abs().T @ V64.abs()) * k
    tiny = 2.0**-24 if V.dtype is F16 else 0.0  # the smallest subnormal; rounding is half of it
    row_eps = torch.finfo(V.dtype).eps
    assert close(V[k - 1], 0.5 * want[0], 0.5 * scale[0] + tiny / row_eps, row_eps)
    assert close(W[0], want[-1], scale[-1], torch.finfo(old.dtype).eps)
    assert torch.equal(W[1:], old[1:]) and torch.equal(V[: k - 1], before[: k - 1])
    assert int(torch.isnan(buffer).sum()) == buffer.numel() - old.numel()


@needs_native
@types
@pytest.mark.parametrize("b", range(1, 9))
def test_every_grouping_of_rows(b, vtype, wtype):
    """Each remainder of k by 6, with an incomplete last cache line for every dtype."""
    for k in range(26):
        check(k, 1024 + 37 + k, b, vtype, wtype)


@needs_native
@types
def test_runs_of_every_length(vtype, wtype):
    """The longest runs of each kind, which end within a cache line, and many short runs."""
    for k, n, b in ((9, 300_011, 2), (5, 1_100_003, 3), (3, 2_200_003, 1), (8, 1_600_003, 2)):
        check(k, n, b, vtype, wtype)
    check(0, 1_100_003, 1, vtype, wtype)  # 1075 runs of 1024, three per chunk


@needs_native
def test_short_runs_of_many_rows():
    """A fused pass over so many rows that its runs have the smallest width."""
    check(700, 5003, 2, F64, F64)
    check(1000, 1301, 1, F32, F32)


@needs_native
@pytest.mark.parametrize("vtype", [F16, F32])
def test_infinity_and_nan_reach_only_their_columns_and_sums(vtype):
    for bad in (float("inf"), float("nan")):
        V = torch.ones(12, 5000, dtype=vtype)
        V[9, 4321] = bad
        W, H = torch.ones(2, 5000), torch.zeros(12, 2, dtype=F64)
        H[9, 1] = 1.0
        C, _ = native.project_(V, W)
        assert not bool(torch.isfinite(C[9]).any()) and bool(torch.isfinite(C[:9]).all())
        native.update_(V, W, H)
        assert torch.isfinite(W).logical_not().nonzero().tolist()[-1] == [1, 4321]
        assert bool(torch.isfinite(W[1, :4321]).all() and torch.isfinite(W[1, 4322:]).all())


OTHERS = [] if MISSING else [isa for isa in native._native.isas() if isa != native._native.isa()]
SUITES = ("kernels", "vector_kernels", "softmax_curvature", "native")
INSIDE = """
import sys, pytest
from fasthessian import _native
assert _native.isa() == sys.argv[1]
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.skipif("FASTHESSIAN_ISA" in os.environ, reason="already in such a process")
@pytest.mark.parametrize("isa", OTHERS)
def test_every_other_instruction_set_passes(isa):
    """The test files of the kernels, in a process where FASTHESSIAN_ISA sets the instructions.

    This process runs them with the instructions that are chosen without the variable.
    """
    paths = [str(Path(__file__).with_name(f"test_{suite}.py")) for suite in SUITES]
    env = {**os.environ, "FASTHESSIAN_ISA": isa, "FASTHESSIAN_TEST_ROWS": "native"}
    command = [sys.executable, "-c", INSIDE, isa, *paths]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


DIGEST = """
import hashlib, torch
from fasthessian.kernels import native
found = hashlib.sha256()
for dtype in (torch.float32, torch.float64):
    for n, seed, offset in ((100_003, 5, 0), (7, 1, 2), (64, 2**64 - 1, 3), (1000, 3, 2**61 + 1)):
        found.update(native.normal_(torch.empty(n, dtype=dtype), seed, offset).numpy().tobytes())
print(found.hexdigest())
"""


@needs_native
def test_normal_numbers_have_the_same_bits_with_all_instruction_sets():
    found = {}
    for isa in native._native.isas():
        env = {**os.environ, "FASTHESSIAN_ISA": isa}
        command = [sys.executable, "-c", DIGEST]
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        found[isa] = run.stdout
    assert len(set(found.values())) == 1, found


@needs_native
def test_normal_numbers_are_exact_to_a_few_roundings():
    """Against the Box-Muller formula in extended precision, also where they are almost 0."""
    n, eps = 1_000_000, torch.finfo(F64).eps
    extended = np.longdouble
    if np.finfo(extended).eps > eps / 100:
        pytest.skip("no extended precision in NumPy here")
    words = reference._philox(torch.arange(n // 4), reference.NORMAL, 9).numpy().astype(extended)
    uniform = (words + 0.5) / 2**32
    radius = np.sqrt(-2 * np.log(uniform[:, 0::2]))
    quarters = 4 * uniform[:, 1::2]
    q = np.rint(quarters)  # the rest of a right angle is exact
    angle = (quarters - q) * (2 * np.arctan(extended(1)))
    c, s = np.cos(angle), np.sin(angle)
    turned = [np.stack((c, s)), np.stack((-s, c)), np.stack((-c, -s)), np.stack((s, -c))]
    pairs = radius * np.choose(q.astype(int) % 4, turned)
    want = np.moveaxis(pairs, 0, -1).reshape(-1)
    found = native.normal_(torch.empty(n, dtype=F64), 9).numpy()
    assert (
        float(np.max(np.abs(found - want) / np.abs(want))) < 5 * eps / 2
    )  # log, root, turn, product


@needs_native
def test_unknown_instruction_set_is_named():
    code = "from fasthessian.kernels import native; print(native.unavailable())"
    env = {**os.environ, "FASTHESSIAN_ISA": "mmx"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "FASTHESSIAN_ISA=mmx" in run.stdout and "accepted: generic" in run.stdout


@needs_native
def test_only_one_openmp_runtime_is_loaded():
    """A second libgomp would make every call that alternates with torch 1000 times slower."""
    code = "import fasthessian; print(open('/proc/self/maps').read())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    paths = {line.split()[-1] for line in run.stdout.splitlines() if line}
    assert len({path for path in paths if "libgomp" in path or "libomp" in path}) == 1
