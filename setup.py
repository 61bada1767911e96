"""Native build: C++ units per instruction set behind pybind11, CUDA optional, torch never needed.

FASTHESSIAN_CUDA=auto|1|0      auto (default) builds CUDA where the machine has a GPU and nvcc, and
                               says why not elsewhere; 1 builds it without a GPU, too, and makes
                               the absence of nvcc or of a C++ compiler an error
FASTHESSIAN_CUDA_ARCHS=80;90   compute capabilities, default 80;90;100 (PTX of the highest is added)
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

CPU_UNITS = {"csrc/cpu/kernels_generic.cpp": [], "csrc/cpu/recur.cpp": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mf16c"]
    CPU_UNITS |= {
        "csrc/cpu/kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
        "csrc/cpu/kernels_avx512.cpp": [*AVX512, "-mfma", "-mprefer-vector-width=512"],
    }
CUDA = os.environ.get("FASTHESSIAN_CUDA", "auto").lower()
if CUDA not in ("auto", "1", "0"):
    raise SystemExit(f"FASTHESSIAN_CUDA must be auto, 1 or 0, got {CUDA!r}")


def log(message: str) -> None:
    print(f"[fasthessian] {message}", file=sys.stderr, flush=True)


def find_cuda() -> tuple[str, Path]:
    """The compiler and the static runtime library; RuntimeError says what is missing."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes))
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc not found (set CUDA_HOME or put nvcc on PATH)")
    # nvcc on PATH may be a wrapper script, so the toolkit's root is asked for
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    run = subprocess.run(command, capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", run.stderr + run.stdout, re.MULTILINE)
    if top is None:
        raise RuntimeError(f"{nvcc} --dryrun does not name its toolkit: {run.stderr[:200]!r}")
    root = Path(top.group(1).strip()).resolve()
    machine = "sbsa" if platform.machine() == "aarch64" else "x86_64"
    for folder in ("lib64", "lib", f"targets/{machine}-linux/lib"):
        library = root / folder / "libcudart_static.a"
        if library.exists():
            return nvcc, library
    raise RuntimeError(f"no libcudart_static.a under {root}")


class BuildExt(build_ext):
    """Flags per source file, which setuptools lacks, and the CUDA objects."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def compile_with_flags(obj, src, ext, cc_args, extra, pp_opts):
            unit = Path(src).as_posix()
            return compile_one(obj, src, ext, cc_args, [*extra, *CPU_UNITS.get(unit, [])], pp_opts)

        self.compiler._compile = compile_with_flags
        extension = self.extensions[0]
        if CUDA != "0":
            try:
                if CUDA == "auto" and not Path("/proc/driver/nvidia/version").exists():
                    raise RuntimeError("this machine has no NVIDIA GPU")
                self.add_cuda(extension)
            except (RuntimeError, ValueError, subprocess.CalledProcessError) as error:
                if CUDA == "1":
                    raise SystemExit(
                        f"FASTHESSIAN_CUDA=1, but CUDA cannot be built: {error}"
                    ) from None
                log(f"CUDA skipped: {error}. FASTHESSIAN_CUDA=1 builds it or fails.")
        super().build_extensions()

    def add_cuda(self, extension: Pybind11Extension) -> None:
        nvcc, library = find_cuda()
        setting = os.environ.get("FASTHESSIAN_CUDA_ARCHS") or "80;90;100"
        archs = sorted({int(arch) for arch in re.split("[;, ]+", setting.strip())})
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        flags = ["-O3", "-std=c++17", "-Icsrc", "-Xcompiler", "-fPIC", *targets]
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)

        def compile_unit(source: Path) -> str:
            obj = str(folder / f"{source.stem}.o")
            command = [nvcc, *flags, "-c", str(source), "-o", obj]
            run = subprocess.run(
                command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            if run.stdout:
                log(run.stdout.strip())
            run.check_returncode()
            return obj

        # the largest first, so that no core is left with it at the end
        units = sorted(Path("csrc/cuda").glob("*.cu"), key=lambda unit: "rows_" not in unit.stem)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        extension.extra_objects += objects
        extension.sources.append("csrc/bindings_cuda.cpp")
        extension.extra_objects.append(str(library))
        extension.define_macros.append(("FH_WITH_CUDA", "1"))
        extension.extra_link_args += ["-ldl", "-lrt", "-lpthread"]
        log(f"CUDA built with {nvcc} for {', '.join(map(str, archs))}")


setup(
    ext_modules=[
        Pybind11Extension(
            "fasthessian._native",
            sources=["csrc/bindings.cpp", *CPU_UNITS],
            include_dirs=["csrc"],
            depends=[str(path) for path in sorted(Path("csrc").rglob("*.*"))],
            cxx_std=17,
            extra_compile_args=[
                # a choice between floats becomes a vector's only where comparisons cannot trap
                "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-fopenmp",
                "-Wno-psabi", "-g0",
            ],
            extra_link_args=["-fopenmp", "-s"],
            optional=CUDA != "1",  # without a compiler the pure-torch backend serves
        )
    ],
    cmdclass={"build_ext": BuildExt},
)  # fmt: skip
