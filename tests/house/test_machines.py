"""Limits of a machine: the memory of a container, a broken Triton, a missing compiler."""

import importlib
import os
import subprocess
import sys
import types

import pytest
import torch

import fasthessian as fh
from fasthessian import memory
from fasthessian.kernels import native
from fasthessian.kernels.triton import backend as triton_backend
from fasthessian.krylov import basis as bases

density_module = importlib.import_module("fasthessian.algorithms.density")
CPU, MIB = torch.device("cpu"), 1 << 20


def test_cached_files_do_not_count_as_used_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    unlimited = memory.available_bytes(CPU)
    for name, content in (
        ("memory.max", f"{16 * MIB}\n"),
        ("memory.current", f"{15 * MIB}\n"),
        ("memory.stat", f"anon {4 * MIB}\nfile {11 * MIB}\ninactive_file {10 * MIB}\n"),
    ):
        (tmp_path / name).write_text(content)
    assert memory.available_bytes(CPU) == 11 * MIB < unlimited
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(CPU) > 11 * MIB


def test_a_basis_that_does_not_fit_names_options_that_fit(monkeypatch):
    monkeypatch.setattr(bases, "available_bytes", lambda device: 6 * 10**8)
    A = fh.SymmetricOperator(lambda v: v, 10**7, check=False)
    with pytest.raises(MemoryError) as caught:
        fh.density(A, steps=20)
    message = str(caught.value)
    assert "20 rows of 10000000 float32 numbers needs 839 MiB on cpu, 572 MiB are free" in message
    assert "basis='compressed' needs 458 MiB" in message and "13 rows would fit" in message
    with pytest.raises(MemoryError, match=r"float16 numbers needs .* rows would fit"):
        fh.eigsh(A, ncv=200, basis="compressed")
    assert A.matvecs == 0


def test_a_density_that_does_not_fit_suggests_no_basis(monkeypatch):
    A = fh.SymmetricOperator(lambda v: v, 10**7, check=False)
    for room, words in (
        (
            3 * 4 * 10**7,
            "1 row would fit (fewer steps or pairs, or a smaller ncv), "
            "or basis='none' needs 114 MiB",
        ),
        (3 * 4 * 10**7 - 1, "use a machine with more memory"),
    ):
        for module in (bases, density_module):
            monkeypatch.setattr(module, "available_bytes", lambda device, room=room: room)
        with pytest.raises(MemoryError) as caught:
            fh.density(A, steps=20)
        assert str(caught.value).endswith(words)
    with pytest.raises(MemoryError, match=r"basis of 3 rows .* 114 MiB are free; use a machine"):
        fh.density(A, steps=20, basis="none")


@pytest.mark.parametrize(
    ("kind", "where", "free", "words"),
    [
        # 20 rows of 1 MB; pinned memory is allocated in powers of two, here 32 MiB
        (
            "full",
            "cuda",
            {"cuda": 10e6, "cpu": 2**25},
            "basis='offload' needs 32 MiB of the 32 MiB",
        ),
        ("full", "cuda", {"cuda": 10e6, "cpu": 2**25 - 1}, "; 8 rows would fit"),
        # on the host, the rows of a compressed basis would be float32
        (
            "compressed",
            "cuda",
            {"cuda": 10e6, "cpu": 2**25},
            "'offload' needs 32 MiB of the 32 MiB",
        ),
        ("compressed", "cuda", {"cuda": 10e6, "cpu": 2**25 - 1}, "; 15 rows would fit"),
        (
            "offload",
            "cpu",
            {"cuda": 10e6, "cpu": 2**25 - 1},
            "needs 32 MiB on cpu, 32 MiB are free; 16",
        ),
        ("offload", "cuda", {"cuda": 10e6, "cpu": 2**30}, "; use a machine with more memory"),
    ],
)
def test_options_that_would_fit_on_a_gpu_or_its_host(kind, where, free, words, monkeypatch):
    monkeypatch.setattr(bases, "available_bytes", lambda device: int(free[device.type]))
    stored = torch.float16 if kind == "compressed" else torch.float32
    place, device = torch.device(where), torch.device("cuda")
    with pytest.raises(MemoryError) as caught:
        bases.check_room(kind, 20, 250_000, stored, torch.float32, place, device, 2)
    assert words in str(caught.value)


@pytest.mark.parametrize("basis", ["full", "compressed"])
def test_the_eigenvectors_must_fit_in_addition_to_the_basis(basis, monkeypatch):
    n, ncv, k = 10**5, 14, 4
    row = 4 * n
    stored = ncv * row // (2 if basis == "compressed" else 1)
    A = fh.SymmetricOperator(lambda v: v, n, check=False)
    monkeypatch.setattr(bases, "available_bytes", lambda device: stored + (2 + k) * row - row // 2)
    with pytest.raises(MemoryError, match="14 rows of 100000"):
        fh.eigsh(A, k, ncv=ncv, basis=basis)
    assert A.matvecs == 0
    monkeypatch.setattr(bases, "available_bytes", lambda device: stored + (2 + k) * row + row // 2)
    assert fh.eigsh(A, k, ncv=ncv, basis=basis).converged


def test_the_pairs_of_both_ends_must_fit_too(monkeypatch):
    n, room = 10**5, [0.0]
    A = fh.SymmetricOperator(lambda v: v, n, check=False)
    monkeypatch.setattr(bases, "available_bytes", lambda device: int(4 * n * room[0]))
    room[0] = 38 + 2 + 4 - 0.5  # the rows for 4 pairs, two work vectors, and the 4 vectors
    with pytest.raises(MemoryError, match="38 rows of 100000"):
        fh.spectrum(A, 2, steps=10)
    room[0] += 1
    assert fh.spectrum(A, 2, steps=10).top.converged


def test_kernels_of_another_device_run_under_the_device_guard_of_torch(monkeypatch):
    """The guard restores the caller's device without creating a context there."""
    current = [0]

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *error):
            current.pop()

    cuda = types.SimpleNamespace(signs=lambda *place: (current[-1], place))
    monkeypatch.setattr(native, "_native", types.SimpleNamespace(cuda=cuda, cpu=None))
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    stream = types.SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
    for index in (0, 1):
        tensor = types.SimpleNamespace(device=torch.device("cuda", index))
        entry, place = native._entry(tensor)
        assert entry.signs(*place) == (index, (index, 7)) and current == [0]
        assert (entry is cuda) == (index == 0)


def doctor_with(tmp_path, triton):
    """The output of ``doctor`` in a new process in which ``triton`` is the given source."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(triton)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    code = "import fasthessian as fh; print(fh.doctor())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_a_triton_that_does_not_import_is_reported(tmp_path):
    report = doctor_with(tmp_path, "raise ImportError('libcuda.so.1: wrong ELF class')")
    assert "does not import (ImportError: libcuda.so.1: wrong ELF class)" in report


def test_a_private_build_of_triton_is_accepted(tmp_path):
    assert "main" in doctor_with(tmp_path, "__version__ = 'main'")


@pytest.fixture
def cannot_compile():
    pytest.importorskip("triton")
    return triton_backend._cannot_compile.__wrapped__


def test_triton_needs_a_c_compiler(cannot_compile, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    assert cannot_compile() == (
        "Triton builds its launcher with a C compiler, and finds none; put gcc on PATH"
    )
    monkeypatch.setenv("CC", sys.executable)  # any executable
    assert cannot_compile() is None


@pytest.mark.parametrize(
    ("version", "word"), [("3.5.9", "is older than 3.6"), ("3.6.0", None), ("main", None)]
)
def test_the_version_of_triton(cannot_compile, monkeypatch, version, word):
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr("triton.__version__", version)
    found = cannot_compile()
    assert found is None if word is None else word in found
