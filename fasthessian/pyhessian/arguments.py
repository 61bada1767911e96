"""What the drop-in accepts: the old arguments, and clear errors for what cannot work."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fasthessian.algorithms.arguments import ConvergenceWarning

_warned_no_cuda = False


def check_source(data: Any, dataloader: Any) -> None:
    """Raise unless exactly one of the two is given and can be read again."""
    if (data is None) == (dataloader is None):
        given = "neither" if data is None else "both"
        raise ValueError(f"pass exactly one of data and dataloader, got {given}")
    if hasattr(dataloader, "__next__"):
        raise TypeError(
            f"dataloader is a {type(dataloader).__name__}, which can be read only once; "
            "pass list(dataloader) or a DataLoader"
        )


def split_batch(batch: Any) -> tuple[Any, Any]:
    """``(inputs, targets)`` of one batch: of a mapping, itself and None."""
    if isinstance(batch, Mapping):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    raise TypeError(
        f"data must be one batch (inputs, targets) or a mapping, got a {type(batch).__name__}; "
        "pass batches as dataloader"
    )


def tolerance(tol: float) -> float:
    """``tol`` as the algorithms take it; 0 or less meant to use all of ``maxIter``."""
    if not isinstance(tol, (int, float)) or tol != tol:
        raise ValueError(f"tol is {tol!r}; pass a number")
    return max(float(tol), 1e-16)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the algorithms' warnings, which speak of options that PyHessian does not have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def device_name(device: torch.device, wanted: bool) -> str:
    """The device as PyHessian's string; warn once where CUDA is wanted and missing."""
    global _warned_no_cuda
    if device.type == "cuda":
        return "cuda" if device.index == torch.cuda.current_device() else str(device)
    if wanted and not torch.cuda.is_available() and not _warned_no_cuda:
        _warned_no_cuda = True
        warnings.warn(
            f"cuda is true but this machine has no CUDA: going on on the {device.type}; "
            "pass cuda=False",
            UserWarning,
            stacklevel=3,
        )
    return str(device)
