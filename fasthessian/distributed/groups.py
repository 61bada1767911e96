"""The process group that the argument ``group`` of an operator names."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch.distributed as dist

from fasthessian.errors import InputError, InputTypeError

DIMENSIONS = {"probe", "data"}  # of a mesh that divides random vectors, too


def process_group(group: Any) -> Any:
    """The process group of the argument ``group`` of an operator."""
    if not dist.is_available() or not dist.is_initialized():
        raise InputError(
            f"group must be None, got {group!r:.60}: no process group is initialised; call "
            f"torch.distributed.init_process_group() first and pass torch.distributed.group.WORLD"
        )
    if group is dist.GroupMember.NON_GROUP_MEMBER or isinstance(group, int):
        raise _outside()
    if _is_mesh(group):
        names = tuple(group.mesh_dim_names or ())
        if group.ndim != 1 and set(names) != DIMENSIONS:
            raise InputError(
                f"group must be a DeviceMesh of one dimension, or of two named 'probe' and 'data', "
                f"got {group.ndim} named {names}; pass one of them: mesh[name]"
            )
        group = group.get_group() if group.ndim == 1 else group.get_group("data")
    if not isinstance(group, dist.ProcessGroup):
        raise InputTypeError(
            f"group must be None, a torch.distributed.ProcessGroup or a DeviceMesh, got "
            f"{type(group).__name__}; use group=torch.distributed.group.WORLD"
        )
    try:
        rank = dist.get_rank(group)
    except (ValueError, RuntimeError, KeyError):
        rank = -1
    if rank < 0:
        raise _outside()
    return group


def probe_group(group: Any) -> Any:
    """The process group of the dimension "probe" of a DeviceMesh; None without one."""
    named = _is_mesh(group) and set(group.mesh_dim_names or ()) == DIMENSIONS
    return group.get_group("probe") if named else None


def _is_mesh(group: Any) -> bool:
    return hasattr(group, "get_group") and hasattr(group, "mesh_dim_names")


def _outside() -> InputError:
    return InputError(
        "group must hold this rank, which is not in it; make the operator only on the ranks of the "
        "group"
    )


def warn_if_started_by_torchrun() -> None:
    """Warn if torchrun started several ranks and the process group is not initialised."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdigit() and int(size) > 1 and "RANK" in os.environ and not dist.is_initialized():
        warnings.warn(
            f"group is None and no process group is initialised, but WORLD_SIZE={size}: each rank "
            f"analyses its own data alone; call torch.distributed.init_process_group() first and "
            f"pass group=torch.distributed.group.WORLD",
            stacklevel=3,
        )
