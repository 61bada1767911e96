"""A call that was interrupted before any product goes on to the same bits."""

import functools
import multiprocessing
import os
import signal
import time

import pytest
import torch

import fasthessian as fh
from fasthessian.checkpoints import keeper
from tests.support.bits import digest
from tests.support.checkpoints import CALLS, caught, save_at_every_boundary, written

SAVED = keeper.Keeper.boundary


class Killed(BaseException):
    pass


@pytest.fixture
def interrupted(monkeypatch):
    """A function that sets after how many boundaries, each saved, the calls to come are killed."""
    monkeypatch.setattr(keeper, "INTERVAL", 0.0)
    monkeypatch.setattr(keeper, "SHARE", 1e9)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no machine is cut off here
    count = {"met": 0, "last": None}

    def boundary(self, products):
        SAVED(self, products)
        if self._saving is not None:
            count["met"] += 1
            if count["met"] == count["last"]:
                raise Killed

    monkeypatch.setattr(keeper.Keeper, "boundary", boundary)

    def after(last):
        found, count["met"], count["last"] = count["met"], 0, last
        return found

    return after


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_killed_again_and_again_gives_the_same_bits(name, tmp_path, interrupted):
    """And the same products, progress and warnings; none of them twice."""
    new, call = CALLS[name]
    plain, seen = caught(lambda: call(new()))
    interrupted(None)
    saved, same = caught(lambda: call(new(), checkpoint=tmp_path / "whole"))
    total = interrupted(None)
    assert (digest(saved), same) == (digest(plain), seen) and total > 1
    for every in sorted({1, 2, 1 + total // 2, total} if total < 12 else {5, 1 + total // 2}):
        path = tmp_path / f"run {every}"
        with pytest.raises(Killed):
            interrupted(1)
            call(new(), checkpoint=path)
        found, counts = resumed(path, new, interrupted, max(every, 2), total)
        assert found == (digest(plain), seen), every
        assert counts == sorted(counts)
        interrupted(None)
        again, warned = caught(functools.partial(fh.resume, path, new()))
        assert (digest(again), warned) == (digest(plain), seen) and interrupted(None) == 0


def resumed(path, new, interrupted, every, most):
    """What the last of several resumed calls returns, each but it killed at a boundary."""
    counts = []
    for _ in range(most):
        interrupted(every)
        try:
            found, warned = caught(
                lambda: fh.resume(path, new(), progress=lambda made, _: counts.append(made))
            )
            return (digest(found), warned), counts
        except Killed:
            pass
    pytest.fail(f"not finished after {most} calls")


@pytest.fixture(scope="module")
def start():
    """A function that starts a call in a new process, forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.checkpoints", "tests.support.bits"])

    def started(*words):
        process = context.Process(target=written, args=tuple(map(str, words)))
        process.start()
        return process

    return started


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["eigsh", "eigsh cgs2", "trace deflated", "density", "spectrum", "blocks", "landscape"]
)
def test_a_process_that_is_killed_at_any_moment_goes_on_to_the_same_bits(name, tmp_path, start):
    """SIGKILL at moments that are spread over the run, saves included."""
    folder, output = tmp_path / "run.fh", tmp_path / "printed"
    moments = torch.rand(4, generator=torch.Generator().manual_seed(len(name))).tolist()
    kills = 0
    for wait in moments:
        process = start(output, name, folder, 0.05)
        while process.is_alive() and not list(folder.glob("index-*.json")):
            time.sleep(0.005)
        process.join(0.3 * wait)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 2
    ends = []
    for place in (folder, tmp_path / "whole"):
        process = start(output, name, place)
        process.join()
        assert process.exitcode == 0
        ends.append(output.read_text())
    assert ends[0] == ends[1] != ""


def test_save_at_every_boundary_is_what_the_killed_process_does(monkeypatch):
    monkeypatch.setattr(keeper, "INTERVAL", 60.0)
    monkeypatch.setattr(keeper, "SHARE", 0.02)
    save_at_every_boundary()
    assert keeper.INTERVAL == 0.0 < keeper.SHARE
