"""The folder of a study: what is done, what was found, and which process works on what."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from fasthessian.errors import InputError
from fasthessian.results.fields import parse
from fasthessian.results.record import Record, write_whole
from fasthessian.results.records import Landscape
from fasthessian.study import weights
from fasthessian.study.descents import Descent
from fasthessian.study.networks import VARIANTS, Network, Run
from fasthessian.study.records import Measurement, Stability, Study, Training

SETTINGS = "study.json"
RUN = re.compile(r"resnet(\d+)(?:-(.+))?-seed(\d+)-lr(.+)")
PART = re.compile(r"epoch-(\d+)-(eval|train)(-landscape)?\.json")
VECTORS, LANDSCAPE = "-vectors.safetensors", "-landscape.json"
DESCENT = "stability.json"
# Settings that must agree for results to stand in one study; the others say where it was begun.
COMPARED = ("version", "data", "recipe")

R = TypeVar("R", bound=Record)


class Folder:
    """The folder of a study. Files in it appear whole or not at all.

    Args:
        out: a new folder, an empty one, or one that holds this study already.
        settings: plain JSON. Those of the entries "version", "data" and "recipe" that are given
            must be those of the study that the folder holds.

    Attributes:
        root: its path.
        settings: those that the folder holds if there are any, or those that were given.

    Raises:
        ValueError: the folder holds another study, or something else.
        OSError: ``out`` is a file.

    Example:
        >>> import tempfile
        >>> from fasthessian.study.store import Folder
        >>> with tempfile.TemporaryDirectory() as out:
        ...     Folder(out, {"version": "1", "data": {}, "recipe": {"epochs": 20}}).begin()
        ...     Folder(out, {"version": "1", "data": {}, "recipe": {"epochs": 30}})
        Traceback (most recent call last):
        fasthessian.errors.InputError: out: ... epochs is 20 there and 30 now; ...
    """

    def __init__(self, out: str | os.PathLike[str], settings: Mapping[str, Any]):
        self.root = Path(out)
        given = json.loads(json.dumps(dict(settings)))
        held = self._held()
        self.settings: dict[str, Any] = given if held is None else held
        if held is not None:
            self._compare(held, given)

    def begin(self) -> None:
        """Make the folder of a new study, and write its settings before anything else."""
        self.root.mkdir(parents=True, exist_ok=True)
        if not (self.root / SETTINGS).exists():
            payload = json.dumps(self.settings, indent=1).encode()
            write_whole(self.root / SETTINGS, payload, overwrite=True)

    def run(self, run: Run | Descent) -> Path:
        """The folder of a run or a descent."""
        return self.root / "runs" / run.name

    def part(self, run: Run, epoch: int, mode: str, kind: str = ".json") -> Path:
        """A file of a checkpoint in one mode: ".json", "-vectors.safetensors", "-landscape.json".

        Example:
            >>> import tempfile
            >>> from fasthessian.study.networks import Network, Run
            >>> with tempfile.TemporaryDirectory() as out:
            ...     folder = Folder(out, {"version": "1"})
            ...     folder.part(Run(Network(20), 0, 0.1), 5, "eval").name
            'epoch-005-eval.json'
        """
        return self.run(run) / f"epoch-{epoch:03d}-{mode}{kind}"

    @contextlib.contextmanager
    def hold(self, run: Run | Descent) -> Iterator[bool]:
        """Inside, no other process works on the run; False if another one does so already.

        The operating system releases the run of a process that died.
        """
        self.run(run).mkdir(parents=True, exist_ok=True)
        with open(self.run(run) / "lock", "a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def save(self, path: Path, record: Record) -> None:
        """Write a record as JSON."""
        payload = json.dumps(record.to_json(), indent=1, allow_nan=False).encode()
        write_whole(path, payload, overwrite=True)

    def save_vectors(self, run: Run, epoch: int, mode: str, vectors: Tensor) -> None:
        """Write eigenvectors (k, n)."""
        weights.write(self.part(run, epoch, mode, VECTORS), {"vectors": vectors}, {})

    def vectors(self, run: Run, epoch: int, mode: str) -> Tensor | None:
        """The eigenvectors (k, n) of a checkpoint, on the CPU, or None if there is no such file.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.part(run, epoch, mode, VECTORS)
        return weights.read(path)[0]["vectors"] if path.exists() else None

    def trainings(self) -> dict[Run, Training]:
        """The trainings that ended."""
        found = {}
        for run in self._runs():
            path = self.run(run) / "training.json"
            if path.exists():
                found[run] = self._read(path, Training, run)
        return found

    def results(self) -> Study:
        """All that the folder holds; parts that are missing are left out.

        Raises:
            ValueError: a file is damaged.
        """
        measured, landscapes = [], {}
        for run in self._runs():
            for path in sorted(self.run(run).iterdir()):
                name = PART.fullmatch(path.name)
                if name is None:
                    continue
                if name[3]:
                    landscapes[run, int(name[1]), name[2]] = self._read(path, Landscape, run)
                else:
                    measured.append(self._read(path, Measurement, run))
        descents = [
            self._read(path, Stability)
            for path in (self.root / "runs").glob(f"descent-*/{DESCENT}")
        ]
        descents.sort(key=lambda each: (each.run.batch is not None, -each.rate))
        trainings = tuple(self.trainings().values())
        return Study(self.settings, trainings, tuple(measured), landscapes, tuple(descents))

    def _runs(self) -> list[Run]:
        """The runs that have a folder, by depth, variant, seed and rate."""
        order = list(VARIANTS)
        found = []
        for path in (self.root / "runs").glob("*"):
            name = RUN.fullmatch(path.name)
            if name is not None:
                try:
                    network = Network(int(name[1]), name[2] or order[0])
                    run = Run(network, int(name[3]), float(name[4]))
                except ValueError:
                    continue  # a folder of the user's
                if run.name == path.name:
                    found.append(run)
        return sorted(
            found, key=lambda r: (r.network.depth, order.index(r.network.variant), r.seed, r.lr)
        )

    def _read(self, path: Path, kind: type[R], run: Run | None = None) -> R:
        try:
            record = kind.from_json(parse(path.read_text()))
        except ValueError as error:
            raise damaged(path, error) from error
        if run is not None and getattr(record, "run", run) != run:
            raise InputError(f"{path} belongs to another run; delete it, and go on")
        return record

    def _held(self) -> dict[str, Any] | None:
        """The settings that the folder holds; None if it is new or empty."""
        path = self.root / SETTINGS
        if not path.exists():
            if not self.root.exists():
                return None
            left = [name for name in os.listdir(self.root) if not name.startswith(f".{SETTINGS}.")]
            if left:
                raise InputError(
                    f"out: {self.root} is not empty and holds no study, but {min(left)}; choose "
                    f"another folder"
                )
            return None
        try:
            held = parse(path.read_text())
            if not isinstance(held, dict) or not isinstance(held.get("recipe"), dict):
                raise InputError("it is not an object with the settings of a study")
        except ValueError as error:
            raise InputError(f"out: {path} is damaged ({error}); choose another folder") from error
        return held

    def _compare(self, held: dict[str, Any], given: dict[str, Any]) -> None:
        before, now = (
            {key: flat.get(key) for key in COMPARED if key in given} for flat in (held, given)
        )
        differing = list(differences("", before, now))
        if differing:
            raise InputError(
                f"out: {self.root} holds a study with other settings: {', '.join(differing)}; "
                f"choose another folder, or give the settings of that study"
            )


def differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """Each setting that differs, with both values.

    Example:
        >>> list(differences("", {"epochs": 20, "top": 5}, {"epochs": 30, "top": 5}))
        ['epochs is 20 there and 30 now']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from differences(key, before.get(key), now.get(key))
    elif before != now:
        yield f"{name} is {json.dumps(before)} there and {json.dumps(now)} now"


def damaged(path: Path, error: Exception) -> InputError:
    """The error for a file of a study that cannot be read."""
    words = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{path} is damaged ({words:.200}); delete it, and it is made again")
