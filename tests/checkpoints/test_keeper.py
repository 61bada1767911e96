"""When a call is saved and when it stops: intervals, limits of time, signals."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import fasthessian as fh
from fasthessian.checkpoints import keeper
from fasthessian.checkpoints.folder import Folder
from tests.support.bits import digest
from tests.support.checkpoints import CALLS, blocks, diagonal, hessian

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture
def clock(monkeypatch):
    """The time of the keeper: a list of one number of seconds, which tests move."""
    now = [100.0]
    monkeypatch.setattr(keeper.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("fasthessian.krylov.checkpointed.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def saves(monkeypatch):
    """The products made at each save."""
    found = []
    write = Folder.write

    def counted(self, body, *args):
        found.append(sum(body["made"].values()))
        return write(self, body, *args)

    monkeypatch.setattr(Folder, "write", counted)
    return found


def timed(clock, seconds, values=None):
    """An operator whose products take so many seconds of the clock."""
    d = torch.linspace(1, 2, 50) if values is None else values

    def matvec(v):
        clock[0] += seconds
        return d * v

    return fh.SymmetricOperator(matvec, len(d), check=False)


def test_a_run_is_saved_before_its_first_product_then_every_minute_and_at_its_end(
    tmp_path, clock, saves
):
    fh.density(timed(clock, 25), steps=10, checkpoint=tmp_path / "run.fh")
    assert saves == [0, 3, 6, 9, 10]


def test_long_products_are_saved_one_by_one(tmp_path, clock, saves):
    fh.density(timed(clock, 100), steps=4, checkpoint=tmp_path / "run.fh")
    assert saves == [0, 1, 2, 3, 4]


def test_the_end_of_a_phase_is_saved(tmp_path, clock, saves):
    fh.density(timed(clock, 1), steps=4, probes=3, checkpoint=tmp_path / "run.fh")
    assert saves == [0, 4, 8, 12]


def test_saving_takes_a_small_share_of_the_time(tmp_path, clock, saves, monkeypatch):
    """A save of 10 seconds is made every 500."""
    write = Folder.write
    monkeypatch.setattr(Folder, "write", lambda *args: (clock.__setitem__(0, clock[0] + 10),
                                                        write(*args))[1])  # fmt: skip
    fh.density(timed(clock, 25), steps=45, checkpoint=tmp_path / "run.fh")
    assert saves == [0, 20, 40, 45]


def test_a_limit_of_time_ends_a_call_before_the_product_that_would_exceed_it(
    tmp_path, clock, capsys
):
    path = tmp_path / "run.fh"
    want = digest(fh.density(timed(clock, 10), steps=12))
    started = clock[0]
    with pytest.raises(fh.Stopped) as caught:
        fh.density(timed(clock, 10), steps=12, checkpoint=path, time_limit=55)
    assert caught.value.code == 0 and clock[0] - started == 50
    assert str(caught.value) == (
        f"stopped by time_limit=55 after 4 products, saved in {path}; go on with "
        f"fh.resume({str(path)!r}, A)"
    )
    assert capsys.readouterr().err == f"{caught.value}\n"
    with pytest.raises(fh.Stopped, match="after 8 products"):
        fh.resume(path, timed(clock, 10), time_limit=55)
    assert digest(fh.resume(path, timed(clock, 10))) == want


def test_a_block_of_products_is_expected_to_take_longer(tmp_path, clock):
    """8 products of 10 s in one pass do not fit into 170 s with 9 of them made."""
    d = torch.linspace(-1, 1, 4000)
    with pytest.raises(fh.Stopped, match="after 8 products"):
        fh.trace(timed(clock, 10, d), checkpoint=tmp_path / "run.fh", time_limit=165)


def test_the_time_of_a_save_is_expected_too(tmp_path, clock, monkeypatch):
    write = Folder.write
    monkeypatch.setattr(Folder, "write", lambda *args: (clock.__setitem__(0, clock[0] + 20),
                                                        write(*args))[1])  # fmt: skip
    started = clock[0]
    with pytest.raises(fh.Stopped):
        fh.density(timed(clock, 10), steps=12, checkpoint=tmp_path / "run.fh", time_limit=100)
    assert 80 <= clock[0] - started <= 100


def test_the_time_of_reading_a_checkpoint_counts(tmp_path, clock, monkeypatch):
    path, A = tmp_path / "run.fh", timed(clock, 10)
    with pytest.raises(fh.Stopped, match="after 4 products"):
        fh.density(A, steps=12, checkpoint=path, time_limit=55)
    read = Folder.read
    monkeypatch.setattr(Folder, "read", lambda *args: (clock.__setitem__(0, clock[0] + 30),
                                                       read(*args))[1])  # fmt: skip
    with pytest.raises(fh.Stopped, match="after 5 products"):
        fh.resume(path, A, time_limit=55)


def test_a_limit_that_is_too_short_for_one_product_is_refused(tmp_path, clock):
    path = tmp_path / "run.fh"
    words = r"time_limit=7 is too short: one of the products took 10 s; 1 are saved in .*run.fh: "
    with pytest.raises(fh.InputError, match=words + "go on with fh.resume") as caught:
        fh.density(timed(clock, 10), steps=4, checkpoint=path, time_limit=7)
    assert "\n" not in str(caught.value)
    A = timed(clock, 10)
    with pytest.raises(fh.InputError, match=words):
        fh.resume(path, A, time_limit=7)
    assert A.matvecs == 0
    assert fh.resume(path, A, time_limit=70).matvecs == 4 and A.matvecs == 3


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_a_signal_saves_and_ends_a_call_at_the_next_product(tmp_path, number, capsys):
    path, d, sent = tmp_path / "run.fh", torch.linspace(1, 2, 50), []

    def matvec(v):
        sent.append(1)
        if len(sent) == 5:
            signal.raise_signal(number)
        return d * v

    def own(*args):
        pytest.fail("the handler of the program was called")

    before = {each: signal.signal(each, own) for each in NUMBERS}
    try:
        with pytest.raises(fh.Stopped, match=f"stopped by {number.name} after 4 products"):
            fh.density(fh.SymmetricOperator(matvec, 50, check=False), steps=9, checkpoint=path)
        assert all(signal.getsignal(each) is own for each in NUMBERS)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert capsys.readouterr().err.count("go on with") == 1
    found = fh.resume(path, fh.SymmetricOperator(matvec, 50, check=False))
    want = fh.density(fh.SymmetricOperator(lambda v: d * v, 50, check=False), steps=9)
    assert digest(found) == digest(want)


def test_a_signal_in_the_last_product_ends_the_process_after_the_record_is_saved(tmp_path):
    path, A = tmp_path / "run.fh", diagonal()
    with pytest.raises(fh.Stopped, match="stopped by SIGTERM after 6 products"):
        fh.density(A, steps=6, checkpoint=path, progress=lambda made, total: (
            made == total and signal.raise_signal(signal.SIGTERM)))  # fmt: skip
    made = diagonal()
    assert fh.resume(path, made).matvecs == 6 and made.matvecs == 0


def test_handlers_are_restored_after_an_error(tmp_path):
    before = [signal.getsignal(number) for number in NUMBERS]
    A = fh.SymmetricOperator(lambda v: v * torch.nan, 50, check=False)
    with pytest.raises(fh.InputError):
        fh.density(A, checkpoint=tmp_path / "run.fh")
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_no_handler_is_installed_without_a_checkpoint_or_outside_of_the_main_thread(tmp_path):
    before, seen, found = [signal.getsignal(number) for number in NUMBERS], [], []

    def look(*args):
        seen.append([signal.getsignal(number) for number in NUMBERS])

    fh.density(diagonal(), steps=3, progress=look)
    assert seen == [before] * 3
    call = functools.partial(
        fh.density, diagonal(), steps=3, progress=look, checkpoint=tmp_path / "run.fh"
    )
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    assert seen == [before] * 6 and found[0].matvecs == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spectrum", "blocks", "landscape"])
def test_a_process_that_gets_sigterm_exits_with_code_0(name, tmp_path):
    folder = tmp_path / "run.fh"
    command = [sys.executable, "-m", "tests.support.checkpoints", name, str(folder), "0.05"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(folder.glob("index-*.json")):
        time.sleep(0.01)
    time.sleep(0.3)
    started = time.monotonic()
    process.terminate()
    _, err = process.communicate(timeout=25)
    assert process.returncode == 0 and time.monotonic() - started < 5
    assert err.startswith("stopped by SIGTERM after ") and err.count("\n") == 1


def test_blocks_and_losses_stop_too(tmp_path, clock, monkeypatch):
    """All runs of a dictionary stop together. Each pass and each loss takes 10 s; so does the
    fingerprint. The second pass has two losses, which are no cheaper, so the third would too."""
    monkeypatch.setattr(time, "sleep", lambda _: clock.__setitem__(0, clock[0] + 10))
    want = fh.density(blocks(), steps=8)
    path = tmp_path / "blocks.fh"
    with pytest.raises(fh.Stopped, match="after 10 products"):
        fh.density(blocks(), steps=8, checkpoint=path, time_limit=65)
    assert digest(fh.resume(path, blocks())) == digest(want)
    directions, path = torch.eye(hessian().n)[0], tmp_path / "landscape.fh"
    with pytest.raises(fh.Stopped, match="after 3 losses"):
        fh.landscape(hessian(), directions, checkpoint=path, time_limit=55)
    want = fh.landscape(hessian(), directions)
    assert torch.equal(fh.resume(path, hessian()).losses, want.losses)


def test_the_index_is_plain_json(tmp_path):
    new, call = CALLS["spectrum of blocks"]
    call(new(), checkpoint=tmp_path / "run.fh")
    path = max((tmp_path / "run.fh").glob("index-*.json"))
    body = json.loads(path.read_text())["body"]
    assert body["finished"] and body["call"]["algorithm"] == "spectrum"
    assert set(body["made"]) == set(new())
