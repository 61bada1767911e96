"""The index of a generation: one file of JSON, with a sum that shows damage."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasthessian.errors import InputError
from fasthessian.results.fields import parse

Json = dict[str, Any]


def write(path: Path, index: Json | None) -> None:
    """Write an index under another name, and rename it when it is on the disk.

    The names of the files of tensors are on the disk before.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        with open(temporary, "w") as stream:
            json.dump({"crc32": _sum(index), "body": index}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        _sync(path.parent)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path) -> Json:
    """The index in a file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        whole = parse(path.read_text())
        index, crc = whole["body"], whole["crc32"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path.name} is damaged: {error}") from None
    if _sum(index) != crc:
        raise InputError(f"{path.name} is damaged: its sum differs")
    return index  # type: ignore[no-any-return]


def pieces(index: Json) -> Iterator[list[Any]]:
    """All pieces of tensors that an index names."""
    for parts in index["runs"].values():
        for part in parts.values():
            for place in part["tensors"].values():
                yield from place["pieces"]


def _sum(index: Json | None) -> int:
    return zlib.crc32(json.dumps(index).encode())


def _sync(folder: Path) -> None:
    """Put the names of a folder's files on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
