"""How a job starts: torchrun's variables, the backend, settings of NCCL; what doctor says of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fasthessian as fh
import fasthessian.distributed
from fasthessian.distributed import launch, report
from tests.support.command_line import ROOT, torchrun

pytestmark = pytest.mark.distributed
STARTED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29501"}
EXAMPLE = ROOT / "examples" / "data_parallel.py"


@pytest.fixture
def started(monkeypatch):
    """A process that torchrun started; ``init_process_group`` notes its backend."""
    backends = []
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in (*launch.VARIABLES, *launch.REPEATABLE, *report.LOCAL):
        os.environ.pop(name, None)
    os.environ.update(STARTED)
    monkeypatch.setattr(dist, "init_process_group", backends.append)
    return backends


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as far as torch's answers go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    devices = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    return devices


def test_without_torchrun_there_is_one_process(started):
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name)
        assert fasthessian.distributed.init() is None
    assert started == [] and not launch.several() and launch.is_first()


def test_gloo_serves_cpus(started, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launch.init(deterministic=True)
    assert started == ["gloo"]
    assert not set(launch.REPEATABLE) & set(os.environ)  # gloo needs no settings


def test_missing_variables_are_named(started):
    os.environ.pop("MASTER_PORT")
    with pytest.raises(ValueError, match="MASTER_PORT must be set with RANK and WORLD_SIZE"):
        launch.init()
    for name in ("RANK", "WORLD_SIZE"):  # as the message advises
        os.environ.pop(name)
    assert launch.init() is None


def test_ranks_that_do_not_find_each_other(started, monkeypatch):
    def fail(backend):
        raise dist.DistNetworkError("The client socket has failed\nmore")

    monkeypatch.setattr(dist, "init_process_group", fail)
    words = r"did not find each other at localhost:29501 \(rank 1 of 2, backend gloo\): The client"
    with pytest.raises(RuntimeError, match=words):
        launch.init("gloo")


def test_nccl_serves_gpus_with_settings_for_the_same_bits(started, gpus):
    os.environ.update(LOCAL_RANK="1", NCCL_ALGO="Tree")
    launch.init(deterministic=True)
    assert started == ["cpu:gloo,cuda:nccl"] and gpus == [1]
    assert {name: os.environ[name] for name in launch.REPEATABLE} == {
        "NCCL_NVLS_ENABLE": "0",
        "NCCL_ALGO": "Tree",  # the user's own, which is fixed, too
        "NCCL_PROTO": "Simple",
    }


def test_more_ranks_than_gpus_are_refused(started, gpus):
    os.environ["LOCAL_RANK"] = "2"
    with pytest.raises(ValueError, match="this machine has 2; start --nproc-per-node 2, or pass"):
        launch.init()
    launch.init("gloo")  # as the message advises
    assert started == ["gloo"] and gpus == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("NCCL_NVLS_ENABLE", "1"), ("NCCL_ALGO", "Ring,Tree"), ("NCCL_ALGO", "^Tree"),
     ("NCCL_ALGO", "NVLSTree"), ("NCCL_PROTO", "LL,Simple")],
)  # fmt: skip
def test_settings_that_change_the_order_of_sums_are_refused(started, gpus, name, value):
    os.environ[name] = value
    with pytest.raises(ValueError, match=f"{name}='{value.replace('^', '.')}', got True"):
        launch.init(deterministic=True)
    assert started == []


def test_settings_come_too_late_for_a_group_that_exists(started, gpus, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    assert launch.init() is dist.group.WORLD
    with pytest.raises(ValueError, match="before the start") as caught:
        launch.init(deterministic=True)
    exports = str(caught.value).partition("export ")[2].partition(" before")[0].split()
    os.environ.update(item.split("=") for item in exports)  # as the message advises
    assert launch.init(deterministic=True) is dist.group.WORLD


def described(line):
    return [words for words in report.report() if line in words]


def test_doctor_describes_the_ranks(started, monkeypatch):
    os.environ.update(LOCAL_RANK="1", LOCAL_WORLD_SIZE="1")
    text = fh.doctor()
    assert "ranks      torch.distributed with gloo" in text
    assert "no process group is initialised; fasthessian.distributed.init() starts it" in text
    assert "torchrun: RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29501" in text
    assert "hindrance" not in text
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    assert "4 ranks of 10000 threads share" in described("hindrance")[0]


def test_doctor_names_what_hinders_gpus(started, gpus, monkeypatch):
    assert "nccl 2.27.5" in report.report()[0]
    os.environ.update(LOCAL_WORLD_SIZE="3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 0)
    assert [words.partition(":")[2][:24] for words in described("hindrance")] == [
        " NCCL_NVLS_ENABLE is not", " 3 ranks share 2 GPUs: s",
    ]  # fmt: skip
    os.environ.update(NCCL_NVLS_ENABLE="0", LOCAL_WORLD_SIZE="2")
    assert described("hindrance") == []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for name, answer in (("backend", launch.default_backend()), ("rank", 0), ("world_size", 2)):
        monkeypatch.setattr(dist, f"get_{name}", lambda answer=answer: answer)
    assert described("hindrance") == []  # with the backend that the next message advises
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    assert "leave the backend to fasthessian.distributed.init()" in described("hindrance")[0]
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert "this build of torch has no NCCL" in described("hindrance")[0]


def test_a_process_group_is_described_and_returned():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert report.report()[1] == "process group: rank 0 of 1, backend gloo"
        assert launch.init(deterministic=True) is dist.group.WORLD
    finally:
        dist.destroy_process_group()


def test_the_example_prints_the_same_on_two_ranks(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    one = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, env=environment
    )
    two = torchrun(tmp_path, str(EXAMPLE))
    assert two.returncode == 0, two.stderr
    assert two.stdout == one.stdout != ""
    assert not list(Path(tmp_path).iterdir())
