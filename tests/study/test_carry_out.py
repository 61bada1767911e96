"""A study is carried out in any number of pieces; what it measures is replaced by its inputs."""

import contextlib
import errno
import os
import signal
import threading
import time

import pytest

from fasthessian.errors import InputError, Stopped
from fasthessian.study import analysis, carry_out, data, training
from fasthessian.study.carry_out import Asked, Clock, Limits
from fasthessian.study.descents import Descent
from fasthessian.study.networks import Network, Run
from fasthessian.study.recipes import RECIPES
from fasthessian.study.records import DIVERGED
from fasthessian.study.schedule import READY, TRAIN, Speed, Task
from fasthessian.study.store import VECTORS, Folder
from tests.support.small_study import contents, images, replace_analysis

pytest.importorskip("safetensors")
RECIPE = RECIPES["laptop"].changed(
    epochs=2, batch_size=30, lrs=(0.1, 0.02), checkpoints=(0, 2), width=2, train_images=30,
    images=20, spectrum_images=20, seeds=2,
)  # fmt: skip
NETWORKS = [Network(8), Network(8, "no-bn")]


class Watched:
    """Keeps what a study shows; ``act`` is called at each step."""

    def __init__(self, act=lambda words, done: None):
        self.words, self.steps, self.said, self.act = [], [], [], act

    def begin(self, words, ended, whole):
        self.words.append(words)
        self.counts = ended, whole

    def step(self, done, total, left):
        self.steps.append((self.words[-1], done, total, left))
        self.act(self.words[-1], done)

    def say(self, text):
        self.said.append(text)


@pytest.fixture(scope="session")
def pixels(tmp_path_factory):
    return data.load(images(tmp_path_factory.mktemp("small") / "cifar"))


@pytest.fixture(autouse=True)
def starts(monkeypatch):
    """The start vectors that the measurements were given."""
    return replace_analysis(monkeypatch)


def run(root, pixels, watch=None, limits=None, networks=NETWORKS, recipe=RECIPE):
    """Carry out a study in this folder; what was shown."""
    watch, folder = watch or Watched(), Folder(root, {"recipe": {}})
    folder.begin()
    with limits or Limits() as limits:
        watch.failed = carry_out.carry_out(Asked(networks, recipe, pixels), folder, limits, watch)
    return watch


@pytest.fixture(scope="session")
def whole(tmp_path_factory, pixels):
    """The folder of a study that was carried out in one piece, made by the first test."""
    return tmp_path_factory.mktemp("whole") / "study"


def finished(whole, pixels):
    if not whole.exists():
        run(whole, pixels)
    return contents(Folder(whole, {}))


def test_a_study_trains_analyses_and_starts_from_the_vectors_before(whole, pixels, starts):
    watch = run(whole, pixels)
    found = Folder(whole, {}).results()
    assert len(found.trainings) == 2 * 2 + 2
    assert len(found.measurements) == 2 * (2 * 2 + 2)
    assert len(found.landscapes) == 2 * 2 + 2
    assert {start for (_, epoch, _), start in starts.items() if epoch == 0} == {None}
    assert {start for (_, epoch, _), start in starts.items() if epoch == 2} == {0.0}
    assert {run.seed for run, _, _ in found.landscapes} == {0}
    assert found.landscapes[found.measurements[0].run, 2, "train"].losses[0, 0] == 2.0
    traces = {(row.run, row.epoch): row.trace for row in found.measurements}
    assert len(set(traces.values())) == len(traces)  # each checkpoint has its weights
    assert watch.counts == (23, 24)
    assert run(whole, pixels).words == []  # all is done


def test_a_study_in_pieces_finds_the_same(tmp_path, whole, pixels):
    """Stopped in a training, an analysis and a landscape, and with one network first."""
    stops = ["train resnet8, seed 0, rate 0.02", "analyse resnet8, seed 1", "landscape resnet8"]

    def stop(words, done):
        if stops and words.startswith(stops[0]) and (done == 2 or "train" not in words):
            stops.pop(0)
            raise Stopped("here")

    run(tmp_path / "study", pixels, networks=NETWORKS[1:])
    for _ in range(3):
        with pytest.raises(Stopped):
            run(tmp_path / "study", pixels, Watched(stop))
    run(tmp_path / "study", pixels)
    assert contents(Folder(tmp_path / "study", {})) == finished(whole, pixels)


def test_a_full_disk_loses_nothing(tmp_path, whole, pixels, monkeypatch):
    write, count = os.replace, 0

    def replace(*paths):
        nonlocal count
        count += 1
        if count % 7 == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*paths)

    monkeypatch.setattr(os, "replace", replace)
    failures = 0
    while True:
        try:
            run(tmp_path / "study", pixels)
            break
        except OSError:
            failures += 1
    assert failures > 3
    assert contents(Folder(tmp_path / "study", {})) == finished(whole, pixels)
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_stops_a_study_at_the_next_step(tmp_path, pixels, name):
    before = signal.getsignal(getattr(signal, name))
    watch = Watched(lambda *step: os.kill(os.getpid(), getattr(signal, name)))
    with pytest.raises(Stopped, match=f"stopped by {name}"):
        run(tmp_path / "study", pixels, watch)
    assert len(watch.steps) == 1
    assert signal.getsignal(getattr(signal, name)) == before


def test_the_limit_of_time(tmp_path, pixels, monkeypatch):
    with pytest.raises(Stopped, match=r"stopped by the time limit of 1e-09 s$"):
        run(tmp_path / "study", pixels, limits=Limits(1e-9))
    limits = Limits(100.0)
    limits.check("analyse", 90.0)
    with pytest.raises(Stopped, match="limit of 100 s before: analyse, which takes about 100 s"):
        limits.check("analyse", 99.99999)
    words = "100 s is too short before: analyse, which takes about 200 s and is saved as a whole; "
    with pytest.raises(ValueError, match=f"{words}give 300 s or more"):
        limits.check("analyse", 200.0)
    Limits(300.0).check("analyse", 200.0)  # the advice
    monkeypatch.setattr(Speed, "seconds", lambda speed, task: 200.0)
    recipe = RECIPE.changed(seeds=1, lrs=(0.1,))
    study = {"networks": [Network(8, "no-bn")], "recipe": recipe}
    with pytest.raises(ValueError, match="too short before: analyse resnet8-no-bn, seed 0, epoch"):
        run(tmp_path / "study", pixels, limits=Limits(100.0), **study)
    run(tmp_path / "study", pixels, limits=Limits(300.0), **study)


def test_a_network_that_diverges_does_not_stop_the_study(tmp_path, pixels):
    recipe = RECIPE.changed(lrs=(1e9, 1e8), seeds=2, epochs=1, checkpoints=(0, 1))
    watch = run(tmp_path / "study", pixels, networks=[Network(8, "no-bn")], recipe=recipe)
    found = Folder(tmp_path / "study", {}).results()
    assert [each.status for each in found.trainings] == [DIVERGED] * 2
    assert found.measurements == ()
    assert len(watch.words) == 2


def test_descents_are_tasks_of_a_study(tmp_path, pixels):
    """They are done once, stop in the middle, and one that diverges is named."""
    folder = Folder(tmp_path / "study", {"recipe": {}})
    folder.begin()
    wanted = [Descent(1e-4, None, 4, 2), Descent(2e-4, None, 4, 2), Descent(1e-4, 30, 2, 1)]

    def descended(*more, act=lambda words, done: None):
        watch = Watched(act)
        asked = Asked([], RECIPE, pixels, [*wanted, *more])
        with Limits() as limits:
            watch.failed = carry_out.carry_out(asked, folder, limits, watch)
        return watch

    def stop(words, done):
        if words == "descend at rate 0.0002" and done == 2:
            raise Stopped("here")

    with pytest.raises(Stopped):
        descended(act=stop)
    assert [record.run for record in folder.results().descents] == wanted[:1]
    watch = descended()
    assert watch.words == ["descend at rate 0.0002", "descend at rate 0.0001, batches of 30"]
    assert watch.steps[-1][1:3] == (2, 2) and watch.counts == (2, 3)
    watch = descended(Descent(1e30, None, 2, 1))
    words = "cannot descend at rate 1e+30: descent diverged at rate=1e+30 within 1 steps; use a "
    assert watch.failed == [f"{words}smaller rate"]
    assert [r.run for r in folder.results().descents] == [wanted[1], wanted[0], wanted[2]]
    assert descended().words == []


def test_a_run_that_another_process_works_on_is_waited_for(tmp_path, pixels, monkeypatch):
    monkeypatch.setattr(carry_out, "POLL", 0.01)
    folder = Folder(tmp_path / "study", {"recipe": {}})
    folder.begin()
    busy = Run(Network(8), 0, 0.1)
    release, held = threading.Event(), threading.Event()

    def other():
        with folder.hold(busy):
            held.set()
            release.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    held.wait(60)
    watch = Watched()
    begin = watch.begin

    def begun(words, ended, whole):
        begin(words, ended, whole)
        if words == "waiting for other processes":
            release.set()

    watch.begin = begun
    recipe = RECIPE.changed(seeds=1, lrs=(0.1,), epochs=1, checkpoints=(1,))
    run(folder.root, pixels, watch, recipe=recipe)
    thread.join()
    first = watch.words.index("waiting for other processes")
    assert watch.words[0] == "train resnet8-no-bn, seed 0, rate 0.1"
    assert "train resnet8, seed 0, rate 0.1" in watch.words[first:]
    assert not [words for words in watch.words[:first] if "resnet8," in words]


def test_checkpoints_keep_their_order_if_a_run_is_released_meanwhile(
    tmp_path, pixels, starts, monkeypatch
):
    monkeypatch.setattr(carry_out, "POLL", 0.0)
    hold, refused = Folder.hold, []

    @contextlib.contextmanager
    def once(self, run):
        with hold(self, run) as held:
            first = bool(self.trainings()) and not refused
            refused.extend([run] * first)
            yield held and not first

    monkeypatch.setattr(Folder, "hold", once)
    recipe = RECIPE.changed(seeds=1, lrs=(0.1,))
    watch = run(tmp_path / "study", pixels, networks=[Network(8, "no-bn")], recipe=recipe)
    assert "waiting for other processes" in watch.words
    assert [(epoch, start) for (_, epoch, _), start in starts.items()] == [(0, None), (2, 0.0)]


def test_the_time_that_is_left(monkeypatch):
    """Before any task has ended it follows from the steps so far, then from tasks that ended."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    speed, watch = Speed(), Watched()
    watch.begin("", 0, 2)
    one, other = (Task(TRAIN, Run(Network(8), 0, lr), -1, "", 100 * lr, READY) for lr in (0.1, 0.3))
    clock = Clock(one, [one, other], speed, 2, Limits(), watch)
    now = 5.0
    clock(1, 4)  # a quarter of cost 10 in 5 s: 75 s for the rest, shared by two processes
    clock(2, None)  # nothing follows from that
    clock.end()  # cost 10 in 5 s
    clock = Clock(other, [other], speed, 1, Limits(), watch)
    now = 7.0
    clock(31, 60)  # a training that went on after 30 of 60 steps
    now = 20.0
    clock.end()  # cost 15 in 15 s: now 25 in 20 s
    assert [left for *_, left in watch.steps] == [37.5, None, pytest.approx(15.0 * 29 / 60)]
    assert speed.seconds(one) == 8.0


def test_missing_files_name_the_way_out(tmp_path, pixels):
    recipe = RECIPE.changed(seeds=1, lrs=(0.1,), epochs=1, checkpoints=(1,))
    asked = {"networks": [Network(8, "no-bn")], "recipe": recipe}
    root, one = tmp_path / "study", Run(Network(8, "no-bn"), 0, 0.1)
    run(root, pixels, **asked)
    folder = Folder(root, {})
    before = contents(folder)
    surface, measured = folder.part(one, 1, "eval", "-landscape.json"), folder.part(one, 1, "eval")
    weights = folder.run(one) / "epoch-001.safetensors"
    weights.unlink()
    assert run(root, pixels, **asked).words == []  # what is measured needs no weights
    measured.unlink()
    (failure,) = run(root, pixels, **asked).failed
    assert "epoch-001.safetensors is missing; delete training.json and state.saf" in failure
    for name in (training.RECORD, training.STATE):
        (folder.run(one) / name).unlink()
    assert run(root, pixels, **asked).failed == []
    surface.unlink()
    folder.part(one, 1, "eval", VECTORS).unlink()
    (failure,) = run(root, pixels, **asked).failed
    assert "vectors.safetensors is missing, which the landscape needs; delete epoch-001-" in failure
    measured.unlink()
    run(root, pixels, **asked)
    assert contents(folder) == before


def test_an_analysis_that_fails_is_named_and_the_others_are_done(tmp_path, pixels, monkeypatch):
    measure = analysis.measure

    def failing(run, epoch, mode, *rest):
        if (epoch, mode) == (0, "train"):
            raise InputError("the loss is nan")
        return measure(run, epoch, mode, *rest)

    monkeypatch.setattr(analysis, "measure", failing)
    recipe = RECIPE.changed(seeds=1, lrs=(0.1,), epochs=1, checkpoints=(0, 1))
    watch = Watched()
    run(tmp_path / "study", pixels, watch, networks=[Network(8)], recipe=recipe)
    line = "cannot analyse resnet8, seed 0, epoch 0, train statistics: the loss is nan"
    assert watch.said == watch.failed == [line]
    found = Folder(tmp_path / "study", {}).results()
    assert [(row.epoch, row.mode) for row in found.measurements] == [
        (0, "eval"), (1, "eval"), (1, "train"),
    ]  # fmt: skip
    assert len(found.landscapes) == 3
    monkeypatch.setattr(analysis, "measure", measure)
    watch = run(tmp_path / "study", pixels, networks=[Network(8)], recipe=recipe)
    assert len(watch.words) == 2
    assert watch.failed == []
