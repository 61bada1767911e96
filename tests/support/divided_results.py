"""The algorithms of the package on divided data: what each must answer alike on all ranks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import fasthessian as fh
from tests.support.divided import ALL, CASES, Batches, same_bits, share

TIGHT = 1e-11  # so that vectors have converged to more than they are compared to


def directions(A: Any) -> torch.Tensor:
    return torch.randn(2, A.n, dtype=A.dtype, generator=torch.Generator().manual_seed(5))


def pairs(which: str, **options: Any) -> Any:
    return lambda A: fh.eigsh(A, 3, which, tol=TIGHT, **options)


RESULTS = {
    "eigsh LM": pairs("LM"),
    "eigsh SA": pairs("SA"),
    "eigsh BE": pairs("BE"),
    "eigsh cgs2": pairs("LM", schedule="cgs2"),
    "eigsh, restarted": pairs("LA", ncv=9),
    "eigsh compressed": lambda A: fh.eigsh(A, 2, "LA", basis="compressed").values,
    "density": lambda A: fh.density(A, steps=12, probes=2),
    "density without a basis": lambda A: fh.density(A, steps=8, basis="none"),
    "trace": lambda A: fh.trace(A, method="hutchinson", rtol=0.4),
    "exact trace": lambda A: fh.trace(A, rtol=1e-3),
    "deflated trace": lambda A: fh.trace(
        A, method="hutchinson", rtol=0.3, deflate=fh.eigsh(A, 4, tol=TIGHT)
    ),
    "trace per batch": lambda A: fh.trace(
        {"": A, **A.blocks("layer")}, method="hutchinson", sampling="per-batch", rtol=0.5
    ),
    "deflated trace per batch": lambda A: fh.trace(
        A, method="hutchinson", sampling="per-batch", rtol=0.3, deflate=fh.eigsh(A, 4, tol=TIGHT)
    ),
    "spectrum": lambda A: fh.spectrum(A, 2, tol=TIGHT, steps=10, rtol=0.3),
    "landscape": lambda A: fh.landscape(A, directions(A), span=0.5, points=3),
    "line": lambda A: fh.landscape(A, directions(A)[0], points=5),
    "eigsh of blocks": lambda A: fh.eigsh(A.blocks("layer"), 2, tol=TIGHT),
    "density of blocks": lambda A: fh.density(A.blocks("layer"), steps=6),
    "trace of blocks": lambda A: fh.trace(A.blocks("layer"), rtol=0.4),
    "spectrum of blocks": lambda A: fh.spectrum(A.blocks("layer"), 1, tol=TIGHT, steps=6),
    "products of blocks": lambda A: {
        name: block @ torch.ones(block.n, dtype=block.dtype)
        for name, block in A.blocks("stage").items()
    },
}
CHECKED = ("symmetry", "repetition", "gradient", "difference", "weights")  # rows of A.check()


def flat(value: Any, name: str = "") -> dict[str, np.ndarray]:
    """The numbers of a record, or of a dictionary of records, by field."""
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        found = {}
        for key, part in value.items():
            found |= flat(part, f"{name}.{key}")
        return found
    if isinstance(value, torch.Tensor):
        return {name: value.detach().numpy()}
    if isinstance(value, (str, type(None))):
        return {name: np.frombuffer(str(value).encode(), np.uint8).astype(float)}
    return {name: np.array(value, dtype=float)}


def operator(kind: str, cuts: tuple[int, ...] | None) -> Any:
    """Of the MLP, over all data or over the share of this rank."""
    model, criterion, batches = CASES["mlp"].make()
    make = getattr(fh, kind)
    if cuts is None:
        return make(model, criterion, batches)
    mine: Batches = share(batches, cuts, dist.get_rank())
    return make(model, criterion, mine, group=dist.group.WORLD)


def result(name: str, cuts: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The same bits at both calls, of two operators."""
    once, twice = (flat(RESULTS[name](operator("Hessian", cuts))) for _ in range(2))
    same_bits(once, twice)
    return once


def losses(cuts: tuple[int, ...] | None = None) -> dict[str, np.ndarray]:
    """Losses in one pass and one by one, and directions that do not depend on the ranks."""
    A = operator("Hessian", cuts)
    V = 0.2 * torch.randn(19, A.n, dtype=A.dtype, generator=torch.Generator().manual_seed(5))
    return {
        "block": A.losses(V).numpy(),
        "single": np.array([A.loss(v) for v in V]),
        "directions": fh.filter_normalized(A).numpy(),
    }


def eigenvalues(cuts: tuple[int, ...] | None = None) -> dict[str, np.ndarray]:
    return {kind: fh.eigsh(operator(kind, cuts), 3, "LA").values.numpy() for kind in ALL}


def checked(cuts: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The rows of ``A.check()`` by kind of matrix."""
    return {kind: dataclasses.asdict(operator(kind, cuts).check()) for kind in ALL}


@functools.cache
def of_one_process(name: str) -> dict[str, np.ndarray]:
    return flat(RESULTS[name](operator("Hessian", None)))
