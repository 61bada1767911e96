"""The state of a run can be written out, and a new process goes on from it to the bit."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fasthessian.krylov import state_file
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.state import LoopState, RunState, ThreeTermState
from fasthessian.krylov.three_term import ThreeTerm
from tests.support.continued_runs import (
    CASES,
    F32,
    F64,
    LOOPS,
    VALUES,
    diagonal,
    pairs,
    rest,
    steps,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each run gives without an interruption, and what a new process makes of its file."""
    folder, uninterrupted = tmp_path_factory.mktemp("runs"), {}
    for name, (new, before) in CASES.items():
        run = new()
        before(run)
        state_file.write(folder / f"{name}.npz", run)
        uninterrupted[name] = rest(run)
    for name in LOOPS:
        uninterrupted[name] = written_after_every_step(folder, name)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    env["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-m", "tests.support.continued_runs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return uninterrupted, {name: torch.load(folder / f"{name}.pt") for name in [*CASES, *LOOPS]}


def written_after_every_step(folder, name):
    """What the Ritz loop gives and the state after each of its steps, all of them written."""
    (folder / name).mkdir()
    new, wanted, before = LOOPS[name]
    run, states = new(), []
    steps(run, before)

    def callback():
        states.append(run.state.numbers())
        state_file.write(folder / name / f"{run.state.loop.made}.npz", run)

    return pairs(run, *wanted, callback) | {"states": states}


def same(found, want):
    if isinstance(want, torch.Tensor):
        assert found.dtype == want.dtype and torch.equal(found, want)
    elif isinstance(want, dict):
        assert set(found) == set(want)
        for name in want:
            same(found[name], want[name])
    elif isinstance(want, list):
        assert len(found) == len(want)
        for each, other in zip(found, want, strict=True):
            same(each, other)
    else:
        assert found == want


@pytest.mark.parametrize("name", CASES)
def test_a_new_process_goes_on_to_the_bit(both, name):
    uninterrupted, continued = both
    same(continued[name], uninterrupted[name])


@pytest.mark.parametrize("name", LOOPS)
def test_a_new_process_continues_the_ritz_loop_after_any_step(both, name):
    """The same bits of the pairs, and the same number of products."""
    want, continued = both[0][name], both[1][name]
    assert len(continued) == len(want["states"]) >= 24
    for made, found in continued.items():
        same(found["pairs"], want["pairs"])
        assert found["products"] == want["products"] - int(made), made


def test_the_loops_are_what_their_names_say(both):
    """All that a loop does is met between two files: restarts, searches, locking, renewals."""
    for name in LOOPS:
        states = both[0][name]["states"]
        last = states[-1]
        sides = (last["loop.upper"] is not None) + (last["loop.lower"] is not None)
        assert sides == (1 if name in ("one side", "limit in the search") else 2), name
        assert "search.size" in states[-1] and "search.size" not in states[0], name
        spent = last["loop.made"] + last["loop.reserved"] == LOOPS[name][1][-1]
        assert spent == ("limit" in name), name
    states = both[0]["both sides"]["states"]
    assert {s["kept"] for s in states} >= {0, 5, 9} and {s["dropped"] > 0 for s in states} == {0, 1}
    phases = [(s["loop.locking"], "search.size" in s) for s in states]
    changes = [phase for i, phase in enumerate(phases) if phase != phases[i - 1]]
    assert changes == [(False, False), (False, True), (True, False), *changes[:2]]
    assert both[0]["limit of a compressed run"]["states"][-1]["loop.reserved"] == 3


def test_the_cases_are_what_their_names_say(both):
    """Breakdowns, restarts, polls on their way and scaled products are met before the file."""
    for name, (new, before) in CASES.items():
        run = new()
        before(run)
        if isinstance(run, ThreeTerm):
            assert run.ended == ("end" in name and "deferred" not in name)
            continue
        state = run.state
        assert (state.own is not None) == ("breakdown" in name), name
        assert (state.kept > 0) == ("restart" in name or "renewal" in name), name
        assert (state.dropped > 0) == ("renewal" in name), name
        assert (state.factor not in (None, 1.0)) == ("norm" in name), name
        polled = "deferred" in name and ("middle" in name or "norm" in name)
        assert (state.pending is not None) >= polled, name
        assert (state.size < run.capacity) and both[0][name]["products"] > 0, name


def test_every_field_of_the_state_is_written():
    """A new field is a number, or one of those whose tensors are listed here."""
    fields = {f.name for f in dataclasses.fields(RunState)}
    run = Lanczos(diagonal(VALUES), 20, seed=0, deferred=True)
    steps(run, 9)
    numbers = {name for name in run.state.numbers() if "." not in name}
    others = {"basis", "W", "coefficients", "T", "pending", "loop", "search"}
    assert numbers | others == fields
    loop = {f"loop.{f.name}" for f in dataclasses.fields(LoopState)}
    assert set(run.state.numbers()) == numbers | loop
    assert set(run.state.tensors()) == {"V", "W", "cells", "counter", "T", "final"}
    fields = {f.name for f in dataclasses.fields(ThreeTermState)}
    run = ThreeTerm(diagonal(VALUES), 20, seed=0)
    assert set(run.state.numbers()) | set(run.state.tensors()) == fields


def test_a_file_of_another_run_is_refused(tmp_path):
    path, A = tmp_path / "run.npz", diagonal(VALUES)
    run = Lanczos(A, 20, seed=0)
    steps(run, 5)
    state_file.write(path, run)
    others = {
        "n=500, not n=499": Lanczos(diagonal(VALUES[:-1]), 20, seed=0),
        "dtype='float64', not dtype='float32'": Lanczos(diagonal(VALUES, F32), 20, seed=0),
        "capacity=20, not capacity=21": Lanczos(A, 21, seed=0),
        "schedule='dcgs2', not schedule='cgs2'": Lanczos(A, 20, seed=0, schedule="cgs2"),
        "rows='float64', not rows='float16'": Lanczos(A, 20, seed=0, basis="compressed"),
        "deferred=False, not deferred=True": Lanczos(A, 20, seed=0, deferred=True),
        "refill=True, not refill=False": Lanczos(A, 20, seed=0, refill=False),
        "configuration": ThreeTerm(A, 20, seed=0),
    }
    for words, other in others.items():
        before = {name: t.clone() for name, t in other.state.tensors().items()}
        with pytest.raises(ValueError) as caught:
            state_file.read(path, other)
        assert words in str(caught.value) and "\n" not in str(caught.value)
        same(other.state.tensors(), before)
    state_file.read(path, Lanczos(A, 20, seed=9))


def test_a_damaged_file_is_refused(tmp_path):
    path, A = tmp_path / "run.npz", diagonal(VALUES)
    run = Lanczos(A, 20, seed=0)
    steps(run, 5)
    with pytest.raises(FileNotFoundError):
        state_file.read(path, run)
    state_file.write(path, run)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        state_file.write(path, run)
    state_file.write(path, run, overwrite=True)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (b"", b"text", whole[:middle], whole[:-1], flipped):
        path.write_bytes(content)
        fresh = Lanczos(A, 20, seed=0)
        with pytest.raises(ValueError, match="is not the saved state of a run") as caught:
            state_file.read(path, fresh)
        assert "\n" not in str(caught.value) and fresh.size == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, a: h["numbers"].pop("beta"), "numbers are missing or unknown: beta"),
        (lambda h, a: h["numbers"].update(beta="x"), "beta must be float, got 'x'"),
        (lambda h, a: h["numbers"].update(size=99), "size must be from 0 to 20, got 99"),
        (lambda h, a: h["numbers"].pop("loop.made"), "numbers are missing or unknown: made"),
        (lambda h, a: h["numbers"].update({"search.size": 1}), "capacity of the search must be"),
        (lambda h, a: h.pop("numbers"), "it has no configuration and numbers"),
        (lambda h, a: a.pop("W"), "tensors are missing or unknown: W"),
        (lambda h, a: a.pop("T"), "tensors are missing or unknown: T"),
        (lambda h, a: a.update(X=np.zeros(1)), "tensors are missing or unknown: X"),
        (lambda h, a: a.update(V=a["V"][:, 1:]), "V must be torch.float64 of shape"),
        (lambda h, a: a.update(W=a["W"].astype(np.float32)), "got torch.float32 of shape"),
    ],
)
def test_a_file_with_other_content_is_refused(tmp_path, change, words):
    path, A = tmp_path / "run.npz", diagonal(VALUES)
    run = Lanczos(A, 20, seed=0)
    steps(run, 5)
    state_file.write(path, run)
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    header = json.loads(str(arrays.pop("__record__")))
    change(header, arrays)
    np.savez(path, **{"__record__": np.array(json.dumps(header))}, **arrays)
    fresh = Lanczos(A, 20, seed=0)
    with pytest.raises(ValueError, match=words) as caught:
        state_file.read(path, fresh)
    assert "\n" not in str(caught.value) and fresh.size == 0


@pytest.mark.parametrize("dtype", [F32, F64])
def test_every_number_and_tensor_comes_back(tmp_path, dtype):
    run, fresh = (Lanczos(diagonal(VALUES, dtype), 20, seed=0, deferred=True) for _ in range(2))
    steps(run, 20)
    run.poll(wait=True)
    run.restart(torch.arange(5))
    steps(run, 9)
    state_file.write(tmp_path / "run.npz", run)
    state_file.read(tmp_path / "run.npz", fresh)
    assert run.state.coefficients.counter.tolist() == [5, 5] and run.state.pending is not None
    same(fresh.state.tensors(), run.state.tensors())
    assert fresh.state.numbers() == run.state.numbers()
