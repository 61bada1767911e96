"""One batch in all its forms: its tensors and samples, how it is moved to a device and cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fasthessian.errors import InputError, InputTypeError

Batch = Any  # a Mapping, a tuple or list (inputs..., targets), or one object
DEPTH = 3  # levels of objects inside objects that are searched for tensors


def is_sequence(batch: Batch) -> bool:
    """Whether the batch is a tuple or list of entries; a packed sequence is one object instead."""
    return isinstance(batch, (tuple, list)) and not _has_to(batch)


def is_object(batch: Batch) -> bool:
    """Whether the batch is one object with a ``to`` method: a graph, a packed sequence."""
    return _has_to(batch) and not isinstance(batch, (Tensor, Mapping))


def _has_to(item: Any) -> bool:
    return callable(getattr(item, "to", None))


def targets(batch: Batch) -> Any:
    """The last entry of a sequence, or the ``labels`` of a mapping; None if there are none."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[-1] if is_sequence(batch) and len(batch) else None


def leaves(batch: Batch, depth: int = DEPTH) -> Iterator[Tensor]:
    """Every dense tensor inside a batch and the objects that it holds, in a fixed order."""
    if isinstance(batch, Tensor):
        if batch.layout is torch.strided:
            yield batch
    elif isinstance(batch, Mapping):
        for key in batch:
            yield from leaves(batch[key], depth)
    elif isinstance(batch, (tuple, list)):
        for item in batch:
            yield from leaves(item, depth)
    elif depth and hasattr(batch, "__dict__") and not isinstance(batch, type):
        yield from leaves(vars(batch), depth - 1)


def items(batch: Batch) -> Iterator[Any]:
    """Everything inside a batch that is not a container, in a fixed order."""
    if isinstance(batch, Mapping) or is_sequence(batch):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from items(item)
    else:
        yield batch


def mapped(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    """The batch with ``change`` applied to everything in it that is not a container."""
    if isinstance(batch, Mapping):
        return {key: mapped(batch[key], change) for key in batch}
    if is_sequence(batch):
        items = [mapped(item, change) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return change(batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on ``device``; tensors already there are not copied."""

    def move(item: Any) -> Any:
        if isinstance(item, Tensor):
            moved = item.to(device, non_blocking=True)
            return (
                moved.clone() if moved.is_inference() else moved
            )  # autograd cannot save inference tensors
        return item.to(device) if _has_to(item) else item

    return mapped(batch, move)


def uncuttable(batch: Batch) -> str:
    """The type of an object in the batch that cannot be cut; "" if there is none."""
    for item in items(batch):
        holds_tensors = not isinstance(item, Tensor) and next(leaves(item), None) is not None
        if is_object(item) or holds_tensors:
            return type(item).__name__
    return ""


def cut(batch: Batch, most: int | None) -> Iterator[Batch]:
    """Chunks of at most ``most`` samples; with None the whole batch.

    Tensors with one row per sample and lists with one entry per sample are cut. Everything else is
    part of every chunk.

    Raises:
        ValueError: the batch holds an object that cannot be cut.
    """
    count = samples(batch)
    if most is None or count <= most:
        yield batch
        return
    try:
        chunks = list(_windows(batch, count, most, 0))
    except ValueError as error:
        raise InputError(f"microbatch must be None: {error}; pass smaller batches") from None
    yield from chunks


def halves(batch: Batch, dim: int = 0) -> Iterator[Batch]:
    """Two halves of a batch, or nothing if it cannot be cut.

    With ``dim`` 1 tensors are cut along their second dimension, and vectors along their only one.
    """
    if dim and is_rows(batch):
        return
    sizes = [samples(batch)] if dim == 0 else [t.shape[1] for t in leaves(batch) if t.dim() > 1]
    if sizes and sizes[0] > 1:
        yield from _windows(batch, sizes[0], (sizes[0] + 1) // 2, dim)


def _windows(batch: Batch, count: int, most: int, dim: int) -> Iterator[Batch]:
    """Cut what is ``count`` long along ``dim`` into pieces of at most ``most``."""
    for start in range(0, count, most):
        yield piece(batch, start, min(start + most, count), count, dim)


def piece(batch: Batch, start: int, stop: int, count: int, dim: int = 0) -> Batch:
    """The samples ``start`` to ``stop`` of a batch of ``count``, which are counted along ``dim``.

    Raises:
        ValueError: the batch holds an object that cannot be cut.
    """
    if name := uncuttable(batch):
        raise InputError(f"data holds a {name}, which cannot be cut")

    def window(item: Any) -> Any:
        axis = min(dim, item.dim() - 1) if isinstance(item, Tensor) else -1
        if axis < 0 or item.shape[axis] != count:
            return item
        if item.layout is not torch.strided:
            raise InputError(
                f"data holds a {item.layout} tensor of shape {tuple(item.shape)}, which cannot "
                f"be cut"
            )
        return item.narrow(axis, start, stop - start)

    def entries(item: Any) -> Any:
        per_sample = isinstance(item, (tuple, list)) and len(item) == count
        return item[start:stop] if per_sample else item

    if is_rows(batch):
        return batch[start:stop]
    if dim or not listed_targets(batch):
        return mapped(batch, window)
    if isinstance(batch, Mapping):
        return {key: entries(window(item)) for key, item in batch.items()}
    return type(batch)(entries(window(item)) for item in batch)


def listed_targets(batch: Batch) -> int:
    """The number of targets if they are a list of mappings, as for detectors; else 0."""
    found = targets(batch)
    mappings = isinstance(found, (tuple, list)) and all(isinstance(x, Mapping) for x in found)
    return len(found) if mappings else 0


def is_rows(batch: Batch) -> bool:
    """Whether a batch is a list of samples that were not collated: all tuples, or all mappings."""
    kinds = {type(item) for item in batch} if isinstance(batch, list) else set()
    return len(kinds) == 1 and issubclass(kinds.pop(), (tuple, Mapping))


def samples(batch: Batch) -> int:
    """The number of samples: the length of the targets, or of the first tensor with a dimension."""
    if count := len(batch) if is_rows(batch) else listed_targets(batch):
        return count
    last = targets(batch) if is_sequence(batch) else None
    if isinstance(last, Tensor) and last.dim() == 0:
        return 1
    for tensor in [*leaves(last), *leaves(batch)]:
        if tensor.dim() > 0:
            return tensor.shape[0]
    return 1


def size(batch: Batch) -> int:
    """How many numbers the batch holds: a measure of its memory, relative to other batches."""
    return sum(tensor.numel() for tensor in leaves(batch)) or 1


def described(batch: Batch) -> str:
    """A short description of the batch: types, shapes and keys."""
    if isinstance(batch, Tensor):
        return f"Tensor {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        inside = ", ".join(f"{key!r}: {described(batch[key])}" for key in batch)
        return f"{{{inside:.100}}}"
    if is_sequence(batch):
        inside = f"{', '.join(map(described, batch)):.100}"
        return f"[{inside}]" if isinstance(batch, list) else f"({inside})"
    return type(batch).__name__


def check_batch(batch: Batch, has_criterion: bool) -> None:
    """Raise TypeError unless the batch is a mapping, an object, or a sequence of enough entries."""
    if isinstance(batch, Mapping):
        if not batch:
            raise InputTypeError("data holds an empty mapping; a batch needs at least one tensor")
        return
    if is_object(batch):
        return
    if not is_sequence(batch):
        raise InputTypeError(
            f"data holds a batch of type {type(batch).__name__}; a batch is (inputs, targets), a "
            f"tuple of more, a mapping, or an object with .to; or pass as criterion a function "
            f"loss(model, batch), which takes any"
        )
    least = 2 if has_criterion else 1
    if len(batch) < least:
        form = "(inputs, targets)" if has_criterion else "(inputs,)"
        raise InputTypeError(
            f"data holds a batch of {len(batch)} entries; at least {form} is needed, unless "
            f"criterion is a function loss(model, batch)"
        )
