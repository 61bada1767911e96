"""Run compute-sanitizer on two planted bugs, which it must find, and on tests of native kernels.

Exit status 77: there is no sanitizer here, or it does not support the device; the last line says
which. ``--rehearse`` builds the planted bugs and runs the tests on a CPU backend without it.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOUND, ABSENT = 9, 77
TESTS = (
    "append or recurrence_matches or rows_beyond or pieces_of_one_stream or same_bits_twice "
    "or second_derivative or scale_zero"
)
SUITES = ("kernels", "vector_kernels", "softmax_curvature")
PLANTED = r"""
__global__ void beyond(float* x, int n) { x[n + threadIdx.x] = 1.0f; }
__global__ void race(float* x) {
  __shared__ float cell[64];
  cell[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = cell[63 - threadIdx.x];  // written by the other warp, without a barrier
}
int main(int, char** words) {
  float* x = nullptr;
  if (cudaMalloc(&x, 64 * sizeof(float)) != cudaSuccess) return 2;
  if (words[1][0] == 'b') beyond<<<1, 64>>>(x, 64);
  else race<<<1, 64>>>(x);
  return cudaDeviceSynchronize() != cudaSuccess;
}
"""


def tool(name):
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def run(command, **env):
    print("$", *map(str, command), flush=True)
    found = subprocess.run(
        command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    print(found.stdout[-6000:], flush=True)
    return found


def absent(reason):
    print(reason)
    sys.exit(ABSENT)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="90")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--row", default="native-cuda")
    options = parser.parse_args()
    checker, compiler = tool("compute-sanitizer"), tool("nvcc")
    if compiler is None:
        absent("no nvcc here to build the planted bugs")
    source = Path("planted.cu").resolve()
    source.write_text(PLANTED)
    command = [compiler, f"-arch=sm_{options.arch}", "-lineinfo", "-o", "planted", str(source)]
    if run(command).returncode:
        sys.exit("the planted bugs do not build")
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
             *(f"tests/kernels/test_{name}.py" for name in SUITES), "-k", TESTS]  # fmt: skip
    env = {"FASTHESSIAN_TEST_ROWS": options.row}
    if options.rehearse:
        sys.exit(run(tests, **env).returncode)
    if checker is None:
        absent("no compute-sanitizer here")
    failed = []
    for kind, bug in (("memcheck", "beyond"), ("racecheck", "race")):
        check = [checker, "--tool", kind, "--error-exitcode", str(FOUND)]
        planted = run([*check, "./planted", bug])
        if "not supported" in planted.stdout:
            absent("compute-sanitizer does not support this device")
        if planted.returncode != FOUND:
            failed.append(f"{kind} missed the planted bug")
        # one allocation per tensor, so that memcheck knows where each ends
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if kind == "memcheck" else {}
        if run([*check, *tests], **env, **alone).returncode:
            failed.append(f"{kind} or a test under it failed")
    sys.exit("; ".join(failed) or 0)


if __name__ == "__main__":
    main()
