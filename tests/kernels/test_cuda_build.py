"""What nvcc reports for every kernel and chip: no spills, no stack, wide loads of V.

Needs nvcc but no GPU. Reports are cached in the system's temporary folder under a hash of the
sources.
"""

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
from typing import NamedTuple

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CACHE = Path(tempfile.gettempdir()) / f"fasthessian-nvcc-{os.getuid()}"
CHIPS = (80, 90, 100)
UNITS = sorted(path.name for path in (CSRC / "cuda").glob("*.cu"))
STREAMING = ("project_kernel", "corrected_kernel", "update_kernel")  # V is their first argument
REGISTERS = 65536  # per multiprocessor; threads get them in units of eight

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
]


class Kernel(NamedTuple):
    """One kernel on one chip: the report of ptxas, and the PTX that it compiled."""

    name: str
    chip: int
    stack: int
    stores: int
    loads: int
    registers: int
    ptx: str

    def allowed(self):
        """The number of registers that a thread may use within the launch bounds."""
        threads = re.search(r"\.maxntid (\d+)", self.ptx)
        blocks = re.search(r"\.minnctapersm (\d+)", self.ptx)
        together = int(threads[1] if threads else 1024) * int(blocks[1] if blocks else 1)
        return min(255, REGISTERS // together // 8 * 8)

    def loads_of_first_argument(self):
        """The width in bytes of each load whose address depends on the first argument."""
        lines = re.findall(r"^\s*(?:@\S+ )?([\w.:]+)\s+(.+);", self.ptx, re.MULTILINE)
        pointers, known = set(), -1
        while len(pointers) > known:
            known = len(pointers)
            for operation, text in lines:
                target, *sources = re.findall(r"%rd\d+|\[\w+_param_0\]", text) or [""]
                moves = operation.startswith(("add.", "mad.", "mov.", "cvta.", "selp."))
                if (moves and pointers.intersection(sources)) or (
                    operation == "ld.param.u64" and sources and "param_0]" in sources[0]
                ):
                    pointers.add(target)
        found = []
        for operation, text in lines:
            address = re.search(r"\[(%rd\d+)", text)
            if operation.startswith("ld.global") and address and address[1] in pointers:
                many, bits = re.search(r"(?:\.v(\d))?\.[a-z](\d+)$", operation).groups()
                found.append(int(many or 1) * int(bits) // 8)
        return found


@functools.cache
def version():
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout


def kernels(source, chips=CHIPS, include=CSRC):
    """Every kernel of a source file, compiled with the options of setup.py."""
    command = ["nvcc", "-O3", "-std=c++17", "-lineinfo", f"-I{include}", "-Xptxas", "-v", "--keep"]
    command += [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips]
    key = hashlib.sha256(repr((command, version(), source.name)).encode())
    for path in sorted({source, *(CSRC / "cuda").iterdir(), *(CSRC / "cpu").glob("*.h")}):
        key.update(path.read_bytes())
    cached = CACHE / f"{source.stem}-{key.hexdigest()[:24]}"
    if not cached.exists():
        CACHE.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            command += ["--keep-dir", scratch, "-c", str(source), "-o", f"{scratch}/unit.o"]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout + run.stderr
            draft = Path(scratch) / "cached"
            draft.mkdir()
            (draft / "report").write_text(run.stdout + run.stderr)
            for chip in chips:  # for a single chip, nvcc omits its name
                name = f"{source.stem}.compute_{chip}.ptx" if chips[1:] else f"{source.stem}.ptx"
                shutil.copy(Path(scratch) / name, draft / f"{chip}.ptx")
            if not cached.exists():
                draft.rename(cached)
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'\n.*Function properties.*\n"
        r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers"
    )
    texts = {chip: (cached / f"{chip}.ptx").read_text() for chip in chips}
    found = []
    for entry, *numbers in re.findall(pattern, (cached / "report").read_text()):
        chip, stack, stores, loads, registers = map(int, numbers)
        body = re.search(rf"\.entry {entry}\(.*?^}}", texts[chip], re.DOTALL | re.MULTILINE)[0]
        name = re.sub(r"^_Z\w*?\d+(?=[a-z_]+_kernel)", "", entry)
        found.append(Kernel(name, chip, stack, stores, loads, registers, body))
    assert len(found) == sum(text.count(".entry ") for text in texts.values())
    return found


def complaints(found):
    """One line for each kernel that spills, has a stack frame or takes too many registers."""
    lines = []
    for k in found:
        if k.stack or k.stores or k.loads or k.registers > k.allowed():
            lines.append(
                f"{k.name} sm_{k.chip}: {k.stack} bytes of stack, {k.stores} stored and "
                f"{k.loads} loaded for spills, {k.registers} of {k.allowed()} registers"
            )
    return lines


@pytest.fixture(scope="session")
def built():
    """The kernels by source file, compiled in parallel."""
    for stale in CACHE.glob("*"):
        if time.time() - stale.stat().st_mtime > 3 * 86400:
            shutil.rmtree(stale, ignore_errors=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda name: kernels(CSRC / "cuda" / name), UNITS)
        return dict(zip(UNITS, found, strict=True))


@pytest.mark.parametrize("unit", UNITS)
def test_no_spills_no_stack_registers_within_bounds(built, unit):
    assert {k.chip for k in built[unit]} == set(CHIPS)
    assert not complaints(built[unit]), "\n".join(complaints(built[unit]))


def test_every_kernel_of_the_sources_is_in_the_report(built):
    bounds = r"(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?"
    text = "".join(path.read_text() for path in (CSRC / "cuda").iterdir())
    written = re.findall(rf"__global__ void\s+{bounds}(\w+)\(", text)
    assert len(written) == text.count("__global__ void") > 0
    seen = " ".join(k.name for found in built.values() for k in found)
    assert all(name in seen for name in written), written


@pytest.mark.parametrize("unit", [name for name in UNITS if name.startswith("rows_")])
def test_streaming_kernels_load_rows_16_bytes_at_a_time(built, unit):
    streaming = [k for k in built[unit] if k.name.startswith(STREAMING)]
    assert len(streaming) == len(STREAMING) * 4 * len(CHIPS)  # blocks of 1, 2, 4, 8 rows of W
    for kernel in streaming:
        # these do not have enough registers or shared memory for 8 halves per lane
        halves = re.match(r"corrected_kernelI6__halfLi[248]|update_kernelI6__halfLi4", kernel.name)
        loads = kernel.loads_of_first_argument()
        assert loads.count(8 if halves else 16) >= 2, f"{kernel.name} loads V by {loads} bytes"
        assert max(loads) <= 16


def test_aligned_logits_are_loaded_16_bytes_at_a_time(built):
    for kernel in built["softmax.cu"]:
        loads = kernel.loads_of_first_argument()
        # one for the sums, one for the product
        assert loads.count(16) == 2, f"{kernel.name} loads U by {loads} bytes"


SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) spill_kernel(double* x) {
  double y[40];
  for (int i = 0; i < 40; ++i) y[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 40; ++i) x[(i * 7 % 40) * 1024 + threadIdx.x] = y[i] * y[(i + 1) % 40];
}
extern "C" __global__ void __launch_bounds__(128) stack_kernel(double* x, int at) {
  double y[40];
  for (int i = 0; i < 40; ++i) y[i] = x[i * 1024 + threadIdx.x];
  x[threadIdx.x] = y[at];
}
extern "C" __global__ void __launch_bounds__(128) right_kernel(double* x) {
  x[threadIdx.x] += 1;
}
"""
LOADS = """
struct alignas(16) Four { float x[4]; };
struct Rows { const float* v; long ld, n; const float* w; float* out; };
template <int WIDE> __device__ void sum(Rows a) {
  float s = 0;
  for (long r = threadIdx.x * 4; r < a.n; r += 512) {
    const Four w = *(const Four*)(a.w + r);
    Four v;
    if (WIDE) v = *(const Four*)(a.v + a.ld * r);
    else for (int i = 0; i < 4; ++i) v.x[i] = a.v[a.ld * r + i];
    for (int i = 0; i < 4; ++i) s += v.x[i] * w.x[i];
  }
  a.out[threadIdx.x] = s;
}
extern "C" __global__ void wide_kernel(Rows a) { sum<1>(a); }
extern "C" __global__ void narrow_kernel(Rows a) { sum<0>(a); }
"""


def test_a_spilling_kernel_is_reported(tmp_path):
    (tmp_path / "spills.cu").write_text(SPILLS)
    found = kernels(tmp_path / "spills.cu", (90,))
    assert len(found) == 3
    lines = complaints(found)
    assert len(lines) == 2 and not any("right_kernel" in line for line in lines), lines
    assert any(re.search(r"spill_kernel sm_90: .* [1-9]\d* stored", line) for line in lines)
    assert any(re.search(r"stack_kernel sm_90: [1-9]\d* bytes of stack", line) for line in lines)


def test_narrow_and_wide_loads_are_distinguished(tmp_path):
    (tmp_path / "loads.cu").write_text(LOADS)
    found = {k.name: k.loads_of_first_argument() for k in kernels(tmp_path / "loads.cu", (90,))}
    assert set(found["wide_kernel"]) == {16} and set(found["narrow_kernel"]) == {4}, found
