"""The CUDA kernels as a backend for CPU tensors, run by the simulator of tests/support/cudasim."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

from fasthessian.kernels import native

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-DFH_CUDA_SIM")
INCLUDES = (ROOT / "csrc", ROOT / "tests/support/cudasim", pybind11.get_include(),
            sysconfig.get_path("include"))  # fmt: skip


def load(flags=()):
    """``fasthessian.kernels.native`` over simulated CUDA; ``module.seed(s)`` sets the schedule.

    Built by g++ with ``flags`` added, and kept under the system's temporary directory by a hash of
    the sources. Raises subprocess.CalledProcessError, with the compiler's words in ``stderr``.
    """
    units = [ROOT / "tests/support/simulated.cpp", ROOT / "csrc/bindings_cuda.cpp"]
    units += [unit for unit in sorted((ROOT / "csrc/cuda").glob("*.cu")) if unit.stem != "device"]
    sources = [*units, *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.inc")]
    sources += (ROOT / "tests/support/cudasim").glob("*.h")
    digest = hashlib.sha256(repr((FLAGS, tuple(flags), sys.version)).encode())
    for source in sorted(sources):
        digest.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"fasthessian-{os.getuid()}-{digest.hexdigest()[:16]}"
    library = folder / "_simulated.so"
    if not library.exists():
        _build(units, flags, folder, library)
    spec = importlib.util.spec_from_file_location("_simulated", library)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)

    spec = importlib.util.spec_from_file_location("simulated_native", native.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    extension.cpu = None  # CPU tensors go to the simulated GPU
    module.NAME = "cuda-simulated"
    module._native, module._reason = extension, None
    module._entry = lambda tensor: (extension.cuda, (0, 0))  # the one device, the only stream
    module.seed = extension.seed
    return module


def _build(units, flags, folder, library):
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "g++")
    includes = [f"-I{path}" for path in INCLUDES]

    with tempfile.TemporaryDirectory(dir=folder) as scratch:

        def compile_unit(unit):
            obj = f"{scratch}/{unit.stem}.o"
            command = [compiler, *FLAGS, *flags, *includes, "-x", "c++", "-c", str(unit), "-o", obj]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return obj

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        linked = f"{scratch}/{library.name}"
        command = [compiler, *flags, "-shared", *objects, "-o", linked]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(linked, library)  # another process may build the same one
