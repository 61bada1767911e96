"""When the state of a call is saved, and when the call stops: one decision before each product."""

from __future__ import annotations

import collections
import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch

from fasthessian.checkpoints.call import CALL, INPUTS, Saved
from fasthessian.checkpoints.folder import Folder
from fasthessian.checkpoints.records import Items, packed_warnings, unpacked_warnings
from fasthessian.checkpoints.state import State
from fasthessian.checkpoints.states import Counted, States
from fasthessian.distributed.failures import known_to_all
from fasthessian.distributed.slices import Slice
from fasthessian.errors import InputError, Stopped

INTERVAL = 60.0  # seconds between two saves
SHARE = 0.02  # of the time may go into saving
RECENT = 8  # steps whose times tell how long the next one takes
MARGIN = 1.5  # times the last save: a basis grows
ENDED = "ended"  # the state of a run that has ended: its record and its warnings
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")


class Saving(NamedTuple):
    """What a call with a checkpoint has besides its runs."""

    folder: Folder
    body: Mapping[str, Any]  # of the index: the call and its operators
    inputs: Items
    saved: Saved | None  # the interrupted call that goes on
    limit: float | None  # seconds
    started: float  # on the clock of ``time.monotonic``
    device: torch.device
    part: Slice | None  # of each row, that this rank holds; None for whole rows
    sliced: bool  # whether records hold that part of their vectors


class Keeper:
    """Saves the state of a call, as a context in which its runs are made.

    Inside the context SIGTERM, SIGUSR1 and SIGUSR2 ask the call to save and stop. Without
    ``saving`` nothing is saved and no handler is installed.

    Args:
        counters: by name of the run: what counts its products.
        saving: where and when to save.
        unit: what is counted, in words.

    Attributes:
        runs: the states of each run.
        ended: record and warnings of the runs that have ended.
    """

    def __init__(
        self, counters: Mapping[str, Counted], saving: Saving | None, unit: str = "products"
    ) -> None:
        self._saving, self._unit = saving, unit
        self.runs: dict[str, States] = {}
        self.ended: dict[str, tuple[Any, list[Warning]]] = {}
        self._ends: dict[str, Items] = {}
        saved = saving.saved if saving is not None else None
        for name, counter in counters.items():
            if saving is None or saved is None:
                self.runs[name] = States(counter)
                continue
            parts = saved.folder.parts(f"run/{name}", saving.part)
            if ENDED in parts:
                ended = Items({}, saving.device, saving.part)
                ended.restore(*parts.pop(ENDED))
                self._keep_end(name, ended)
            self.runs[name] = States(counter, parts, saved.index["made"][name])
        self._signal = ""
        self._handlers: dict[int, Any] = {}
        self._boundaries = 0
        self._rates: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._asked, self._last = 0, 0.0  # products since the last decision, and its end
        self._saved_at = None if saved is None else time.monotonic()
        self._took = 0.0  # the last save, in seconds

    def __enter__(self) -> Keeper:
        if self._saving is not None and threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not None:
                    self._handlers[number] = signal.signal(number, self._note_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        if self._saving is not None and self._saved_at is None:
            self._saving.folder.abandon()

    def boundary(self, products: int) -> None:
        """Before a step of so many products: save if it is due; save and stop if it is time.

        Raises:
            Stopped: the limit of time or a signal ended the call, which is saved.
            ValueError: the limit is too short for one product.
        """
        saving = self._saving
        if saving is None:
            return
        deferred = saving.device.type == "cuda"  # the host runs ahead of the device
        every = 8 if deferred else 1
        self._boundaries += 1
        if (self._boundaries - 1) % every:
            self._asked += products
            return
        if deferred and saving.limit is not None:
            torch.cuda.synchronize(saving.device)
        now = time.monotonic()
        if self._asked:
            self._rates.append((now - self._last) / self._asked)
        due, stop, late, short = saving.folder.ranks.any(
            [self._due(now), bool(self._signal), *self._out_of_time(now, products * every)]
        )
        if due or stop or late or (short and self._rates):
            self._save()
        if short:
            self._refuse_limit()
        if stop or late:
            self._stop(self._signal or ("another rank" if stop else f"time_limit={saving.limit:g}"))
        self._asked, self._last = products, time.monotonic()

    def end(self, name: str, record: Any, shortfalls: list[Warning]) -> None:
        """A run has ended: its record is saved instead of its states."""
        if self._saving is None:
            self.ended[name] = record, shortfalls
            return
        items = {"record": record, "warnings": packed_warnings(shortfalls)}
        sliced = self._saving.part if self._saving.sliced else None
        self._keep_end(name, Items(items, self._saving.device, sliced))

    def finish(self) -> None:
        """All runs have ended: save their records; stop if a signal came meanwhile."""
        saving = self._saving
        if saving is None or (saving.saved is not None and saving.saved.index["finished"]):
            return
        (stop,) = saving.folder.ranks.any([bool(self._signal)])
        self._save()
        if stop:
            self._stop(self._signal or "another rank")

    def _keep_end(self, name: str, ended: Items) -> None:
        items = ended.items
        self.ended[name] = items["record"], unpacked_warnings(items["warnings"])
        self._ends[name] = ended

    @property
    def _made(self) -> int:
        return sum(states.made for states in self.runs.values())

    def _due(self, now: float) -> bool:
        if self._saved_at is None:  # the first one shows that the folder can be written
            return True
        phase = any(states.ended_phase for states in self.runs.values())
        least = self._took / SHARE
        return now - self._saved_at >= (least if phase else max(INTERVAL, least))

    def _out_of_time(self, now: float, products: int) -> tuple[bool, bool]:
        """Whether so many products and a save may take too long; whether one product does."""
        saving = self._saving
        assert saving is not None
        if saving.limit is None:
            return False, False
        elapsed = now - saving.started
        if not self._rates:  # the first product of this call
            known = 0.0 if saving.saved is None else saving.saved.index["seconds"]
            return False, known > saving.limit
        expected = max(self._rates) * products + MARGIN * self._took
        return elapsed + expected > saving.limit, len(self._rates) == 1 and elapsed > saving.limit

    def _save(self) -> None:
        saving = self._saving
        assert saving is not None
        begun = time.monotonic()
        states: dict[tuple[str, str], State] = {(CALL, INPUTS): saving.inputs}
        for name, run in self.runs.items():
            parts = {ENDED: self._ends[name]} if name in self._ends else dict(run.items())
            states |= {(f"run/{name}", part): state for part, state in parts.items()}
            run.ended_phase = False
        body = {
            **saving.body,
            "made": {name: run.made for name, run in self.runs.items()},
            "seconds": max(self._rates, default=0.0),  # per product
            "finished": len(self._ends) == len(self.runs),
        }
        saving.folder.write(body, states, saving.part)
        self._saved_at = time.monotonic()
        self._took = self._saved_at - begun

    def _stop(self, reason: str) -> None:
        assert self._saving is not None
        folder = self._saving.folder
        path = str(folder.path)
        stopped = Stopped(
            f"stopped by {reason} after {self._made} {self._unit}, saved in {path}; go on with "
            f"fh.resume({path!r}, A)"
        )
        if folder.ranks.rank == 0:
            print(stopped, file=sys.stderr)
        raise known_to_all(stopped)

    def _refuse_limit(self) -> None:
        saving = self._saving
        assert saving is not None and saving.limit is not None
        seconds = max(self._rates, default=0.0)
        if not self._rates and saving.saved is not None:
            seconds = saving.saved.index["seconds"]
        path = str(saving.folder.path)
        refusal = InputError(
            f"time_limit={saving.limit:g} is too short: one of the {self._unit} took {seconds:.2g} "
            f"s; {self._made} are saved in {path}: go on with fh.resume({path!r}, A, "
            f"time_limit=...)"
        )
        raise known_to_all(refusal)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
