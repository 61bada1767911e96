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
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fasthessian.errors import InputError, InputTypeError, Refusal, UnsupportedError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    Group = dist.ProcessGroup | DeviceMesh | None
else:
    Group = Any

R = TypeVar("R")
# torch 2.13 renames two collectives and warns about the old names
_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)
FAILED = "fasthessian/failed"  # key of the store: what went wrong on a rank, by number of the sum


class Ranks:
    """The ranks of a process group.

    Args:
        group: a ``torch.distributed.ProcessGroup`` that this process belongs to; None for one rank
            without communication.

    Attributes:
        group: as given.
        rank: the number of this process in the group.
        size: the number of ranks.
        device: where small tensors must be for a collective: the CPU, or the GPU with NCCL.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank, self.size = 0, 1
        self.device = torch.device("cpu")
        self._sums = 0  # sums so far, which names the failures of one of them
        if group is not None:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if "nccl" in str(dist.get_backend(group)):
                self.device = torch.device("cuda", torch.cuda.current_device())

    def __bool__(self) -> bool:
        """Whether there is a process group, also of one rank."""
        return self.group is not None

    # sums and gathers; every rank must call them in the same order

    def sum_(self, pieces: Sequence[Tensor]) -> None:
        """Sum tensors over the ranks, in place, by one collective."""
        if self.group is None:
            return
        self._sums += 1
        if len(pieces) == 1 and pieces[0].is_contiguous():
            dist.all_reduce(pieces[0], group=self.group)
            return
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
        dist.all_reduce(flat, group=self.group)
        parts = torch.split(flat, [piece.numel() for piece in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            piece.copy_(part.view(piece.shape))

    def rows(self, row: Tensor) -> Tensor:
        """The rows (m,) of all ranks, in their order: (size, m), on the row's device."""
        if self.group is None:
            return row[None]
        own = row.contiguous().to(self.device) if self.device.type == "cuda" else row.contiguous()
        out = torch.empty(self.size * own.numel(), dtype=own.dtype, device=own.device)
        _gather(out, own, group=self.group)  # type: ignore[misc]
        return out.view(self.size, -1).to(row.device)

    def gather_(self, out: Tensor, piece: Tensor) -> None:
        """Write the pieces (m,) of all ranks into out (size * m,), in the order of the ranks."""
        if self.group is None:
            out.copy_(piece.reshape(-1))
            return
        _gather(out, piece.reshape(-1), group=self.group)  # type: ignore[misc]

    def scatter_(self, out: Tensor, pieces: Tensor) -> None:
        """Sum ``pieces`` (size * m,) over the ranks, and write this rank's m numbers of it to out.

        Also called reduce-scatter.
        """
        if self.group is None:
            out.copy_(pieces.view(out.shape))
            return
        self._sums += 1
        _scatter(out.view(-1), pieces, group=self.group)  # type: ignore[misc]

    def sum_in_order(self, t: Tensor) -> Tensor:
        """The sum of t over the ranks, added in the order of the ranks: the same bits on all."""
        if self.group is None:
            return t
        rows = self.rows(t.reshape(-1))
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        return total.view(t.shape)

    def objects(self, item: Any) -> list[Any]:
        """The items of all ranks, made of numbers, strings, lists and dictionaries."""
        if self.group is None:
            return [item]
        text = torch.tensor(list(json.dumps(item).encode()), dtype=torch.uint8)
        sizes = self.rows(torch.tensor([len(text)]))
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(text)] = text
        texts = self.rows(padded)
        return [
            json.loads(bytes(row[: int(size)].tolist()))
            for row, size in zip(texts, sizes, strict=True)
        ]

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Whether each flag is set on any rank."""
        if self.group is None:
            return list(flags)
        rows = self.rows(torch.tensor(list(flags), dtype=torch.uint8))
        return [bool(column.any()) for column in rows.unbind(1)]

    # failures

    def together(self, job: Callable[[], R]) -> R:
        """Do a job without collectives on every rank; if it fails on one, raise on all."""
        if self.group is None:
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
            numbers = job()
        except Exception as error:
            failure = error
        rows = self.rows(torch.tensor([float(failure is not None), *numbers], dtype=torch.float64))
        if bool(rows[:, 0].any()):
            reasons = self.objects(None if failure is None else described(failure))
            raise failure or UnsupportedError(_first(reasons))
        return rows[:, 1:]

    @contextlib.contextmanager
    def failing(
        self, pieces: Sequence[Tensor], add: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Around the work of this rank that makes its pieces of the next sum.

        The sum is ``add``, by default ``sum_``. If the work fails here, this rank takes part in it
        with NaN, so that the other ranks do not wait, and leaves the reason for them.
        """
        try:
            yield
        except Exception as error:
            if self.group is not None:
                self._leave_reason(described(error))
                for piece in pieces:
                    piece.fill_(torch.nan)
                (add or (lambda: self.sum_(pieces)))()
            raise

    def _leave_reason(self, reason: str) -> None:
        """Tell the other ranks why the next sum holds NaN."""
        with contextlib.suppress(Exception):
            self._store().set(f"{FAILED}/{self._sums}", f"rank {self.rank}: {reason}")

    def check(self) -> None:
        """Raise RuntimeError if a rank failed at the last sum, which then holds NaN."""
        reason = None
        with contextlib.suppress(Exception):
            store, key = self._store(), f"{FAILED}/{self._sums - 1}"
            if store.check([key]):
                reason = store.get(key).decode()
        if reason is not None:
            raise UnsupportedError(reason)

    def _store(self) -> Any:
        return dist.distributed_c10d._get_process_group_store(self.group)


def described(error: BaseException) -> str:
    """An error as one line."""
    words = " ".join(str(error).split())
    return words if isinstance(error, Refusal) and words else f"{type(error).__name__}: {words}"


def _first(reasons: Sequence[str | None]) -> str:
    rank, reason = next((r, each) for r, each in enumerate(reasons) if each is not None)
    return f"rank {rank} failed: {reason}"


ALONE = Ranks()
_known: weakref.WeakKeyDictionary[Any, Ranks] = weakref.WeakKeyDictionary()


def ranks_of(group: Any) -> Ranks:
    """The ranks of the argument ``group`` of an operator: one object per process group.

    Raises:
        ValueError: the process group is not initialised, or this rank is not in it.
        TypeError: it is no process group.
    """
    if group is None:
        _warn_if_started_by_torchrun()
        return ALONE
    if not dist.is_available() or not dist.is_initialized():
        raise InputError(
            f"group must be None, got {group!r:.60}: no process group is initialised; call "
            f"torch.distributed.init_process_group() first and pass torch.distributed.group.WORLD"
        )
    if group is dist.GroupMember.NON_GROUP_MEMBER or isinstance(group, int):
        raise InputError(
            "group must hold this rank, which is not in it; make the operator only on the ranks "
            "of the group"
        )
    if hasattr(group, "get_group") and hasattr(group, "mesh_dim_names"):  # a DeviceMesh
        if group.ndim != 1:
            raise InputError(
                f"group must have one dimension, got a DeviceMesh of {group.ndim}; "
                f"pass one of them: mesh[name]"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise InputTypeError(
            f"group must be None, a torch.distributed.ProcessGroup or a DeviceMesh, got "
            f"{type(group).__name__}; use group=torch.distributed.group.WORLD"
        )
    if group not in _known:
        try:
            rank = dist.get_rank(group)
        except (ValueError, RuntimeError, KeyError):
            rank = -1
        if rank < 0:
            raise InputError(
                "group must hold this rank, which is not in it; make the operator only on the "
                "ranks of the group"
            )
        _known[group] = Ranks(group)
    return _known[group]


def _warn_if_started_by_torchrun() -> None:
    """Warn if torchrun started several ranks and the process group is not initialised."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdigit() and int(size) > 1 and "RANK" in os.environ and not dist.is_initialized():
        warnings.warn(
            f"group is None and no process group is initialised, but WORLD_SIZE={size}: each rank "
            f"analyses its own data alone; call torch.distributed.init_process_group() first and "
            f"pass group=torch.distributed.group.WORLD",
            stacklevel=2,
        )
