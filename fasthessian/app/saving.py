"""The checkpoints of ``analyze``: a folder per run of an algorithm, in the folder of the user."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasthessian.algorithms.resume import resume
from fasthessian.checkpoints.call import Saved
from fasthessian.distributed.ranks import ALONE, Ranks
from fasthessian.errors import InputError
from fasthessian.operators.base import SymmetricOperator

LEAST = 1e-3  # seconds; a run whose time is over makes one product, saves and stops


class Saving:
    """Where the runs of an analysis are saved, and when they stop.

    Args:
        checkpoint: a new folder; None if nothing is saved.
        resumed: the folder of an analysis that was stopped; its runs go on.
        time_limit: seconds from ``begin`` on, the training included.
        begin: on the clock of ``time.perf_counter``.

    Raises:
        ValueError: the arguments do not go together, or a folder is missing or exists already.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        resumed: str | None = None,
        time_limit: float | None = None,
        begin: float = 0.0,
    ) -> None:
        if checkpoint is not None and resumed is not None:
            raise InputError("--checkpoint begins an analysis and --resume goes on; give one")
        if time_limit is not None and checkpoint is None and resumed is None:
            raise InputError("--time-limit needs a folder to save to; give --checkpoint DIR")
        if time_limit is not None and not time_limit > 0:
            raise InputError(f"--time-limit must be a positive number, got {time_limit}")
        given = checkpoint if resumed is None else resumed
        self.folder = None if given is None else Path(given)
        self._end = None if time_limit is None else begin + time_limit
        if checkpoint is not None and Path(checkpoint).exists():
            raise InputError(f"--checkpoint {checkpoint} exists; go on with --resume {checkpoint}")
        if resumed is not None and not Path(resumed).is_dir():
            raise InputError(f"--resume {resumed} is no folder; begin with --checkpoint {resumed}")

    def make(self, ranks: Ranks = ALONE) -> None:
        """Make the folder of a new analysis."""
        if self.folder is not None:
            ranks.together(lambda: Path(str(self.folder)).mkdir(parents=True, exist_ok=True))

    def run(
        self, name: str, algorithm: Callable[..., Any], A: SymmetricOperator, *args: Any,
        progress: Any, **keywords: Any,
    ) -> Any:  # fmt: skip
        """The result of an algorithm, saved as ``name``; it goes on if it was saved before.

        Raises:
            ValueError: it was begun with other keywords.
            Stopped: its time was over, or a signal came.
        """
        if self.folder is None:
            return algorithm(A, *args, progress=progress, **keywords)
        path, ranks = self.folder / name, A._matrix._ranks
        left = None if self._end is None else max(self._end - time.perf_counter(), LEAST)
        limits: dict[str, Any] = {"time_limit": left, "progress": progress}
        if any(ranks.any([path.is_dir()])):  # all have looked before the first one makes it
            self._compare(Saved(path, ranks, A.device).arguments, keywords)
            made = A.matvecs
            result = resume(path, A, **limits)
            A.matvecs = made + getattr(result, "matvecs", 0)  # as if it had not been interrupted
            return result
        return algorithm(A, *args, checkpoint=path, **limits, **keywords)

    def _compare(self, saved: dict[str, Any], now: dict[str, Any]) -> None:
        for name, value in now.items():
            wanted = list(value) if isinstance(value, tuple) else value
            if saved.get(name) != wanted:
                raise InputError(
                    f"--resume {self.folder} was begun with {name}={saved.get(name)!r}, now it is "
                    f"{wanted!r}; give the options of the first call"
                )
