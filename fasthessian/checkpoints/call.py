"""The call of an algorithm: what of it a checkpoint holds, and how a saved one is continued."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fasthessian.arguments import positive
from fasthessian.checkpoints.folder import Folder
from fasthessian.checkpoints.records import Items
from fasthessian.checkpoints.shards import required
from fasthessian.distributed.ranks import Ranks
from fasthessian.errors import InputError, InputTypeError

CALL = "call"  # among the runs of an index: the state that belongs to all of them
INPUTS = "inputs"
NOT_SAVED = ("A", "progress", "checkpoint", "time_limit")


class Call(NamedTuple):
    """A call of an algorithm.

    ``checkpoint`` is a path, or the ``Saved`` call that `resume` continues, or None.
    """

    algorithm: str
    single: bool  # of one operator, not of a dictionary
    arguments: Mapping[str, Any]
    inputs: Mapping[str, Any]  # arguments that hold tensors
    checkpoint: Any
    time_limit: Any

    @classmethod
    def of(cls, algorithm: str, given: Mapping[str, Any], inputs: Sequence[str] = ()) -> Call:
        """The call of an algorithm with all of its arguments by name; ``inputs`` hold tensors."""
        kept = {name: x for name, x in given.items() if name not in (*NOT_SAVED, *inputs)}
        tensors = {name: given[name] for name in inputs if given[name] is not None}
        single = not isinstance(given["A"], Mapping)
        return cls(algorithm, single, kept, tensors, given["checkpoint"], given["time_limit"])

    @property
    def resumed(self) -> bool:
        """Whether this call continues another one."""
        return isinstance(self.checkpoint, Saved)

    def checked(self) -> tuple[Path, float | None] | None:
        """The path of the checkpoint and the limit of time; None for a call without checkpoint.

        Raises:
            ValueError, TypeError: one of them is not accepted.
            ImportError: safetensors is missing.
        """
        if self.checkpoint is None:
            if self.time_limit is not None:
                raise InputError(
                    f"time_limit must come with checkpoint, the folder in which the run is saved, "
                    f"got time_limit={self.time_limit!r} alone; pass checkpoint='run.fh'"
                )
            return None
        path = self.checkpoint
        if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
            raise InputTypeError(
                f"checkpoint must be the path of a folder, got {type(path).__name__}"
            )
        required()
        limit = None if self.time_limit is None else positive("time_limit", self.time_limit)
        return Path(path), limit

    def words(self) -> dict[str, str]:
        """The algorithm and its arguments in words, which must be the same on all ranks."""
        arguments = {f"{k} of {self.algorithm}": repr(x) for k, x in self.arguments.items()}
        return {"algorithm": self.algorithm, **arguments}

    def saved(self) -> dict[str, Any]:
        """What the index of a checkpoint holds of the call."""
        arguments = {name: _plain(x) for name, x in self.arguments.items()}
        return {"algorithm": self.algorithm, "single": self.single, "arguments": arguments}


class Saved(os.PathLike[str]):
    """A call whose checkpoint was read; passed as ``checkpoint`` it is continued.

    Args:
        path: the folder.
        ranks: that read it.
        device: of the operator.

    Attributes:
        folder, index: where it was read, and the index.
        algorithm, arguments: of the call.
        started: when the reading began, on the clock of ``time.monotonic``.
    """

    def __init__(self, path: str | os.PathLike[str], ranks: Ranks, device: torch.device) -> None:
        self.started = time.monotonic()
        self._path = os.fspath(path)
        self.folder = Folder(Path(path), ranks)
        self.index = self.folder.read()
        inputs = Items({}, device)
        for part in self.folder.parts(CALL).values():
            inputs.restore(*part)
        self.algorithm: str = self.index["call"]["algorithm"]
        self.arguments: dict[str, Any] = self.index["call"]["arguments"] | inputs.items

    @property
    def single(self) -> bool:
        """Whether the call was of one operator, not of a dictionary."""
        return bool(self.index["call"]["single"])

    def __fspath__(self) -> str:
        return self._path


def differing_argument(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first argument in which two calls of an algorithm differ, in words; "" if none."""
    for name in sorted({*saved, *now}):
        if saved.get(name) != now.get(name):
            return f"{name}={saved.get(name)!r:.60}, not {now.get(name)!r:.60}"
    return ""


def _plain(value: Any) -> Any:
    """An accepted argument as JSON has it."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return int(value) if hasattr(value, "__index__") else float(value)
