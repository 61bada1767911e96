"""Carries out the tasks of a study that are not done yet, in as many processes as are started."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from fasthessian.arguments import ProgressCallback
from fasthessian.errors import InputError, Refusal, Stopped
from fasthessian.operators.torch_state.random_state import seeded
from fasthessian.study import analysis, stability, training, weights
from fasthessian.study.data import ImageData
from fasthessian.study.descents import Descent
from fasthessian.study.networks import Network, Run
from fasthessian.study.recipes import Recipe
from fasthessian.study.resnet import ResNet
from fasthessian.study.schedule import (
    DESCEND,
    MEASURE,
    READY,
    SKIPPED,
    SURFACE,
    TRAIN,
    Images,
    Speed,
    Task,
    tasks,
)  # fmt: skip
from fasthessian.study.store import DESCENT, LANDSCAPE, VECTORS, Folder

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")
POLL = 1.0  # seconds between looks at what other processes have done
# A warning of operators under torchrun: here each rank analyses networks of its own.
ALONE = "group is None and no process group is initialised"
FILES = {TRAIN: training.RECORD, DESCEND: DESCENT}  # with which they end


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
        self._seconds = seconds or 0.0
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

    def check(self, task: str = "", needed: float = 0.0) -> None:
        """Raise Stopped after a signal, or if less time is left than a task is expected to need.

        Raises:
            ValueError: the whole limit is shorter than that.
        """
        if self._signal:
            raise Stopped(f"stopped by {self._signal}")
        if self._end is None or time.monotonic() + needed < self._end:
            return
        before = f" before: {task}, which takes about {needed:.0f} s" if needed else ""
        if needed > self._seconds:
            raise InputError(
                f"time_limit={self._seconds:g} s is too short{before} and is saved as a whole; "
                f"give {1.5 * needed:.0f} s or more"
            )
        raise Stopped(f"stopped by the time limit of {self._seconds:g} s{before}")


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A study that is asked for.

    Attributes:
        networks: to compare.
        recipe: all numbers, with the number of seeds.
        data: training and test images, on the device that does the work.
        descents: of the edge of stability.
    """

    networks: Sequence[Network]
    recipe: Recipe
    data: ImageData
    descents: Sequence[Descent] = ()

    @property
    def images(self) -> Images:
        """How many there are."""
        return Images(len(self.data.train_y), len(self.data.test_y))


def carry_out(
    asked: Asked, folder: Folder, limits: Limits, watch: Watch, ranks: int = 1
) -> list[str]:
    """Do all tasks of a study that are not done, and return when all are done.

    Other processes may do the same in the same folder: each takes the next task whose run nobody
    else works on, and waits for the others at the end. If one dies, the others take its tasks.

    Args:
        asked: networks, recipe and data.
        folder: of the study.
        limits: when to stop early.
        watch: shows what is done.
        ranks: number of processes that share the work, for the time that is left.

    Returns:
        What could not be analysed, and why, in one line each; all other tasks are done.

    Raises:
        Stopped: a limit was reached. All tasks that ended are saved, and of a training all epochs.
        OSError: a file cannot be written.
        ValueError: the folder of a run holds a damaged file, or another training.
    """
    networks, seeds = asked.networks, asked.recipe.seeds

    def planned() -> list[Task]:
        done = folder.trainings()
        return tasks(networks, seeds, asked.recipe, asked.images, done, asked.descents)

    speed = Speed.of(folder.results(), planned())
    failed: dict[tuple[Any, ...], str] = {}  # by place of a measurement or a landscape

    def is_left(task: Task) -> bool:
        lost = task.place in failed or (
            task.kind == SURFACE and (MEASURE, *task.place[1:]) in failed
        )
        return task.state != SKIPPED and not lost and not is_done(folder, task)

    while True:
        limits.check()
        plan = planned()
        left = [task for task in plan if is_left(task)]
        if not left:
            return list(failed.values())
        ended, busy = len(plan) - len(left), set()
        for task in left:
            if task.state != READY or task.run in busy:
                continue
            with folder.hold(task.run) as held:
                if not held:
                    busy.add(task.run)  # also if it is released now: its tasks have an order
                    continue
                if is_done(folder, task):
                    continue
                if task.kind != TRAIN:
                    limits.check(task.words, speed.seconds(task) or 0.0)
                watch.begin(task.words, ended, len(plan))
                clock = Clock(task, left, speed, ranks, limits, watch)
                try:
                    do(task, asked, folder, clock)
                except Refusal as error:
                    if task.kind == TRAIN:
                        raise
                    failed[task.place] = f"cannot {task.words}: {error}"
                    watch.say(failed[task.place])
                else:
                    clock.end()
                break
        else:
            watch.begin("waiting for other processes", ended, len(plan))
            time.sleep(POLL)


class Clock:
    """The time that the rest of a study takes, from the part of the running task that is done.

    Called as the progress callback of the task.
    """

    def __init__(
        self, task: Task, left: Sequence[Task], speed: Speed, ranks: int, limits: Limits,
        watch: Watch,
    ) -> None:  # fmt: skip
        self._task, self._speed, self._ranks = task, speed, ranks
        self._limits, self._watch = limits, watch
        self._known = speed.seconds(task) is not None
        self._cost = sum(each.cost for each in left)
        self._seconds = sum(speed.seconds(each) or 0.0 for each in left)
        self._start = time.monotonic()
        self._before: float | None = None  # part of the task that an earlier call has done

    def __call__(self, done: int, total: int | None) -> None:
        """So much of the task is done."""
        self._limits.check()
        part = done / total if total else 0.0
        if self._before is None:
            before = (done - 1) / total if total else 0.0
            self._before = before if self._task.kind == TRAIN else 0.0
        self._watch.step(done, total, self._left(min(part, 1.0)))

    def _left(self, part: float) -> float | None:
        here = part - (self._before or 0.0)
        if self._known:
            seconds = self._seconds - part * (self._speed.seconds(self._task) or 0.0)
        elif here > 0:  # nothing has ended yet: as fast as this task so far
            each = (time.monotonic() - self._start) / (here * self._task.cost)
            seconds = each * (self._cost - part * self._task.cost)
        else:
            return None
        return seconds / self._ranks

    def end(self) -> None:
        """The task has ended."""
        made = (1 - (self._before or 0.0)) * self._task.cost
        if made > 0:
            self._speed.add(self._task.kind, made, time.monotonic() - self._start)


def is_done(folder: Folder, task: Task) -> bool:
    """Whether the result of a task is in the folder."""
    return result(folder, task).exists()


def result(folder: Folder, task: Task) -> Path:
    """The file with which a task ends."""
    if task.kind in FILES:
        return folder.run(task.run) / FILES[task.kind]
    assert isinstance(task.run, Run)
    kind = ".json" if task.kind == MEASURE else LANDSCAPE
    return folder.part(task.run, task.epoch, task.mode, kind)


def do(task: Task, asked: Asked, folder: Folder, progress: ProgressCallback) -> None:
    """Carry out one task and save its result."""
    run, epoch, mode = task.run, task.epoch, task.mode
    recipe, data = asked.recipe, asked.data
    if isinstance(run, Descent):
        folder.save(result(folder, task), stability.follow(run, data, progress))
        return
    if task.kind == TRAIN:
        training.train_run(run, recipe, data, folder.run(run), progress)
        return
    model = load(folder, run, epoch, asked)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ALONE)
        if task.kind == MEASURE:
            earlier = [each for each in recipe.checkpoints if each < epoch]
            start = folder.vectors(run, earlier[-1], mode) if earlier else None
            found, vectors = analysis.measure(
                run, epoch, mode, model, data, recipe, start, progress
            )
            folder.save_vectors(run, epoch, mode, vectors)  # first: the record says that both exist
            folder.save(result(folder, task), found)
            return
        axes = folder.vectors(run, epoch, mode)
        if axes is None:
            measured = folder.part(run, epoch, mode)
            raise InputError(
                f"{folder.part(run, epoch, mode, VECTORS)} is missing, which the landscape needs; "
                f"delete {measured.name} beside it, and both are made again"
            )
        surface = analysis.surface(model, mode, data, recipe, axes, progress)
        folder.save(result(folder, task), surface)


def load(folder: Folder, run: Run, epoch: int, asked: Asked) -> ResNet:
    """The network of a checkpoint, on the device of the data."""
    path = folder.run(run) / f"epoch-{epoch:03d}.safetensors"
    if not path.exists():
        raise InputError(
            f"{path} is missing; delete {training.RECORD} and {training.STATE} beside it, and the "
            f"run is trained again"
        )
    with seeded(0):  # the weights that are drawn are replaced
        model = run.network.make(asked.data.classes, asked.recipe.width)
    weights.load(path, model)
    return model.to(asked.data.train_x.device)
