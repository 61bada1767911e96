"""The batch script of examples/slurm, with stand-ins for the commands of Slurm and for torchrun."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples/slurm"
BATCH = FOLDER / "two_nodes.sbatch"

SCONTROL = """#!/bin/bash
echo "scontrol $*" >> calls
[ "$1" = show ] && printf 'node1\\nnode2\\n'
exit 0
"""
SRUN = """#!/bin/bash
echo "srun $*" >> calls
echo "nvls $NCCL_NVLS_ENABLE cpus $SRUN_CPUS_PER_TASK" >> calls
exec "$@"
"""
# writes its process number as the first rank of a node does, and leaves with 0 when signalled
TORCHRUN = """#!/bin/bash
trap 'echo signalled >> calls; exit 0' USR1
ls *.pid 2>/dev/null >> calls
echo $$ > "run.fh.$(hostname).pid"
case "$BEHAVIOUR" in
    done) touch spectrum.npz ;;
    fails) exit 3 ;;
    long) for i in $(seq 200); do sleep 0.05; done ;;
    slow) trap 'echo signalled >> calls; sleep 1; exit 0' USR1
          for i in $(seq 200); do sleep 0.05; done ;;
    late) trap 'touch spectrum.npz; exit 0' USR1
          for i in $(seq 200); do sleep 0.05; done ;;
    breaks) trap 'exit 4' USR1
          for i in $(seq 200); do sleep 0.05; done ;;
esac
"""


@pytest.fixture
def folder(tmp_path):
    """A working folder with the stand-ins in ``bin``."""
    (tmp_path / "bin").mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("torchrun", TORCHRUN)):
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path


def run(folder, behaviour, *, signals=0):
    """Exit code of the script that gets so many signals, and the calls that were made."""
    environment = {
        **os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "BEHAVIOUR": behaviour,
        "SLURM_JOB_ID": "712345", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "32",
    }  # fmt: skip
    with subprocess.Popen(["bash", BATCH], cwd=folder, env=environment) as process:
        for number in range(signals):
            deadline = time.monotonic() + 20
            while not any(p.read_text().strip() for p in folder.glob("run.fh.*.pid")):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.3 * number)
            process.send_signal(signal.SIGUSR1)
        code = process.wait(30)
    return code, (folder / "calls").read_text()


def test_a_run_that_ends_is_not_repeated(folder):
    code, calls = run(folder, "done")
    assert code == 0 and "requeue" not in calls
    assert re.search(
        r"srun torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint "
        r"node1:22345 --rdzv-id 712345 examples/slurm/spectrum.py --checkpoint run.fh",
        calls,
    )
    assert "nvls 0 cpus 32" in calls


@pytest.mark.parametrize(("behaviour", "signals"), [("long", 1), ("slow", 1), ("slow", 2)])
def test_a_run_that_is_stopped_is_put_into_the_queue_again(folder, behaviour, signals):
    code, calls = run(folder, behaviour, signals=signals)
    assert code == 0
    assert calls.splitlines()[-2:] == ["signalled", "scontrol requeue 712345"]


@pytest.mark.parametrize(
    ("behaviour", "signals", "expected"),
    [("fails", 0, 3), ("empty", 0, 0), ("breaks", 1, 4), ("late", 1, 0)],
)
def test_a_run_that_fails_or_finishes_is_not_repeated(folder, behaviour, signals, expected):
    code, calls = run(folder, behaviour, signals=signals)
    assert code == expected and "requeue" not in calls


def test_process_numbers_of_an_earlier_run_are_removed(folder):
    (folder / "run.fh.node7.pid").write_text("1")
    _, calls = run(folder, "done")
    assert "node7" not in calls


def test_the_scheduler_signals_the_script_before_the_time_is_over():
    options = re.findall(r"^#SBATCH (\S+)", BATCH.read_text(), re.MULTILINE)
    for option in ("--signal=B:USR1@120", "--requeue", "--nodes=2", "--ntasks-per-node=1"):
        assert option in options
    assert subprocess.run(["bash", "-n", BATCH], check=False).returncode == 0
    assert (FOLDER / "spectrum.py").exists()
