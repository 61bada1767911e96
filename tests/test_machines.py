"""What a machine limits or lacks: a container's memory, a Triton that is broken, a compiler."""

import os
import subprocess
import sys

import pytest
import torch

from fasthessian import memory
from fasthessian.kernels import triton_backend

CPU, MIB = torch.device("cpu"), 1 << 20


def test_files_that_can_be_dropped_do_not_count_as_used(tmp_path, monkeypatch):
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


def doctor_with(tmp_path, triton):
    """What a fresh process says whose Triton consists of this source."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(triton)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    code = "import fasthessian as fh; print(fh.doctor())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_a_triton_that_does_not_import_is_told(tmp_path):
    told = doctor_with(tmp_path, "raise ImportError('libcuda.so.1: wrong ELF class')")
    assert "does not import (ImportError: libcuda.so.1: wrong ELF class)" in told


def test_a_triton_of_ones_own_build_is_taken(tmp_path):
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
    monkeypatch.setenv("CC", sys.executable)  # anything that can be run
    assert cannot_compile() is None


@pytest.mark.parametrize(
    ("version", "word"), [("3.5.9", "is older than 3.6"), ("3.6.0", None), ("main", None)]
)
def test_the_version_of_triton(cannot_compile, monkeypatch, version, word):
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr("triton.__version__", version)
    found = cannot_compile()
    assert found is None if word is None else word in found
