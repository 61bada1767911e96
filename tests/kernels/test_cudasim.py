"""The CUDA simulator finds planted bugs, and finds no bugs in the project's kernels.

The kernels of csrc/cuda run on a CPU (tests/support/cudasim) under ThreadSanitizer,
AddressSanitizer and UBSan. They also run with each of their barriers removed, one at a time, and
every removal must be detected. Object files are cached in the system's temporary folder under a
hash of their sources and options.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SIM, CSRC = ROOT / "tests/support/cudasim", ROOT / "csrc"
CACHE = Path(tempfile.gettempdir()) / f"fasthessian-cudasim-{os.getuid()}"
PLAIN = ("-O1",)
TSAN = ("-O1", "-fsanitize=thread")
# with -O1, g++ takes twice as long for these two sanitizers
ASAN = ("-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CASES = ("f32", "f64", "f16", "mixed", "recur", "softmax", "vectors")  # cases of driver.cpp
SEEDS = range(5)
POOL = ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


def call(*command, **options):
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, **options)


def build(*command):
    run = call("g++", *command)
    assert run.returncode == 0, run.stderr[-4000:]


@functools.cache
def compiler():
    return call("g++", "--version").stdout


def compile_unit(source, flags, csrc=CSRC):
    """The object file of a source file, from the cache if no source or header has changed."""
    command = ["-x", "c++", "-std=c++17", "-g1", *flags, "-DFH_CUDA_SIM"]
    key = hashlib.sha256(repr((command, compiler(), source.name)).encode())
    for folder in (SIM, csrc / "cuda", csrc / "cpu"):
        for path in sorted(folder.glob("*")):
            key.update(path.read_bytes())
    made = CACHE / f"{source.stem}-{key.hexdigest()[:24]}.o"
    if made.exists():
        made.touch()
    else:
        CACHE.mkdir(mode=0o700, exist_ok=True)
        handle, draft = tempfile.mkstemp(suffix=".o", dir=CACHE)
        os.close(handle)
        build(*command, f"-I{SIM}", f"-I{csrc}", "-c", source, "-o", draft)
        os.replace(draft, made)
    return made


def units():
    return [path for path in sorted((CSRC / "cuda").glob("*.cu")) if path.stem != "device"]


@functools.cache
def objects(flags):
    sources = [SIM / "driver.cpp", *units()]
    made = POOL.map(lambda source: compile_unit(source, flags), sources)
    return dict(zip([source.name for source in sources], made, strict=True))


@functools.cache
def without_random_addresses():
    """Older ThreadSanitizers do not start if addresses are randomised by more than 28 bits."""
    command = ("setarch", os.uname().machine, "-R")
    works = shutil.which("setarch") and call(*command, "true").returncode == 0
    return command if works else ()


def execute(program, *arguments):
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return call(*without_random_addresses(), program, *arguments, env=env)


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """program(name, flags) -> the linked planted.cpp or driver.cpp; skips if it cannot run here."""
    folder = tmp_path_factory.mktemp("cudasim")
    for stale in CACHE.glob("*.o"):
        if time.time() - stale.stat().st_mtime > 3 * 86400:
            stale.unlink(missing_ok=True)

    @functools.cache
    def reason(flags):
        (folder / "empty.cpp").write_text("int main() {}\n")
        run = call("g++", *flags, folder / "empty.cpp", "-o", folder / "empty")
        run = run if run.returncode else execute(folder / "empty")
        return run.stderr.strip()[-200:] if run.returncode else None

    @functools.cache
    def link(name, flags):
        target = folder / f"{name}{len(list(folder.iterdir()))}"
        if name == "planted":
            build(*flags, compile_unit(SIM / "planted.cpp", flags), "-o", target)
        else:
            build(*flags, *objects(flags).values(), "-o", target)
        return target

    def linked(name, flags):
        if reason(flags):
            pytest.skip(f"g++ {' '.join(flags)}: {reason(flags)}")
        return link(name, flags)

    return linked


def line_of(mark):
    lines = (SIM / "planted.cpp").read_text().splitlines()
    return f"planted.cpp:{next(i for i, line in enumerate(lines, 1) if mark in line)}"


@pytest.mark.parametrize("name", ["reversed", "reused", "neighbours"])
def test_a_missing_barrier_gives_a_wrong_answer_for_some_seed(program, name):
    planted = program("planted", PLAIN)
    right = {execute(planted, f"{name}-right", seed).stdout for seed in SEEDS}
    found = {execute(planted, name, seed).stdout for seed in SEEDS}
    assert len(right) == 1 and right.pop().startswith("ok "), right
    assert found - right, f"{name} looks right for all of {SEEDS}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent-barrier", f"deadlock.*__syncthreads of .*{line_of('planted: divergent')}"),
        ("divergent-shuffle", "deadlock.*__shfl_xor_sync of .*(7 did, of block 0)"),
        ("two-barriers", "meet at different places: __syncthreads"),
        ("outside-mask", "lane [0-9]+ is not in the mask of its __shfl_sync"),
        ("behind-shared", "a write behind shared array line"),
        ("too-much-shared", "more than 48 KB of shared memory at big"),
        ("empty-grid", "invalid configuration"),
    ],
)
def test_the_simulator_reports(program, name, message):
    run = execute(program("planted", PLAIN), name)
    assert re.search(f"error: .*{message}", run.stdout), run.stdout


@pytest.mark.parametrize(
    ("flags", "name", "kind", "marks"),
    [
        (TSAN, "reversed", "data race", ["planted: write", "planted: read"]),
        (TSAN, "reused", "data race", ["planted: overtaking", "planted: overtaken"]),
        (TSAN, "neighbours", "data race", ["planted: lane's write", "planted: lane's read"]),
        (TSAN, "counter", "data race", ["planted: counter"]),
        (TSAN, "across-blocks", "data race", ["planted: across blocks"]),
        (ASAN, "out-of-bounds", "heap-buffer-overflow", ["planted: out of bounds"]),
        (ASAN, "behind-shared", "heap-buffer-overflow", ["planted: behind shared"]),
        (ASAN, "misaligned", "misaligned address", ["planted: misaligned"]),
    ],
)
def test_a_sanitizer_names_the_line(program, flags, name, kind, marks):
    run = execute(program("planted", flags), name)
    assert run.returncode != 0 and kind in run.stderr, run.stdout + run.stderr
    for mark in marks:
        assert line_of(mark) in run.stderr, run.stderr


@pytest.mark.parametrize("flags", [TSAN, ASAN, (*PLAIN, "-DFHSIM_UCONTEXT")])
@pytest.mark.parametrize("name", ["reversed-right", "reused-right", "neighbours-right"])
def test_right_kernels_have_no_errors(program, flags, name):
    run = execute(program("planted", flags), name)
    assert run.returncode == 0 and run.stdout.startswith("ok ") and not run.stderr, run.stderr


@pytest.mark.parametrize("flags", [PLAIN, TSAN, ASAN], ids=["plain", "threads", "addresses"])
def test_the_kernels_of_the_project_have_no_errors(program, flags):
    driver = program("driver", flags)
    # races do not depend on the type; accesses out of bounds and misaligned ones do
    cases = ("f32", "f16", "recur", "softmax", "vectors") if flags == TSAN else CASES
    cases = [(seed, case) for case in cases for seed in ((1, 2) if flags == PLAIN else (1,))]
    for case, run in zip(cases, POOL.map(lambda c: execute(driver, *c), cases), strict=True):
        assert run.returncode == 0 and run.stdout == "ok\n", (case, run.stdout, run.stderr[:4000])


BARRIER = "__syncthreads();"
# the case of driver.cpp, by the file of the barrier
CASE = {"recur.cu": "recur", "softmax.cu": "softmax", "random.cu": "vectors", "pack.cu": "vectors"}


def barriers():
    """Every barrier of the kernels: its file and its position in the text."""
    found = []
    for path in sorted((CSRC / "cuda").iterdir()):
        text = path.read_text()
        for match in re.finditer(re.escape(BARRIER), text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(path.name, match.start(), id=f"{path.name}:{line}"))
    return found


def detected(folder, name, start, instead=";"):
    """The error found if ``instead`` replaces this barrier, or None."""
    csrc = folder / f"{name}-{start}-{len(instead)}"
    shutil.copytree(CSRC, csrc)
    path = csrc / "cuda" / name
    text = path.read_text()
    path.write_text(text[:start] + instead + text[start + len(BARRIER) :])
    unit = csrc / "cuda" / (name if name.endswith(".cu") else "rows_f32.cu")
    case = CASE.get(name, "f32")
    for flags, sign in ((PLAIN, "wrong: .*"), (TSAN, "ThreadSanitizer: data race")):
        target = csrc / f"driver{len(flags)}"
        changed = compile_unit(unit, flags, csrc)
        others = [made for source, made in objects(flags).items() if source != unit.name]
        # the linker takes an inline function from the first file
        build(*flags, changed, *others, "-o", target)
        for seed in SEEDS if flags == PLAIN else (1,):
            run = execute(target, seed, case)
            found = re.search(sign, run.stdout + run.stderr)
            assert run.returncode == 0 or found, run.stderr[-4000:]
            if found:
                return f"{found[0]} (seed {seed})"
    return None


@pytest.fixture(scope="session")
def removals(program, tmp_path_factory):
    """The results of removing each barrier alone, in parallel on all cores."""
    for flags in (PLAIN, TSAN):
        program("driver", flags)
    folder = tmp_path_factory.mktemp("removed")
    jobs = {case.values: POOL.submit(detected, folder, *case.values) for case in barriers()}
    name, start = next(case.values for case in barriers() if case.values[0] == "recur.cu")
    return {**jobs, "none": POOL.submit(detected, folder, name, start, BARRIER)}


@pytest.mark.parametrize(("name", "start"), barriers())
def test_a_removed_barrier_is_detected(removals, name, start):
    found = removals[name, start].result()
    assert found, "nothing depends on it: it is superfluous, or driver.cpp needs another case"
    print(found)


def test_nothing_is_detected_if_no_barrier_is_removed(removals):
    assert removals["none"].result() is None


CONVERT = """
#include "cudasim.h"
extern "C" void widen(const __half* in, float* out, long n) {
  for (long i = 0; i < n; ++i) out[i] = __half2float(in[i]);
}
extern "C" void narrow_float(const float* in, __half* out, long n) {
  for (long i = 0; i < n; ++i) out[i] = __float2half_rn(in[i]);
}
"""


def assert_same_bits(found, want):
    """Equal, including the sign of zeros. NaN may differ in sign and payload."""
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit()[~want.isnan()], want.signbit()[~want.isnan()])


def test_half_precision_conversions_equal_those_of_torch(tmp_path):
    (tmp_path / "convert.cpp").write_text(CONVERT)
    library = tmp_path / "convert.so"
    build(
        "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{SIM}", tmp_path / "convert.cpp", "-o", library
    )
    functions = ctypes.CDLL(str(library))

    def converted(name, values, dtype):
        out = torch.empty(len(values), dtype=dtype)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, out)]
        getattr(functions, name)(*pointers, ctypes.c_long(len(values)))
        return out

    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    found, want = converted("widen", every, torch.float32), every.float()
    assert_same_bits(found, want)

    bits = torch.randint(-(2**31), 2**31, (300_000,), generator=torch.Generator().manual_seed(1))
    halves = torch.stack((want[:-1], want[1:])).double().mean(0).float()  # ties
    near = torch.stack((halves, halves.nextafter(want[1:]), halves.nextafter(want[:-1])))
    floats = torch.cat((bits.to(torch.int32).view(torch.float32), want, near.reshape(-1)))
    floats = torch.cat((floats, torch.rand(100_000) * 1e-4, torch.randn(100_000) * 1e4))
    found, want = converted("narrow_float", floats, torch.float16), floats.half()
    assert_same_bits(found, want)
