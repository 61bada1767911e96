"""What a curvature matrix must have in common on all ranks: options, model, values of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian.__about__ import __version__
from fasthessian.distributed.consistency import VALUES, check_same
from fasthessian.operators.evaluation import Evaluation
from fasthessian.vectors import real

OPTIONS = ("engine", "precision", "mode", "microbatch", "weight_decay")
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number
CHUNK = 1 << 18  # numbers of a tensor that are added at a time: 6 MiB of temporaries
STEP = 0x9E3779B97F4A7C16  # of the weights of positions, which are odd; even, 64 bits
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def check_common(evaluation: Evaluation, own: Mapping[str, Any], call: Mapping[str, str]) -> None:
    """Compare a matrix, and the call of an algorithm, over the ranks.

    ``own`` are the class of the matrix and the arguments of that class.

    The values of parameters and buffers are compared by checksums of their bits, which are made on
    their device; 8 bytes per tensor are copied to the host. They take about 3 ns a number on a CPU
    core, when the operator is built and when an algorithm starts.

    Raises:
        ValueError: the ranks differ; the message names the first difference, and the ranks.
    """
    ranks, loss = evaluation.options.ranks, evaluation.loss
    if max(ranks.size, ranks.probes.size) < 2:
        return
    items = {
        "version of torch": torch.__version__,
        "version of fasthessian": __version__,
        **call,
        **{name: str(value) for name, value in own.items()},
        **{name: repr(getattr(evaluation.options, name)) for name in OPTIONS},
        "criterion": _criterion(getattr(loss, "criterion", None)),
        "model": type(loss.model).__qualname__,
        "number of parameters": str(len(evaluation.layout.names)),
        "device": evaluation.layout.device.type,
    }
    named = loss.named_parameters()
    params = {name: named[name] for name in evaluation.layout.names}
    for number, (name, p) in enumerate(params.items()):
        items[f"parameter {number}"] = f"{name} {tuple(p.shape)} {p.dtype}"
    tensors = {f"parameter {name}": p for name, p in params.items()}
    tensors |= {f"parameter {name}": p for name, p in named.items() if name not in params}
    if loss.model is not None:
        tensors |= _buffers(loss.model, evaluation.options.mode)
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if _is_whole(tensor) and not loss.gathered.lacks(tensor)
    }
    if tensors:
        device = evaluation.layout.device
        made = [_checksum(tensor).to(device) for tensor in tensors.values()]
        sums = torch.stack(made).tolist()  # one copy to the host
        items |= {f"{VALUES}{name}": str(total) for name, total in zip(tensors, sums, strict=True)}
    check_same(ranks, items)
    check_same(ranks.probes, items)


def _criterion(criterion: Any) -> str:
    """The class or the function, with the options of torch's own criteria."""
    kind = criterion if hasattr(criterion, "__qualname__") else type(criterion)
    if not isinstance(criterion, nn.Module) or not kind.__module__.startswith("torch."):
        return str(kind.__qualname__)
    scalars = {
        name: value
        for name, value in vars(criterion).items()
        if isinstance(value, (bool, int, float, str))
        and name not in ("training", "call_super_init")
    }
    return f"{kind.__qualname__}({', '.join(f'{k}={v!r}' for k, v in sorted(scalars.items()))})"


def _buffers(model: nn.Module, mode: str) -> dict[str, Tensor]:
    """Buffers by name; in training mode without statistics of normalisation, then unused."""
    found = {}
    for name, buffer in model.named_buffers():
        last = name.rpartition(".")[2]
        if last != "num_batches_tracked" and not (mode == "train" and last in STATISTICS):
            found[f"buffer {name}"] = buffer
    return found


def _is_whole(tensor: Tensor) -> bool:
    """Whether this rank holds all values; it does not for models that are divided over ranks."""
    divided = hasattr(tensor, "placements") or tensor.is_meta or tensor.layout != torch.strided
    return not divided and (not tensor.numel() or tensor.untyped_storage().nbytes() > 0)


def _checksum(tensor: Tensor) -> Tensor:
    """The sum, modulo 2^64, of the bits of all numbers times odd weights of their positions."""
    flat = real(tensor.detach()).reshape(-1)
    flat = flat.view(BITS[flat.element_size()])
    weights = torch.arange(min(len(flat), CHUNK), device=flat.device) * _signed(STEP) + 1
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for first in range(0, len(flat), CHUNK):
        piece = flat[first : first + CHUNK].to(torch.int64)
        total += (piece * weights[: len(piece)]).sum()
        total += piece.sum() * _signed(first * STEP)
    return total


def _signed(number: int) -> int:
    """The integer of 64 bits with a sign that is equal to ``number`` modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63
