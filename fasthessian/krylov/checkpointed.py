"""Calls that are saved: the check of a checkpoint against its operators, and where it is kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fasthessian.checkpoints.call import Call, Saved, differing_argument
from fasthessian.checkpoints.folder import Folder
from fasthessian.checkpoints.keeper import Keeper, Saving
from fasthessian.checkpoints.records import Items
from fasthessian.checkpoints.states import Counted
from fasthessian.distributed.failures import known_to_all
from fasthessian.distributed.ranks import Ranks
from fasthessian.errors import InputError
from fasthessian.krylov.sharding import sharded_operator
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.identity import difference, fingerprint, identity


def keeper(
    call: Call,
    operators: Mapping[str, SymmetricOperator],
    counters: Mapping[str, Counted] | None = None,
    unit: str = "products",
) -> Keeper:
    """What saves this call, whose runs have these operators.

    Args:
        call: of the algorithm.
        operators: by name of the run.
        counters: by name, what counts the steps of a run if that is not its operator.
        unit: what is counted, in words.

    Raises:
        FileExistsError: the folder holds a checkpoint already.
        OSError: the folder cannot be made or written.
        ValueError: the checkpoint to be continued is of other operators.
    """
    started, checked = time.monotonic(), call.checked()
    counters = counters or operators
    if checked is None:
        return Keeper(counters, None, unit)
    path, limit = checked
    A = next(iter(operators.values()))
    if A._probes:
        raise InputError(
            f"checkpoint must be None for a mesh with the dimension 'probe', got {str(path)!r}; "
            f"make the operator with group=mesh['data'], or leave checkpoint out"
        )
    saved: Saved | None = call.checkpoint if call.resumed else None
    body: dict[str, Any] = {"call": call.saved()}
    if saved is None:
        folder = Folder(path, A._matrix._ranks)
        _claim(folder, path, call)
        try:
            body["operators"] = {name: identity(B) for name, B in operators.items()}
            body["fingerprints"] = _fingerprints(operators)
        except BaseException:
            folder.abandon()
            raise
    else:
        folder, started = saved.folder, saved.started
        _check(saved, operators, A._matrix._ranks)
        body |= {name: saved.index[name] for name in ("operators", "fingerprints")}
    inputs = Items(call.inputs, A.device)
    part = sharded_operator(A, call.arguments.get("sharded", False) if call.single else False).slice
    saving = Saving(
        folder, body, inputs, saved, limit, started, A.device,
        part if part.ranks else None, not call.arguments.get("gather", False),
    )  # fmt: skip
    return Keeper(counters, saving, unit)


def _claim(folder: Folder, path: Path, call: Call) -> None:
    """Make the folder; if it holds a checkpoint, say what differs and both ways out."""
    try:
        folder.ranks.together(folder.claim)
    except FileExistsError:
        held = ""
        with contextlib.suppress(InputError):
            found = folder.newest()["call"]
            held = f" of {found['algorithm']}"
            if found["algorithm"] == call.algorithm:
                words = differing_argument(found["arguments"], call.saved()["arguments"])
                held += f" with {words}" if words else ""
        raise FileExistsError(
            f"checkpoint {path} holds a checkpoint{held}; go on with fh.resume({str(path)!r}, A), "
            f"or delete the folder to begin anew"
        ) from None


def _fingerprints(operators: Mapping[str, SymmetricOperator]) -> dict[str, Any]:
    """One per matrix, by the name of its first run."""
    found, seen = {}, set()
    for name, A in operators.items():
        if id(A._matrix) not in seen:
            seen.add(id(A._matrix))
            found[name] = fingerprint(A)
    return found


def _check(saved: Saved, operators: Mapping[str, SymmetricOperator], ranks: Ranks) -> None:
    """Raise ValueError unless the operators are those of the checkpoint, on all ranks."""
    words, known = "", saved.index["operators"]
    if set(known) != set(operators):
        odd = sorted({*known} ^ {*operators})
        words = f"the names of the operators differ: {', '.join(odd[:3])}"
    for name, A in operators.items():
        words = words or _named(name, difference(known[name], identity(A)))
    words = next(filter(None, ranks.objects(words)), "")
    if not words and not saved.index["finished"]:
        before, now = saved.index["fingerprints"], _fingerprints(operators)
        for name, A in operators.items():
            if name in before and name in now:
                words = words or _named(name, difference(before[name], now[name], A.dtype))
    if words:
        refusal = InputError(
            f"{saved.folder.path} is the checkpoint of another run ({words}); resume it with the "
            f"operator that it was made with"
        )
        raise known_to_all(refusal)


def _named(name: str, words: str) -> str:
    return f"{name}: {words}" if name and words else words
