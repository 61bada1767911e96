"""Collectives that end on every rank if one rank fails, with one line that says which and why.

The collectives of the package use a duplicate of the user's process group, so that their time
limits and what is left of a failed collective do not concern the user's own group. A rank that
waits looks into the store of the group twice a second. Measured with gloo: a neighbour of a dead
rank gets an error within 0.02 s, but the other ranks wait for their neighbours until a timeout;
``abort`` and ``shutdown`` of a group do not close its connections.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from fasthessian.distributed.processes import has_ended, settle_at_exit, this_process
from fasthessian.errors import Refusal, UnsupportedError

E = TypeVar("E", bound=BaseException)
LOOK = 0.5  # seconds between two looks for failures while a collective is waited for
GRACE = 1.0  # seconds in which the ranks that are left tell each other that they are
HELD = 1 << 24  # bytes of the tensors of the last collective that are kept
STAY = 0.6  # seconds that the rank which holds the store stays after a failure, for the others
CLOSED, LATE = "closed", "late"  # how a rank noticed: an error, or its own time limit
MARK = "known_to_all_ranks"  # attribute of an exception that every rank raises
# how many duplicates were made of the groups of one name and with the same ranks: a new process
# group may have the names, and the store, of one that was destroyed
_made: Counter[tuple[str, tuple[int, ...]]] = Counter()


class Connection:
    """The duplicate of a process group, and how its ranks tell each other about failures.

    Keys of the store, for each duplicate: ``here/r``, the process of rank r; ``stopped``, set by
    any rank that does not go on; ``mark/r``, how rank r noticed, and ``marks``, how many did;
    ``verdict``, the line that all ranks raise.

    Args:
        group: the user's process group.
        start_timeout: seconds until a rank counts as hung, when ranks agree before a run.
        timeout: the same for sums.
    """

    def __init__(self, group: Any, start_timeout: float, timeout: float) -> None:
        self._user = weakref.ref(group)  # a group that the user destroys is not kept alive
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._start, self._timeout = start_timeout, timeout
        self._store = c10d._get_process_group_store(group)
        self._ranks = dist.get_process_group_ranks(group)
        self._backend = c10d._world.pg_map[group][0]
        # only these have connections that can fail; tests have ranks in threads, and fake ones
        self._duplicates = "gloo" in self._backend or "nccl" in self._backend
        self._group: Any = None  # the duplicate
        self._held, self._prefix = list[Tensor](), ""
        self._begun = False  # whether a sum was made, which ends the start

    def call(self, collective: Callable[..., Any], *tensors: Tensor, start: bool = False) -> None:
        """Call a collective. Every rank must make the same calls in the same order.

        Raises:
            RuntimeError: a rank failed, died or did not answer in time; or the user destroyed the
                process group.
        """
        limit = self._start if start or not self._begun else self._timeout
        group = self._opened()
        if not self._duplicates or tensors[0].device.type != "cpu":
            try:
                collective(*tensors, group=group)
            except RuntimeError as error:
                words = _first_line(error)
            else:
                self._begun = self._begun or not start
                return
            raise self._failure(CLOSED, words, limit)
        # gloo's threads let go of tensors after the wait, possibly while Python frees them (PyTorch
        # #75529): they get tensors that nobody else uses, which live until the next collective
        held = [tensor.detach() for tensor in tensors]
        try:
            work = collective(*held, group=group, async_op=True)
            found = self._waited(work, limit)
        except BaseException as error:  # an interrupt
            self.leave(error)
            raise
        if found is not None:
            if not work.is_completed():
                _keep_forever(group)
            raise self._failure(*found, limit)
        self._held = held if sum(tensor.nbytes for tensor in held) <= HELD else []
        self._begun = self._begun or not start

    def _waited(self, work: Any, limit: float) -> tuple[str, str] | None:
        """Wait for a collective; how it failed: ("closed" or "late", torch's words), or None."""
        end = time.monotonic() + limit
        while True:
            begun = time.monotonic()
            left = end - begun
            look = min(LOOK, max(left, 0.001))
            try:
                work.wait(timedelta(seconds=look))
                return None
            except RuntimeError as error:
                # a reduce-scatter of gloo that failed does not count as completed
                if work.is_completed() or time.monotonic() - begun < look / 2:
                    return CLOSED, _first_line(error)
            if left <= LOOK:
                return LATE, ""
            with contextlib.suppress(RuntimeError):  # without the store, the time limit is left
                if self._store.check([self._key("stopped")]):
                    return CLOSED, ""

    def leave(self, error: BaseException) -> None:
        """Tell the other ranks that this one does not go on, unless all raise the same."""
        if _is_known(error) or not self._duplicates or not self._alive():
            return
        with contextlib.suppress(RuntimeError):
            self._begin()
            self._set("verdict", f"rank {self._rank} failed: {described(error)}")
            self._set("stopped", "")
        self._close()

    def _alive(self) -> bool:
        """Whether the user's group was not destroyed."""
        user = self._user()
        return user is not None and dist.is_initialized() and user in c10d._world.pg_map

    def _opened(self) -> Any:
        """The duplicate, which is made if there is none."""
        if not self._alive():
            raise UnsupportedError(
                "group was destroyed after the operator was made; call init_process_group() and "
                "build a new operator"
            )
        self._begin()
        if not self._duplicates:
            return self._user()
        if self._group is None:
            self._open()
        return self._group

    def _begin(self) -> None:
        """Say which process this rank is, under a prefix that the ranks have in common."""
        if self._prefix:
            return
        user: Any = self._user()
        kind = user.group_name, tuple(self._ranks)
        members = zlib.crc32(repr(self._ranks).encode())
        self._prefix = f"fasthessian/{user.group_name}/{members}/{_made[kind]}"
        self._begun = False
        _made[kind] += 1
        self._set(f"here/{self._rank}", json.dumps(this_process()))

    def _open(self) -> None:
        """Make the duplicate when all ranks are here."""
        settle_at_exit()
        make: Any = c10d._new_process_group_helper  # ``new_group`` names overlapping groups apart
        end, pause, words = time.monotonic() + self._start, 0.001, ""
        try:
            here = self._store.add(self._key("here"), 1)
            while here < self._size and time.monotonic() < end:
                if self._store.check([self._key("stopped")]):
                    break
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
                here = self._store.add(self._key("here"), 0)
            if here == self._size:
                self._group, _ = make(
                    self._size,
                    self._rank,
                    self._ranks,
                    dist.Backend(self._backend),
                    self._store,
                    group_name=self._prefix,
                    timeout=timedelta(seconds=max(self._start, self._timeout)),
                )
                c10d._world.pg_group_ranks[self._group] = {
                    rank: place for place, rank in enumerate(self._ranks)
                }
        except RuntimeError as error:
            words = _first_line(error)
        except BaseException as error:  # an interrupt
            self.leave(error)
            raise
        if self._group is None:
            late = time.monotonic() >= end
            raise self._failure(LATE if late else CLOSED, words, self._start)

    def _close(self) -> None:
        """Forget the duplicate; the next call makes another one."""
        group, self._group, self._prefix = self._group, None, ""
        if group is not None:
            with contextlib.suppress(Exception):
                dist.destroy_process_group(group)
        if self._size > 1 and dist.is_initialized() and dist.get_rank() == 0:
            time.sleep(STAY)

    # who failed

    def _failure(self, kind: str, words: str, limit: float) -> UnsupportedError:
        """The error that all ranks raise, after they have told each other how they noticed."""
        try:
            line = self._verdict(kind, words, limit)
        except RuntimeError:
            line = "rank 0, which holds the store of the process group, died"
        self._close()
        return known_to_all(UnsupportedError(line))

    def _verdict(self, kind: str, words: str, limit: float) -> str:
        self._set(f"mark/{self._rank}", kind if kind == CLOSED else f"{limit:g}")
        self._set("stopped", "")
        end, count = time.monotonic() + GRACE, self._store.add(self._key("marks"), 1)
        while count < self._size and time.monotonic() < end:
            if self._store.check([self._key("verdict")]):
                return self._get("verdict")
            if count == self._size - 1 and self._others_ended():
                break
            time.sleep(0.05)
            count = self._store.add(self._key("marks"), 0)
        line = self._judged(self._marks(), words)
        if not self._store.check([self._key("verdict")]):
            self._set("verdict", line)
        return self._get("verdict")

    def _judged(self, marks: dict[int, str], words: str) -> str:
        missing = [rank for rank in range(self._size) if rank not in marks]
        ends = {rank: self._ended(rank) for rank in missing}
        dead = [rank for rank in missing if ends[rank]]
        if dead:
            return f"rank {listed(dead, 'and')} died: the process has ended"
        late = [limit for limit in marks.values() if limit != CLOSED]
        if missing and late:
            return (
                f"rank {listed(missing, 'and')} did not answer within {late[0]} s; if it was "
                f"busy, set a longer timeout: group=fasthessian.distributed.Ranks(group, timeout=)"
            )
        unknown = [rank for rank in missing if ends[rank] is None]
        if unknown:
            return f"rank {listed(unknown, 'or')} died"
        if missing:
            return f"rank {listed(missing, 'and')} left the process group"
        return f"the connection between the ranks broke: {words or 'no reason is known'}"

    def _others_ended(self) -> bool:
        marks = self._marks()
        return all(self._ended(rank) for rank in range(self._size) if rank not in marks)

    def _marks(self) -> dict[int, str]:
        keys = {rank: f"mark/{rank}" for rank in range(self._size)}
        found = {rank: key for rank, key in keys.items() if self._store.check([self._key(key)])}
        return {rank: self._get(key) for rank, key in found.items()}

    def _ended(self, rank: int) -> bool | None:
        """Whether the process of a rank has ended; None if it is on another machine."""
        if not self._store.check([self._key(f"here/{rank}")]):
            return None
        return has_ended(*json.loads(self._get(f"here/{rank}")))

    # the store; torch raises RuntimeError if the process that holds it has ended

    def say(self, key: str, words: str) -> None:
        """Leave words for the other ranks."""
        with contextlib.suppress(RuntimeError):
            self._set(key, words)

    def said(self, key: str) -> str | None:
        """The words that a rank has left; None if there are none."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([self._key(key)]):
                return self._get(key)
        return None

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def _set(self, key: str, words: str) -> None:
        self._store.set(self._key(key), words.encode(errors="replace").decode())

    def _get(self, key: str) -> str:
        return bytes(self._store.get(self._key(key))).decode(errors="replace")


def known_to_all(error: E) -> E:
    """Mark an error that is raised on all ranks, so that none of them tells the others."""
    with contextlib.suppress(Exception):
        setattr(error, MARK, True)
    return error


def _is_known(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, MARK, False):
            return True
        error = error.__cause__
    return False


def described(error: BaseException) -> str:
    """An error as one line."""
    try:
        words = " ".join(str(error).split())
    except Exception:
        words = ""
    if isinstance(error, Refusal) and words:
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def listed(items: Sequence[Any], word: str) -> str:
    """Items as "a, b and c"."""
    *first, last = map(str, items)
    return f"{', '.join(first)} {word} {last}" if first else last


def _keep_forever(group: Any) -> None:
    """Never destroy a gloo group whose collective is not over: that waits for its timeout."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
