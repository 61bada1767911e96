"""Starts and ends the process group of a job that torchrun started."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fasthessian.errors import InputError, Refusal, UnsupportedError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets
# With these NCCL adds in the same order in every run on the same ranks.
REPEATABLE = {"NCCL_NVLS_ENABLE": "0", "NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}
FIXED = re.compile(r"(?!NVLS)\w+")  # one algorithm or protocol; of several, NCCL chooses
EXPORTS = " ".join(f"{name}={value}" for name, value in REPEATABLE.items())
SAID = "fasthessian/said"  # key of the store: rank 0 has said why it ends
LEFT = "fasthessian/left"  # how many ranks have nothing more to say
PATIENCE = 10.0  # seconds that the other ranks wait for that


def init(backend: str | None = None, *, deterministic: bool = False) -> Any:
    """Start the process group of a job that torchrun started, and return it for ``group=``.

    A script that calls it runs with ``python`` and with ``torchrun``: without torchrun's variables
    it returns None, which stands for one process with all of the data.

    NCCL chooses how it adds, by the sizes and the machine, and sums in NVLink switches (NVLS) may
    differ in their last bits between runs. If ``deterministic``, it adds in the same order in every
    run on the same ranks: ``NCCL_NVLS_ENABLE=0``, ``NCCL_ALGO=Ring`` and ``NCCL_PROTO=Simple`` are
    set, unless you have set another algorithm or protocol, which serves, too. That may be slower.
    Gloo always adds in the same order. The operations of your model on one GPU are not concerned;
    see ``torch.use_deterministic_algorithms``.

    Args:
        backend: as ``torch.distributed.init_process_group`` takes it. By default NCCL for tensors
            on GPUs and gloo for those on the CPU; gloo alone where there is no GPU.
        deterministic: whether sums have the same bits in every run on the same ranks.

    Returns:
        ``torch.distributed.group.WORLD``, or None for a process that torchrun did not start. If a
        process group has been initialised already, it is returned. With NCCL, the GPU of this rank
        (``LOCAL_RANK``) becomes the current device.

    Raises:
        ValueError: variables of torchrun are missing, there are more ranks than GPUs, or NCCL has
            settings that do not allow the same bits.
        RuntimeError: the ranks do not find each other.

    Example:
        >>> import fasthessian.distributed
        >>> group = fasthessian.distributed.init(deterministic=True)
        >>> print(group)  # python script.py; with torchrun, the process group
        None
    """
    if dist.is_initialized():
        group = dist.group.WORLD
        if deterministic and "nccl" in str(dist.get_backend(group)):
            _check_repeatable()
        return group
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"{', '.join(missing)} must be set with RANK and WORLD_SIZE, as torchrun does; start "
            f"with torchrun, or unset RANK and WORLD_SIZE"
        )
    backend = backend or default_backend()
    if "nccl" in backend:
        if deterministic:
            for name, value in REPEATABLE.items():
                os.environ.setdefault(name, value)
            _check_repeatable()
        torch.cuda.set_device(_own_gpu())
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        words = str(error).partition("\n")[0]
        raise UnsupportedError(
            f"the ranks did not find each other at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} (rank {os.environ['RANK']} of "
            f"{os.environ['WORLD_SIZE']}, backend {backend}): {words}"
        ) from error
    return dist.group.WORLD


def default_backend() -> str:
    """NCCL for GPUs and gloo for CPUs; gloo alone if there is no GPU, or no NCCL."""
    return (
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    )


def _own_gpu() -> int:
    number = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if number >= count:
        raise InputError(
            f"LOCAL_RANK={number} has no GPU, this machine has {count}; start "
            f"--nproc-per-node {max(count, 1)}, or pass backend='gloo'"
        )
    return number


def _check_repeatable() -> None:
    """Raise ValueError if NCCL may add in another order in the next run."""
    wrong = [name for name in REPEATABLE if not _is_fixed(name, os.environ.get(name, ""))]
    if wrong:
        now = ", ".join(f"{name}={os.environ.get(name, '')!r}" for name in wrong)
        raise InputError(
            f"deterministic must be False with {now}, got True: NCCL reads these once, when the "
            f"process group starts; export {EXPORTS} before the start"
        )


def _is_fixed(name: str, value: str) -> bool:
    return value == "0" if name == "NCCL_NVLS_ENABLE" else bool(FIXED.fullmatch(value))


def several() -> bool:
    """Whether torchrun started more than one rank."""
    size = os.environ.get("WORLD_SIZE", "1")
    return "RANK" in os.environ and size.isdigit() and int(size) > 1


def is_first() -> bool:
    """Whether this process prints and writes for the job: rank 0, or the only process."""
    return not several() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def job() -> Iterator[Any]:
    """A process group for one command if torchrun started several ranks; otherwise None.

    It is left as it is if an error comes that may not have come on all ranks.
    """
    if not several() or dist.is_initialized():
        yield dist.group.WORLD if dist.is_initialized() else None
        return
    group = init(deterministic=True)
    try:
        yield group
    except (Refusal, SystemExit):
        dist.destroy_process_group()
        raise
    # A thread of gloo may still hold a tensor of the last sum. If Python ends first, it aborts.
    dist.barrier()
    dist.destroy_process_group()


def leave(code: int, say: Callable[[], None], words: str = "") -> NoReturn:
    """End a process with an error, after ``say`` has said why.

    Of several ranks, rank 0 says it; another one does if rank 0 does not, and with ``words`` also
    if those of rank 0 are others. torchrun kills the ranks that are left when one has ended with an
    error: so all wait until nobody has more to say, and end at once.
    """
    if not several():
        say()
        sys.exit(code)
    silent = not is_first()
    if not silent:
        say()
    limit = timedelta(seconds=PATIENCE)
    with contextlib.suppress(Exception):  # another rank does not end, or there is no store
        store, rank, size = next(rendezvous("env://", timeout=limit))
        if rank == 0:
            store.set(SAID, words)
        else:
            store.wait([SAID], limit)
            silent = False
            if words not in ("", store.get(SAID).decode()):
                say()
        if store.add(LEFT, 1) == size:
            store.set(f"{LEFT} by all", "")
        store.wait([f"{LEFT} by all"], timedelta(seconds=1))
    if silent:
        say()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the usual way out takes so long that torchrun kills some ranks
