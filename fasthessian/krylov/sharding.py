"""Whether the vectors of a run are split over the ranks that share the data of its operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fasthessian.errors import InputError
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.blocks import Block
from fasthessian.operators.curvature import Curvature
from fasthessian.operators.sliced import Sliced

# From this n on, the time that is saved in passes over the basis exceeds that of the collective
# that dot products then need: with 20 rows about 1 ms of a CPU, and a few 10 us of a GPU.
PAYS = 1 << 17


def checked_sharded(A: Any, sharded: Any) -> bool | None:
    """The option ``sharded`` for these operators; a dictionary of them is never split.

    Raises:
        ValueError: their vectors cannot be split over ranks.
    """
    if sharded not in (None, False, True):
        raise InputError(f"sharded must be None, False or True, got {sharded!r}")
    if not sharded:
        return False if isinstance(A, Mapping) else sharded
    if isinstance(A, Mapping):
        raise InputError(
            "sharded must be None or False for a dictionary of operators, got True; pass its "
            "operators one by one"
        )
    if isinstance(A, SymmetricOperator) and not A._matrix._ranks:
        raise InputError(
            "sharded must be None or False for an operator without a process group, got True; "
            "make the operator with group=torch.distributed.group.WORLD"
        )
    return True


def is_sharded(A: SymmetricOperator, sharded: bool | None) -> bool:
    """Whether vectors are split: if that is wanted, or for None if it pays."""
    if sharded is None:
        sharded = A._matrix._ranks.size > 1 and A.n >= PAYS
    return sharded and isinstance(A, (Curvature, Block))


def sharded_operator(A: SymmetricOperator, sharded: bool | None) -> SymmetricOperator:
    """The operator on slices if vectors are split; else the operator."""
    return Sliced(A) if is_sharded(A, sharded) and isinstance(A, (Curvature, Block)) else A
