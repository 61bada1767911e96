"""A study that is killed twice and one that two ranks share find the same."""

import os
import subprocess
import sys
import time

import pytest

from fasthessian.study.store import Folder
from tests.support.command_line import ROOT, torchrun
from tests.support.small_study import contents, images

for extra in ("click", "rich", "matplotlib", "jinja2", "safetensors"):
    pytest.importorskip(extra)
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

OPTIONS = (
    "study", "--data", "data", "--depth", "8", "--variants", "no-bn", "--width", "2",
    "--epochs", "2", "--checkpoints", "1", "2", "--batch-size", "20", "--lrs", "0.1", "0.02",
    "--seeds", "1", "--images", "20", "--spectrum-images", "10", "--analysis-batch", "20",
    "--steps", "3", "--points", "3", "--device", "cpu", "--out",
)  # fmt: skip


def started(folder, out):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fasthessian", *OPTIONS, out]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def killed(folder, out, name):
    """Start the study and kill it as soon as a file of this name is there."""
    with started(folder, out) as process:
        until = time.monotonic() + 120
        while not list((folder / out).rglob(name)) and time.monotonic() < until:
            time.sleep(0.01)
            assert process.poll() is None, process.stderr.read()
        process.kill()


def test_a_killed_study_and_two_ranks_find_the_same(tmp_path):
    images(tmp_path / "data")
    killed(tmp_path, "killed", "state.safetensors")
    killed(tmp_path, "killed", "epoch-001-eval.json")
    with started(tmp_path, "killed") as process:
        assert process.wait(120) == 0, process.stderr.read()
    found = contents(Folder(tmp_path / "killed", {}))
    assert len(found) == 2 + 2 + 2
    done = torchrun(tmp_path, "-m", "fasthessian", *OPTIONS, "ranks")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("report: ranks/report.html") == 1
    assert contents(Folder(tmp_path / "ranks", {})) == found
    killed_files, files = (
        sorted(path.name for path in (tmp_path / out).rglob("*") if not path.name.startswith("."))
        for out in ("killed", "ranks")
    )
    assert killed_files == files
