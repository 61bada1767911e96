"""Files of a network's weights in the safetensors format, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian.checkpoints import shards
from fasthessian.errors import InputError
from fasthessian.results.record import write_whole
from fasthessian.study.networks import Run

KEY = "fasthessian"  # of the metadata in a file; one key, as the package sorts several at random


def save(path: str | os.PathLike[str], model: nn.Module, *, run: Run, epoch: int) -> None:
    """Write parameters and buffers, in torch's default memory format, over an older file.

    Args:
        path: the file.
        model: whose ``state_dict`` is written.
        run: the training; its name is in the file's metadata.
        epoch: finished epochs, also in the metadata.

    Raises:
        ImportError: safetensors is missing.
        OSError: the file cannot be written; an older one is still there.
    """
    write(path, model.state_dict(), {"run": run.name, "epoch": epoch})


def load(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Copy parameters and buffers from a file that ``save`` wrote into ``model``.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: safetensors is missing.
        ValueError: the file is damaged, or holds other names or shapes; the model is as before.
    """
    tensors, _ = read(path)
    copy_(path, tensors, model.state_dict())


def copy_(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]
) -> None:
    """Copy ``tensors`` of a file ``into`` those with the same names, or raise before any copy."""
    if odd := sorted(set(tensors) ^ set(into)):
        which = "lacks" if odd[0] in into else "has"
        raise InputError(f"{path} is of another network: it {which} {odd[0]}")
    for name, tensor in into.items():
        found, wanted = tuple(tensors[name].shape), tuple(tensor.shape)
        if found != wanted:
            raise InputError(f"{path} is of another network: {name} is {found}, not {wanted}")
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(tensors[name])


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Write tensors, and what JSON says about them, to a file, over an older one.

    The same content makes the same bytes.
    """
    shards.required()
    from safetensors.torch import save as serialized

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, serialized(plain, {KEY: json.dumps(about)}), overwrite=True)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a file, on the CPU, and what it says about them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged.
    """
    shards.required()
    from safetensors import SafetensorError

    try:
        with shards.opened(Path(path)) as stored:
            names = list(stored.keys())  # it is no dictionary
            tensors = {name: stored.get_tensor(name) for name in names}
            return tensors, json.loads(stored.metadata()[KEY])
    except SafetensorError as error:
        words = " ".join(str(error).split())
        raise InputError(f"{path} is damaged ({words}); delete it and start again") from error
