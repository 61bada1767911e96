"""The state of a run can be written out, and a new process goes on from it to the bit."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    read,
    rest,
    steps,
    write,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each run gives without an interruption, and what a new process makes of its state."""
    folder, uninterrupted = tmp_path_factory.mktemp("runs"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        for name, (new, before) in CASES.items():
            run = new()
            before(run)
            write(folder / name, run)
            uninterrupted[name] = rest(run)
        for name in LOOPS:
            uninterrupted[name] = written_at_every_request(folder, name)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    env["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-m", "tests.support.continued_runs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return uninterrupted, {name: torch.load(folder / f"{name}.pt") for name in [*CASES, *LOOPS]}


def written_at_every_request(folder, name):
    """What the Ritz loop gives and the state at each of its requests, all of them written."""
    (folder / name).mkdir()
    new, wanted, before = LOOPS[name]
    run, states = new(), []
    steps(run, before)

    def callback(counted):
        states.append(run.state.numbers() | {"made": counted.made})
        write(folder / name / f"{counted.made}", run, counted.made)

    return pairs(run, *wanted, callback) | {"states": states}


def same(found, want):
    if isinstance(want, torch.Tensor):
        assert found.dtype == want.dtype and torch.equal(found, want)
    elif isinstance(want, dict):
        assert set(found) == set(want)
        for name in want:
            same(found[name], want[name])
    elif isinstance(want, (list, tuple)):
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
def test_a_new_process_continues_the_ritz_loop_from_any_request(both, name):
    """The same bits of the pairs, and the same number of products."""
    want, continued = both[0][name], both[1][name]
    assert len(continued) == len(want["states"]) >= 24
    for made, found in continued.items():
        same(found["pairs"], want["pairs"])
        assert found["products"] == want["products"] - made, made


def test_the_loops_are_what_their_names_say(both):
    """All that a loop does is met between two states: restarts, searches, locking, renewals."""
    for name in LOOPS:
        states = both[0][name]["states"]
        last = states[-1]
        sides = (last["loop.upper"] is not None) + (last["loop.lower"] is not None)
        assert sides == (1 if name in ("one side", "limit in the search") else 2), name
        assert "search.size" in states[-1] and "search.size" not in states[0], name
        spent = last["made"] + 1 + last["loop.reserved"] == LOOPS[name][1][-1]
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
    assert set(run.state.tensors()) == {"cells", "counter", "T", "final"}
    assert set(run.state.split()) == {"V", "W"}
    fields = {f.name for f in dataclasses.fields(ThreeTermState)}
    run = ThreeTerm(diagonal(VALUES), 20, seed=0)
    state = run.state
    assert {*state.numbers(), *state.tensors(), *state.split()} == fields


class Tensors:
    """Tensors as a checkpoint gives them."""

    def __init__(self, tensor):
        self._tensor, self.dtype, self.shape = tensor, tensor.dtype, tuple(tensor.shape)

    def tensor(self, device="cpu"):
        return self._tensor.to(device).clone()

    def read_into(self, out):
        out.copy_(self._tensor)


def parts(run):
    """The numbers and all tensors of a run's state."""
    return run.state.numbers(), {**run.state.tensors(), **run.state.split()}


def restore(run, numbers, tensors):
    run.state.restore(numbers, {name: Tensors(t) for name, t in tensors.items()})


def test_the_state_of_another_run_is_refused():
    A = diagonal(VALUES)
    run = Lanczos(A, 20, seed=0)
    steps(run, 5)
    others = {
        r"V must be torch.float64 of shape \(6, 499\)": Lanczos(diagonal(VALUES[:-1]), 20, seed=0),
        "must be torch.float32": Lanczos(diagonal(VALUES, F32), 20, seed=0),
        r"cells must be torch.float64 of shape \(22, 25\)": Lanczos(A, 21, seed=0),
        "V must be torch.float16": Lanczos(A, 20, seed=0, basis="compressed"),
        "numbers are missing or unknown": ThreeTerm(A, 20, seed=0),
    }
    for words, other in others.items():
        before = {name: t.clone() for name, t in parts(other)[1].items()}
        with pytest.raises(ValueError, match=words) as caught:
            restore(other, *parts(run))
        assert "\n" not in str(caught.value)
        same(parts(other)[1], before)
    restore(Lanczos(A, 20, seed=9), *parts(run))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n, t: n.pop("beta"), "numbers are missing or unknown: beta"),
        (lambda n, t: n.update(beta="x"), "beta must be float, got 'x'"),
        (lambda n, t: n.update(size=99), "size must be from 0 to 20, got 99"),
        (lambda n, t: n.pop("loop.began"), "numbers are missing or unknown: began"),
        (lambda n, t: n.update({"search.size": 1}), "capacity of the search must be"),
        (lambda n, t: t.pop("W"), "tensors are missing or unknown: W"),
        (lambda n, t: t.pop("T"), "tensors are missing or unknown: T"),
        (lambda n, t: t.update(X=torch.zeros(1)), "tensors are missing or unknown: X"),
        (lambda n, t: t.update(V=t["V"][:, 1:]), "V must be torch.float64 of shape"),
        (lambda n, t: t.update(W=t["W"].float()), "got torch.float32 of shape"),
    ],
)
def test_a_state_with_other_content_is_refused(change, words):
    A = diagonal(VALUES)
    run, fresh = Lanczos(A, 20, seed=0), Lanczos(A, 20, seed=0)
    steps(run, 5)
    numbers, tensors = parts(run)
    change(numbers, tensors)
    with pytest.raises(ValueError, match=words) as caught:
        restore(fresh, numbers, tensors)
    assert "\n" not in str(caught.value) and fresh.size == 0


@pytest.mark.parametrize("dtype", [F32, F64])
def test_every_number_and_tensor_comes_back(tmp_path, dtype):
    run, fresh = (Lanczos(diagonal(VALUES, dtype), 20, seed=0, deferred=True) for _ in range(2))
    steps(run, 20)
    run.poll(wait=True)
    run.restart(torch.arange(5))
    steps(run, 9)
    write(tmp_path / "run.fh", run)
    read(tmp_path / "run.fh", fresh)
    assert run.state.coefficients.counter.tolist() == [5, 5] and run.state.pending is not None
    same(parts(fresh), parts(run))
