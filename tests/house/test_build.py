"""The build succeeds without a compiler. It fails if CUDA is requested and cannot be built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def build(tmp_path, **env):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
    command += ["--build-temp", str(tmp_path / "temp")]
    full = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")} | env
    return subprocess.run(command, cwd=ROOT, env=full, capture_output=True, text=True)


def test_the_build_succeeds_without_a_compiler(tmp_path):
    run = build(tmp_path, CC="/bin/false", CXX="/bin/false", FASTHESSIAN_CUDA="0")
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_requested_cuda_without_nvcc_is_an_error(tmp_path):
    run = build(tmp_path, PATH="/bin/nowhere", FASTHESSIAN_CUDA="1")
    assert run.returncode != 0
    assert "FASTHESSIAN_CUDA=1, but CUDA cannot be built: nvcc not found" in run.stderr


def test_unknown_setting_is_named(tmp_path):
    run = build(tmp_path, FASTHESSIAN_CUDA="yes")
    assert run.returncode != 0 and "must be auto, 1 or 0, got 'yes'" in run.stderr


@pytest.mark.parametrize("name", ["reference", "native"])
def test_without_the_extension_the_reference_serves(tmp_path, name):
    """In a copy without the compiled extension everything runs, and doctor reports the reason."""
    package = tmp_path / "fasthessian"
    for path in (ROOT / "fasthessian").rglob("*.py"):
        target = package / path.relative_to(ROOT / "fasthessian")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    code = (
        # an editable install would find the compiled extension of this tree
        "import sys; "
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]; "
        "import torch, fasthessian as fh; print(fh.doctor()); "
        "A = fh.SymmetricOperator(lambda v: torch.arange(1.0, 101.0) * v, 100); "
        f"print(fh.eigsh(A, 1, backend={name!r}).values)"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    if name == "reference":
        assert run.returncode == 0, run.stderr
        assert "cpu:  no: the extension is not built" in run.stdout
        assert "cpu        served by reference" in run.stdout and "tensor([99.99" in run.stdout
    else:
        assert run.returncode != 0 and "backend 'native' cannot serve" in run.stderr
