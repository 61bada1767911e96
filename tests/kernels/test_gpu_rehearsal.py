"""``make gpu`` without a GPU: its parts, their outcomes, and the checks of test_cuda.py."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import run as gpu
from fasthessian import kernels
from tests.support.cuda_checks import (
    check_captured,
    check_curvatures,
    check_failed_capture,
    check_launches,
    check_long_logits,
    check_long_rows,
    check_problem,
    check_quiet_steps,
    check_unchanged,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")


def python(code):
    return [sys.executable, "-c", code]


def test_a_failing_part_is_named_and_the_others_still_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    parts = [
        gpu.Part("good", python("print('fine')"), 20),
        gpu.Part("bad one", python("print('the reason'); raise SystemExit(3)"), 20),
        gpu.Part("elsewhere", python("raise SystemExit(77)"), 20),
        gpu.Part("last", python("import os; print(os.environ['WORD'])"), 20, {"WORD": "kept"}),
    ]
    outcomes = gpu.carry_out_all(parts, tmp_path, 60)
    assert [o.state for o in outcomes] == ["ok", "FAILED", "not here", "ok"]
    assert [o.bad for o in outcomes] == [False, True, False, False]
    printed = capsys.readouterr().out
    assert "bad one: FAILED" in printed and "the reason" in printed and "fine" not in printed
    log = (tmp_path / "gpu.log").read_text()
    assert "fine" in log and "the reason" in log and "kept" in log


def test_a_part_over_its_limit_is_killed_with_its_children(tmp_path):
    child = "import time; time.sleep(60)"
    code = (
        "import subprocess, sys, time; "
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    outcome = gpu.carry_out(gpu.Part("slow", python(code), 3), 3, tmp_path)
    assert outcome.state == "OVER TIME" and outcome.bad and time.monotonic() - start < 20
    status = Path(f"/proc/{int(outcome.log)}/status")
    for _ in range(50):  # it is killed, but init may not have collected it yet
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    raise AssertionError("the child is still alive")


def test_time_is_reserved_for_required_parts(tmp_path):
    parts = [
        gpu.Part("long", python("import time; time.sleep(60)"), 60),
        gpu.Part("measurement", python("pass"), 10, must=True),
        gpu.Part("late", python("pass"), 600),
    ]
    outcomes = gpu.carry_out_all(parts, tmp_path, 15.5)
    assert [o.state for o in outcomes] == ["OVER TIME", "ok", "ok"]
    assert gpu.carry_out(parts[2], 1, tmp_path).state == "NO TIME"


def test_the_copy_holds_every_module(tmp_path):
    """Compare files, since an installed package could replace a module that is not copied."""
    copy = tmp_path / "tree"
    gpu.copy_tree(ROOT, copy, "*.so")
    for folder in ("fasthessian", "tests", "bench"):
        wanted, found = (
            {path.relative_to(tree / folder) for path in (tree / folder).rglob("*.py")}
            for tree in (ROOT, copy)
        )
        assert found == wanted


@without_gpu
def test_the_rehearsal_passes():
    before = sorted((ROOT / "bench" / "results").glob("*"))
    env = {key: value for key, value in os.environ.items() if key != "OUT"}
    left_out = "build,on the gpu,conformance triton,sanitizer,suite"
    command = [sys.executable, "-m", "bench.gpu.run", "--without", left_out]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    for words in ("lanczos: ok", "(rehearsal: no GPU here)", "REHEARSAL", "pack 65 tensors",
                  "softmax curvature of 50257", "replay eager: cpu has no CUDA graphs",
                  "all parts passed"):  # fmt: skip
        assert words in run.stdout, words
    assert "error" not in run.stdout and len(run.stdout) < 12_000
    assert sorted((ROOT / "bench" / "results").glob("*")) == before


def test_tuning_checks_and_times_every_candidate(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "bench.gpu.tune", "--device", "cpu", "--n", "300", "--k", "3"]
    command += ["--blocks", "2", "--registers", "168", "--repeats", "1"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [*command, "--json", tmp_path / "tune.json"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    rows = json.loads((tmp_path / "tune.json").read_text())
    assert len(rows) == 3 * 4 and all(row["tried"] == 2 and row["refused"] == 0 for row in rows)
    kinds = ("project b=2", "project b=1", "project with H b=1", "update S append b=2")
    names = [f"{kind} k=3 {t} n=300" for t in ("float32", "float16", "float64") for kind in kinds]
    assert [row["what"] for row in rows] == names


def test_the_rehearsal_has_the_same_parts_as_a_gpu_run(tmp_path):
    facts = {"gpu": True, "capability": "90", "nvcc": "some"}
    real, rehearsed = (gpu.parts_of(tmp_path, f, set()) for f in (facts, {"gpu": False}))
    assert [p.name for p in real] == [p.name for p in rehearsed]
    assert not any("cpu" in word or "--rehearse" in word for p in real for word in p.command)
    assert sum(p.limit for p in real if p.must) < gpu.SECONDS / 2
    files = {word for p in real for word in p.command if word.endswith(".py") and "/" in word}
    assert all((ROOT / name).exists() for name in files)
    assert {
        "tests/kernels/test_cuda.py",
        "tests/kernels/test_kernels.py",
        "tests/house/test_layers.py",
    } <= files


@pytest.mark.parametrize("name", ["mlp", "pinn", "logistic"])
def test_the_gpu_checks_of_problems_pass_on_a_cpu(name):
    check_problem(name, CPU)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_gpu_checks_of_curvatures_pass_on_a_cpu(name):
    check_curvatures(name, CPU)


@pytest.mark.parametrize("graph", [True, False])
def test_the_gpu_check_of_steps_without_waits_passes_on_a_cpu(graph):
    check_quiet_steps(CPU, graph)


@pytest.mark.parametrize("basis", ["full", "compressed"])
def test_the_gpu_check_of_captured_steps_passes_on_a_cpu(basis):
    check_captured(CPU, basis)


def planted(count):
    raise RuntimeError("planted")


def test_the_other_gpu_checks_pass_on_a_cpu(monkeypatch):
    check_failed_capture(CPU, monkeypatch, planted)
    check_unchanged(CPU)
    check_launches(CPU, None)
    for name in kernels.AUTOMATIC["cpu"]:
        if kernels.BACKENDS[name].unavailable("cpu") is None:
            check_long_rows(kernels.BACKENDS[name], CPU, 4096 + 64)
            check_long_logits(kernels.BACKENDS[name], CPU, 67, 100)
