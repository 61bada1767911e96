"""Carries out the tasks of a study that are not done yet, in as many processes as are started."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from fasthessian.arguments import ProgressCallback
from fasthessian.errors import InputError, Stopped
from fasthessian.operators.torch_state.random_state import seeded
from fasthessian.study import training, weights
from fasthessian.study.data import ImageData
from fasthessian.study.networks import Network
from fasthessian.study.recipes import Recipe
from fasthessian.study.resnet import ResNet
from fasthessian.study.schedule import MEASURE, READY, SKIPPED, TRAIN, Images, Speed, Task, tasks
from fasthessian.study.store import LANDSCAPE, Folder

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")
POLL = 1.0  # seconds between looks at what other processes have done
# A warning of operators under torchrun: here each rank analyses networks of its own.
ALONE = "group is None and no process group is initialised"


class Watch(Protocol):
    """Shows what a study does."""

    def begin(self, words: str, ended: int, whole: int) -> None:
        """A task begins; so many of the whole study have ended."""

    def step(self, done: int, total: int | None, left: float | None) -> None:
        """So much of the task is done; the study takes ``left`` seconds more, if that is known."""

    def say(self, text: str) -> None:
        """One line that stays."""


class Limits:
    """When a study stops early: at a time limit, or after a signal.

    As a context it notes SIGTERM, SIGUSR1 and SIGUSR2.

    Args:
        seconds: from now on; None for no limit.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds
        self._signal = ""
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Limits:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name)
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    @property
    def signalled(self) -> bool:
        """Whether a signal came, after which little time is left."""
        return bool(self._signal)

    def check(self, needed: float = 0.0) -> None:
        """Raise Stopped after a signal, or if fewer than ``needed`` seconds are left."""
        if self._signal:
            raise Stopped(f"stopped by {self._signal}")
        if self._end is not None and time.monotonic() + needed >= self._end:
            raise Stopped(f"stopped by the time limit of {self._seconds:g} s")


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A study that is asked for.

    Attributes:
        networks: to compare.
        recipe: all numbers, with the number of seeds.
        data: training and test images, on the device that does the work.
    """

    networks: Sequence[Network]
    recipe: Recipe
    data: ImageData

    @property
    def images(self) -> Images:
        """How many there are."""
        return Images(len(self.data.train_y), len(self.data.test_y))


def carry_out(asked: Asked, folder: Folder, limits: Limits, watch: Watch, ranks: int = 1) -> None:
    """Do all tasks of a study that are not done, and return when all are done.

    Other processes may do the same in the same folder: each takes the next task whose run nobody
    else works on, and waits for the others at the end. If one dies, the others take its tasks.

    Args:
        asked: networks, recipe and data.
        folder: of the study.
        limits: when to stop early.
        watch: shows what is done.
        ranks: number of processes that share the work, for the time that is left.

    Raises:
        Stopped: a limit was reached. All tasks that ended are saved, and of a training all epochs.
        OSError: a file cannot be written.
    """
    networks, seeds = asked.networks, asked.recipe.seeds

    def planned() -> list[Task]:
        every = tasks(networks, seeds, asked.recipe, asked.images, folder.trainings())
        return [task for task in every if task.kind == TRAIN]  # the analysis follows

    speed = Speed.of(folder.results(), planned())
    made = 0  # tasks that ended here
    while True:
        limits.check()
        plan = planned()
        left = [task for task in plan if task.state != SKIPPED and not done(folder, task)]
        if not left:
            return
        for task in left:
            if task.state != READY:
                continue
            with folder.hold(task.run) as held:
                if not held or done(folder, task):
                    continue
                expected = speed.seconds(task)
                if made and task.kind != TRAIN:  # it can only be saved as a whole
                    limits.check(expected or 0.0)
                watch.begin(task.words, len(plan) - len(left), len(plan))
                later = [each for each in left if each is not task]
                clock = Clock(task, later, speed, ranks, limits, watch)
                do(task, asked, folder, clock)
                clock.end()
                made += 1
                break
        else:
            watch.begin("waiting for other processes", len(plan) - len(left), len(plan))
            time.sleep(POLL)


class Clock:
    """The time that the rest of a study takes, from the part of the running task that is done.

    Called as the progress callback of the task.
    """

    def __init__(
        self, task: Task, later: Sequence[Task], speed: Speed, ranks: int, limits: Limits,
        watch: Watch,
    ) -> None:  # fmt: skip
        self._task, self._later, self._speed = task, later, speed
        self._ranks, self._limits, self._watch = ranks, limits, watch
        self._start = time.monotonic()
        self._first: int | None = None  # done at the first call: a training may go on

    def __call__(self, done: int, total: int | None) -> None:
        """So much of the task is done."""
        self._limits.check()
        self._watch.step(done, total, None if total is None else self._left(done, total))

    def _left(self, done: int, total: int) -> float | None:
        if self._first is None:
            self._first = done
        elapsed = time.monotonic() - self._start
        seconds = [self._speed.seconds(each) for each in (self._task, *self._later)]
        known = [each for each in seconds if each is not None]
        if len(known) < len(seconds):  # nothing has ended yet: as fast as this task so far
            if done <= self._first:
                return None
            speed = Speed()
            share = (done - self._first) / total
            speed.add(self._task.kind, self._task.cost * share, elapsed)
            known = [speed.seconds(each) or 0.0 for each in (self._task, *self._later)]
        return (known[0] * (1 - min(done / total, 1)) + sum(known[1:])) / self._ranks

    def end(self) -> None:
        """The task has ended."""
        if not self._first:  # it was done here from its beginning
            took = time.monotonic() - self._start
            self._speed.add(self._task.kind, self._task.cost, took)


def done(folder: Folder, task: Task) -> bool:
    """Whether the result of a task is in the folder."""
    return result(folder, task).exists()


def result(folder: Folder, task: Task) -> Path:
    """The file with which a task ends."""
    if task.kind == TRAIN:
        return folder.run(task.run) / training.RECORD
    kind = ".json" if task.kind == MEASURE else LANDSCAPE
    return folder.part(task.run, task.epoch, task.mode, kind)


def do(task: Task, asked: Asked, folder: Folder, progress: ProgressCallback) -> None:
    """Carry out one task and save its result."""
    run = task.run
    recipe, data = asked.recipe, asked.data
    if task.kind == TRAIN:
        training.train_run(run, recipe, data, folder.run(run), progress)
        return


def load(folder: Folder, task: Task, asked: Asked) -> ResNet:
    """The network of a checkpoint, on the device of the data."""
    path = folder.run(task.run) / f"epoch-{task.epoch:03d}.safetensors"
    if not path.exists():
        raise InputError(
            f"{path} is missing; delete training.json there, and the run is trained again"
        )
    with seeded(0):  # the weights that are drawn are replaced
        model = task.run.network.make(asked.data.classes, asked.recipe.width)
    weights.load(path, model)
    return model.to(asked.data.train_x.device)
