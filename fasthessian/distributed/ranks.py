"""The ranks that share one computation, and the collectives that they use.

A product is a sum over ranks. The rest of the package calls the methods of `Ranks` and never a
collective of torch. Without a process group the ranks are `ALONE`: one rank, no communication.

Sums have the same bits on every rank. ``sum_`` leaves the order of the addition to the library;
NCCL then gives the same bits in each run on the same ranks if ``NCCL_NVLS_ENABLE=0`` is set.
``sum_in_order`` adds in the order of the ranks.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fasthessian.arguments import positive
from fasthessian.distributed.failures import Connection, described, known_to_all
from fasthessian.distributed.groups import probe_group, process_group, warn_if_started_by_torchrun
from fasthessian.errors import Refusal, UnsupportedError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    Group: TypeAlias = "dist.ProcessGroup | DeviceMesh | Ranks | None"
else:
    Group = Any

R = TypeVar("R")
# torch 2.13 renames two collectives and warns about the old names
_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)


class Ranks:
    """The ranks of a process group, for the argument ``group`` of operators.

    A process group itself may be passed there, too. This class is for other time limits. If a rank
    dies or raises, the others raise at once, and if it hangs, after a time limit. Their message
    names the rank and the reason.

    Args:
        group: a ``torch.distributed.ProcessGroup`` or a DeviceMesh of one dimension, which hold
            this process; None for one rank without communication. A DeviceMesh of the dimensions
            "probe" and "data" divides the data over "data", and independent random vectors over
            "probe".
        start_timeout: seconds that the others wait for a rank when an operator is built, when an
            algorithm starts, and at the first product.
        timeout: seconds that the others wait for a rank at every other sum.

    Attributes:
        rank: the number of this process in the group.
        size: the number of ranks.
        device: where small tensors must be for a collective: the CPU, or the GPU with NCCL.

    Raises:
        ValueError: the process group is not initialised, or this rank is not in it.
        TypeError: it is no process group.

    Example:
        >>> import torch.distributed as dist
        >>> from fasthessian.distributed import Ranks
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> Ranks(dist.group.WORLD, timeout=30.0).size
        1
        >>> dist.destroy_process_group()
    """

    def __init__(
        self, group: Any = None, *, start_timeout: float = 300.0, timeout: float = 100.0
    ) -> None:
        self.rank, self.size = 0, 1
        self.device = torch.device("cpu")
        self._connection: Connection | None = None  # a group is not held: the user may destroy it
        self._sums = 0  # sums so far, which names the failures of one of them
        self.members: tuple[int, ...] = ()  # the numbers of the ranks among all processes
        # what this rank does after each job of its own, until the others are done with theirs
        self.serving: list[Callable[[], None]] = []
        limits = positive("start_timeout", start_timeout), positive("timeout", timeout)
        self._probes: Ranks | None = None
        if group is not None:
            probes, group = probe_group(group), process_group(group)
            if probes is not None:
                self._probes = Ranks(probes, start_timeout=start_timeout, timeout=timeout)
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            self._connection = Connection(group, *limits)
            self.members = tuple(dist.get_process_group_ranks(group))
            if "nccl" in str(dist.get_backend(group)):
                self.device = torch.device("cuda", torch.cuda.current_device())

    def __bool__(self) -> bool:
        """Whether there is a process group, also of one rank."""
        return self._connection is not None

    @property
    def probes(self) -> Ranks:
        """The ranks with the same share of the data, over which random vectors are divided."""
        return self._probes or ALONE

    # sums and gathers; every rank must call them in the same order

    def sum_(self, pieces: Sequence[Tensor]) -> None:
        """Sum tensors over the ranks, in place, by one collective."""
        if self._connection is None or not pieces:
            return
        self._sums += 1
        if len(pieces) == 1 and pieces[0].is_contiguous():
            self._connection.call(dist.all_reduce, pieces[0])
            return
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
        self._connection.call(dist.all_reduce, flat)
        parts = torch.split(flat, [piece.numel() for piece in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            piece.copy_(part.view(piece.shape))

    def rows(self, row: Tensor, start: bool = False) -> Tensor:
        """The rows (m,) of all ranks, in their order: (size, m), on the row's device.

        ``start``: the ranks come from work of different length, and wait for ``start_timeout``.
        """
        if self._connection is None:
            return row[None]
        own = row.contiguous().to(self.device) if self.device.type == "cuda" else row.contiguous()
        out = torch.empty(self.size * own.numel(), dtype=own.dtype, device=own.device)
        self._connection.call(_gather, out, own, start=start)  # type: ignore[arg-type]
        return out.view(self.size, -1).to(row.device)

    def gather_(self, out: Tensor, piece: Tensor) -> None:
        """Write the pieces (m,) of all ranks into out (size * m,), in the order of the ranks."""
        if self._connection is None:
            out.copy_(piece.reshape(-1))
            return
        self._connection.call(_gather, out, piece.reshape(-1))  # type: ignore[arg-type]

    def scatter_(self, out: Tensor, pieces: Tensor) -> None:
        """Sum ``pieces`` (size * m,) over the ranks, and write this rank's m numbers of it to out.

        Also called reduce-scatter.
        """
        if self._connection is None:
            out.copy_(pieces.view(out.shape))
            return
        self._sums += 1
        self._connection.call(_scatter, out.view(-1), pieces)  # type: ignore[arg-type]

    def sum_in_order(self, t: Tensor) -> Tensor:
        """The sum of t over the ranks, added in the order of the ranks: the same bits on all."""
        if self._connection is None:
            return t
        rows = self.rows(t.reshape(-1))
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        return total.view(t.shape)

    def total(self, number: int) -> int:
        """The sum of a number of each rank."""
        return int(self.rows(torch.tensor([number], device="cpu")).sum())

    def objects(self, item: Any) -> list[Any]:
        """The items of all ranks, made of numbers, strings, lists and dictionaries."""
        if self._connection is None:
            return [item]
        text = torch.tensor(list(json.dumps(item).encode()), dtype=torch.uint8, device="cpu")
        sizes = self.rows(torch.tensor([len(text)], device="cpu"), start=True)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device="cpu")
        padded[: len(text)] = text
        texts = self.rows(padded, start=True)
        pairs = zip(texts, sizes, strict=True)
        return [json.loads(bytes(row[: int(size)].tolist())) for row, size in pairs]

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Whether each flag is set on any rank."""
        if self._connection is None:
            return list(flags)
        rows = self.rows(torch.tensor(list(flags), dtype=torch.uint8, device="cpu"))
        return [bool(column.any()) for column in rows.unbind(1)]

    # failures

    def together(self, job: Callable[[], R]) -> R:
        """Do a job without collectives on every rank; if it fails on one, raise on all."""
        if self._connection is None:
            return job()
        result: list[R] = []

        def done() -> list[float]:
            result.append(job())
            return []

        self.exchanged(done, 0)
        return result[0]

    def exchanged(self, job: Callable[[], Sequence[float]], count: int) -> Tensor:
        """The ``count`` numbers that a job without collectives returns on each rank (size, count).

        If the job fails on one rank, all raise.
        """
        failure: Exception | None = None
        numbers: Sequence[float] = [0.0] * count
        try:
            with self._interrupted():
                numbers = job()
        except Exception as error:
            failure = error
        failed = float(failure is not None)
        row = torch.tensor([failed, *numbers], dtype=torch.float64, device="cpu")
        rows = self.rows(row, start=True)
        if bool(rows[:, 0].any()):
            reasons = self.objects(None if failure is None else described(failure))
            if failure is None or not all(reasons):
                rank = next(rank for rank, reason in enumerate(reasons) if reason is not None)
                failure = self._named(failure, rank, reasons[rank])
            raise known_to_all(failure)
        return rows[:, 1:]

    @contextlib.contextmanager
    def failing(
        self,
        pieces: Sequence[Tensor],
        add: Callable[[], None] | None = None,
        deferred: bool = False,
    ) -> Iterator[None]:
        """Around the work of this rank that makes its pieces of the next sum.

        The sum is ``add``, by default ``sum_``. If the work fails here, this rank takes part in it
        with NaN, so that the other ranks do not wait, and leaves the reason for them. They look for
        it if the sum holds NaN, unless it is ``deferred``.
        """
        try:
            with self._interrupted():
                yield
        except Exception as error:
            if self._connection is None:
                raise
            reason = described(error)
            self._connection.say(f"failed/{self._sums}", f"rank {self.rank} failed: {reason}")
            for piece in pieces:
                piece.fill_(torch.nan)
            (add or (lambda: self.sum_(pieces)))()
            failure = self._named(error, self.rank, reason)
            if not deferred:
                known_to_all(failure)
            if failure is error:
                raise
            raise failure from error

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Around work with collectives: if it fails on this rank, it ends on the others."""
        try:
            yield
        except BaseException as error:
            self.leave(error)
            raise

    @contextlib.contextmanager
    def _interrupted(self) -> Iterator[None]:
        """Around a job of this rank alone: an interrupt ends the call on all ranks at once."""
        try:
            try:
                yield
            except Exception:
                self._serve()
                raise
            self._serve()
        except Exception:
            raise
        except BaseException as error:
            self.leave(error)
            raise

    def _serve(self) -> None:
        for serve in self.serving:
            serve()

    def check(self) -> None:
        """Raise RuntimeError if a rank failed at the last sum, which then holds NaN."""
        if self._connection is not None:
            reason = self._connection.said(f"failed/{self._sums - 1}")
            if reason is not None:
                raise known_to_all(UnsupportedError(reason))

    def leave(self, error: BaseException) -> None:
        """Tell the other ranks that this one does not go on, unless all of them raise."""
        if self._connection is not None:
            self._connection.leave(error)
            self.probes.leave(error)

    def _named(self, error: Exception | None, rank: int, reason: str) -> Exception:
        """The error of this rank or of another one, with its rank; errors of users as they are."""
        if error is not None and not isinstance(error, Refusal):
            return error
        return (UnsupportedError if error is None else type(error))(f"rank {rank} failed: {reason}")


def backend_of(group: Any) -> str:
    """The backend of a process group, such as ``gloo``."""
    return str(dist.get_backend(group))


ALONE = Ranks()
_known: weakref.WeakKeyDictionary[Any, Ranks] = weakref.WeakKeyDictionary()


def ranks_of(group: Any) -> Ranks:
    """The ranks of the argument ``group`` of an operator: one object per process group.

    Raises:
        ValueError: the process group is not initialised, or this rank is not in it.
        TypeError: it is no process group.
    """
    if group is None:
        warn_if_started_by_torchrun()
        return ALONE
    if isinstance(group, Ranks):
        return group
    key = process_group(group) if probe_group(group) is None else group
    if key not in _known:
        _known[key] = Ranks(key)
    return _known[key]
