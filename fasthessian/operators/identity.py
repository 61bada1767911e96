"""What tells the operator of an interrupted run from another one: options, parameters and loss."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch

from fasthessian import kernels
from fasthessian.operators.base import SymmetricOperator, multiply
from fasthessian.operators.curvature import Curvature
from fasthessian.operators.fisher import Fisher
from fasthessian.operators.request import Request
from fasthessian.vectors import empty_rows, real

OPTIONS = ("engine", "precision", "mode", "microbatch", "weight_decay")
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-9}  # relative difference of equal fingerprints
SEED = 7919  # of the vectors of a fingerprint
WORDS = {"shapes": "the names or shapes of the parameters", "theta": "the parameters"}


def identity(A: SymmetricOperator) -> dict[str, Any]:
    """What can be known without a product: class, size, options, and sums of the parameters."""
    matrix = A._matrix
    found: dict[str, Any] = {
        "class": type(A).__name__ if A is matrix else f"a block of {type(matrix).__name__}",
        "n": A.n,
        "dtype": str(A.dtype).removeprefix("torch."),
        "device": A.device.type,
    }
    if isinstance(matrix, Curvature):
        found |= {name: getattr(matrix._options, name) for name in OPTIONS}
        if isinstance(matrix, Fisher):
            found |= {"samples": matrix._samples, "seed": matrix._seed}
        shapes = [[name, list(shape)] for name, shape in zip(
            A.layout.names, A.layout.shapes, strict=True  # type: ignore[attr-defined]
        )]  # fmt: skip
        found["shapes"] = hashlib.sha256(repr(shapes).encode()).hexdigest()
        found["theta"] = _sum(matrix)
    return found


def _sum(matrix: Curvature) -> str:
    """SHA-256 of the parameters, one after the other."""
    found, gathered = hashlib.sha256(), matrix._options.gathered
    with gathered.open():
        named = matrix._loss.named_parameters()
        for name in matrix.layout.names:
            value = gathered.value(named[name])
            # memory that NumPy has seen cannot be freed by ``Gathered``
            flat = real(value.clone() if gathered else value).cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def fingerprint(A: SymmetricOperator) -> dict[str, float]:
    """What depends on all of the data: the loss, or numbers of one product if A has no loss.

    The product, with a fixed random vector, is not counted in ``matvecs``.
    """
    matrix = A._matrix
    loss = getattr(matrix, "loss", None)
    if callable(loss):
        return {"loss": float(loss())}
    V = empty_rows(3, A.n, A.dtype, A.device)
    backend = kernels.select(A.device)
    backend.normal_(V[0], SEED, 0)
    backend.normal_(V[1], SEED, A.n)
    multiply([Request(A, V[:1], V[2:])])
    A.matvecs -= 1
    u, product = V[1].double(), V[2].double()
    # an inner product with rounding relative to the norm of the product
    return {"norm": float(product.norm()), "component": float(u @ product)}


def difference(
    saved: Mapping[str, Any], now: Mapping[str, Any], dtype: torch.dtype = torch.float64
) -> str:
    """The first thing in which two identities or fingerprints differ, in words; "" if none."""
    for name in sorted({*saved, *now}, key=[*now, *saved].index):
        before, found = saved.get(name), now.get(name)
        if name in ("loss", "norm", "component"):
            if name not in now or name not in saved or not _close(name, saved, now, dtype):
                if name == "loss" and None not in (before, found):
                    return (
                        f"the data or the criterion differ: the loss is {found:.6g}, "
                        f"not {before:.6g}"
                    )
                return "the products with the same vector differ"
        elif before != found:
            if name in WORDS:
                return f"{WORDS[name]} differ"
            return f"{name}={found!r}, not {before!r}"
    return ""


def _close(
    name: str, saved: Mapping[str, float], now: Mapping[str, float], dtype: torch.dtype
) -> bool:
    """Whether two numbers are equal to rounding, relative to the norm of the product if any."""
    before, found = saved[name], now[name]
    if not (math.isfinite(before) and math.isfinite(found)):
        return repr(before) == repr(found)
    scales = (each.get("norm", each[name]) for each in (saved, now))
    return abs(before - found) <= CLOSE[dtype] * max(map(abs, scales))
