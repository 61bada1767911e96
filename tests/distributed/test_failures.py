"""A rank that dies, raises or hangs ends the job on all ranks, with one line that says which."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from fasthessian.distributed.failures import Connection
from tests.support.failing_ranks import CASES, SCRIPT, START, TIMEOUT

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
AT_ONCE = 5.0  # seconds on a busy machine; 0.1 to 0.7 on an idle one
BUSY = " s; if it was busy, set a longer timeout: group=fasthessian.distributed.Ranks(group, "
RAISED = "rank 1 failed: ZeroDivisionError: the plot cannot be drawn"
EXPECTED = {  # what the other ranks say, and within which seconds
    "killed": ("rank 2 died: the process has ended", 0.0, AT_ONCE),
    "killed_with_the_store": (
        "rank 0, which holds the store of the process group, died", 0.0, AT_ONCE,
    ),
    "hung": (f"rank 1 did not answer within {TIMEOUT:g}{BUSY}", TIMEOUT, TIMEOUT + AT_ONCE),
    "raised_between_sums": (RAISED, 0.0, AT_ONCE),
    "raised_in_a_product": (RAISED, 0.0, AT_ONCE),
    "absent_at_the_start": (
        f"rank 1 did not answer within {START:g}{BUSY}", START, START + AT_ONCE,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def reports():
    """Each case runs in processes of its own, because a rank may be killed."""
    command = [sys.executable, SCRIPT, *CASES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(CASES), done.stderr
    return dict(zip(CASES, map(json.loads, lines), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_all_ranks_end_with_the_same_line(reports, case):
    line, low, high = EXPECTED[case]
    others = [report for rank, report in enumerate(reports[case]) if rank != CASES[case][0]]
    for message, seconds, unchanged in others:
        assert message.startswith(f"UnsupportedError: {line}")
        assert low - 0.1 <= seconds < high
        assert unchanged


class Pending:
    """A collective that never ends, although no connection of this rank breaks."""

    def wait(self, timeout):
        time.sleep(timeout.total_seconds())
        raise RuntimeError("Operation timed out!")

    def is_completed(self):
        return False


@pytest.mark.parametrize(("stopped", "how", "low"), [(True, "closed", 0.4), (False, "late", 1.2)])
def test_a_rank_that_waits_looks_whether_another_one_has_stopped(stopped, how, low):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        connection = Connection(dist.group.WORLD, 300.0, 100.0)
        connection._begin()
        if stopped:
            connection._set("stopped", "")
        began = time.monotonic()
        assert connection._waited(Pending(), 1.2) == (how, "")
        assert low <= time.monotonic() - began < low + AT_ONCE
    finally:
        dist.destroy_process_group()


class Broken(Pending):
    """A reduce-scatter of gloo after the death of a peer: it fails at once, and never completes."""

    def wait(self, timeout):
        raise RuntimeError("Connection closed by peer\nand more")


def test_a_collective_that_fails_at_once_is_not_waited_for():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        began = time.monotonic()
        found = Connection(dist.group.WORLD, 300.0, 100.0)._waited(Broken(), 60.0)
        assert found == ("closed", "Connection closed by peer")
        assert time.monotonic() - began < AT_ONCE
    finally:
        dist.destroy_process_group()
