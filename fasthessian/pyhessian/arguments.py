"""Checks and conversions of PyHessian's arguments, with clear errors for what cannot work."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasthessian.distributed.ranks import ALONE, Ranks
from fasthessian.errors import ConvergenceWarning, InputError, InputTypeError, UnsupportedError
from fasthessian.memory import available_bytes, readable
from fasthessian.operators.loss.batches import Batch, leaves
from fasthessian.operators.loss.calls import raised_in
from fasthessian.operators.loss.sources import LoaderSource, own_samples

# scripts save results and load them again, and `torch.load` refuses types that it does not know
torch.serialization.add_safe_globals([float])

PACKAGE = str(Path(__file__).parents[1]) + os.sep
_warned_no_cuda = False
_OPTIONS = re.compile(r"\b(engine|weights|mode|microbatch|memory_budget)=")


class Number(np.float64):
    """A float with ``.item()``; torch and NumPy convert it to float64, and it is saved as float."""

    def __repr__(self) -> str:
        return repr(float(self))

    __str__ = __repr__

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)


def numbers(values: Tensor) -> Any:
    """The values as lists of `Number`, nested like the dimensions."""
    return [Number(x) for x in values.tolist()] if values.dim() == 1 else [*map(numbers, values)]


def check_model(model: Any) -> None:
    """Raise unless the model is a module."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"model is a {type(model).__name__}; pass the torch.nn.Module whose parameters count"
        )


def check_source(data: Any, dataloader: Any) -> None:
    """Raise unless exactly one of the two is given and can be read more than once."""
    if (data is None) == (dataloader is None):
        given = "neither" if data is None else "both"
        raise InputError(f"pass exactly one of data and dataloader, got {given}")
    if hasattr(dataloader, "__next__"):
        raise InputTypeError(
            f"dataloader is a {type(dataloader).__name__}, which can be read only once; "
            "pass list(dataloader) or a DataLoader"
        )


def split_batch(batch: Any) -> tuple[Any, Any]:
    """``(inputs, targets)`` of one batch; for a mapping, the mapping and None."""
    if isinstance(batch, Mapping):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    raise InputTypeError(
        f"data must be one batch (inputs, targets) or a mapping, got a {type(batch).__name__}; "
        "pass batches as dataloader"
    )


def tolerance(tol: float) -> float:
    """``tol`` as the algorithms accept it; in PyHessian 0 or less means all of ``maxIter``."""
    if not isinstance(tol, (int, float)) or tol != tol:
        raise InputError(f"tol is {tol!r}; pass a number")
    return max(float(tol), 1e-16)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings of the algorithms, which name options that PyHessian does not have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Add to an error that advises an option, which PyHessian lacks, where that option is."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        option = _OPTIONS.search(str(error))
        if option is None or not _ours(error):
            raise
        raise type(error)(
            f"{error} ({option.group(1)} is an option of fasthessian.Hessian(model, criterion, "
            f"data), which fasthessian.eigsh, trace and density take)"
        ) from error


def _ours(error: Exception) -> bool:
    """Whether this package raised the error, not the user's model or criterion."""
    return raised_in(error).startswith(PACKAGE)


def one_pass(loader: Iterable[Batch], ranks: Ranks = ALONE) -> list[Batch]:
    """The batches of one pass over a loader that yields different batches at each pass.

    Samples that a DistributedSampler repeats to give all ranks the same number are left out.

    Raises:
        RuntimeError: the batches take more than half of the free memory.
    """
    room = available_bytes(torch.device("cpu")) // 2
    batches, held = [], 0
    source = LoaderSource(loader, False, own_samples(loader, ranks))
    with contextlib.closing(source.one_pass()) as stream:
        for batch in stream:
            held += sum(tensor.nbytes for tensor in leaves(batch))
            if held > room:
                raise UnsupportedError(
                    "dataloader yields different batches at each pass, and those of one pass take "
                    f"more than half of the free memory, {readable(room)}; pass some of them, as "
                    "dataloader=list(itertools.islice(dataloader, 10)), or a loader without "
                    "randomness"
                )
            batches.append(batch)
    warnings.warn(
        "dataloader yields different batches at each pass (random augmentation, or shuffled with "
        f"drop_last): the {len(batches)} of one pass ({readable(held)}) are kept, so that H is one "
        "matrix; pass dataloader=list(dataloader) to keep them yourself",
        UserWarning,
        stacklevel=6,
    )
    return batches


def asks_cuda(cuda: Any, device: Any) -> bool:
    """Whether ``device``, which PyHessian's forks accept, or else ``cuda`` asks for CUDA."""
    if device is None:
        return bool(cuda)
    return isinstance(device, int) or str(device).startswith("cuda")


def device_name(device: torch.device, wanted: bool) -> str:
    """The device as a string, as in PyHessian; warn once if CUDA is wanted and missing."""
    global _warned_no_cuda
    if device.type == "cuda":
        return "cuda" if device.index == torch.cuda.current_device() else str(device)
    if wanted and not torch.cuda.is_available() and not _warned_no_cuda:
        _warned_no_cuda = True
        warnings.warn(
            f"cuda is true but this machine has no CUDA: the {device.type} is used; "
            "pass cuda=False (device='cpu' where device was given)",
            UserWarning,
            stacklevel=3,
        )
    return str(device)
