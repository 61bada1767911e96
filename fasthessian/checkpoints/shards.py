"""Files of tensors in the safetensors format, written and read in blocks.

A file begins with the length of its header in 8 bytes, little-endian. The header is JSON: dtype,
shape and the range of bytes of each tensor. All other bytes are the tensors. The package
``safetensors`` writes contiguous tensors only, which would copy the padded rows of a basis. So the
writer is here; the package reads.

Rows (k, n) may be split by columns: each rank writes its own range of them into a file of its own,
a ``Piece``. A reader copies from each piece what overlaps the columns that it wants, so that any
number of ranks can read what any other number wrote.
"""

from __future__ import annotations

import importlib.util
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasthessian.errors import InputError, MissingPackageError

CHUNK = 1 << 25  # bytes that are copied at a time
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bool: "BOOL",
}
TYPES = {name: dtype for dtype, name in DTYPES.items()}


class Piece(NamedTuple):
    """The columns ``start`` to ``stop`` of a tensor, under the name ``key`` in a file.

    ``crc`` is the CRC-32 of their bytes. For a tensor that is not split the columns are all.
    """

    file: str
    key: str
    start: int
    stop: int
    crc: int


class Source:
    """A tensor in the files of a checkpoint, of which this rank reads some columns or all.

    Args:
        folder: of the files.
        dtype, shape: of the whole tensor.
        pieces: where it lies.
        columns: first and last of those that are read; None for a tensor that is not split.
        width: number of columns with those of zeros that are added.

    Attributes:
        dtype: of the tensor.
        shape: of what is read.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        shape: Sequence[int],
        pieces: Sequence[Piece],
        columns: tuple[int, int] | None,
        width: int = 0,
    ) -> None:
        self._folder, self._pieces, self.dtype = folder, pieces, dtype
        self._whole, self._columns = columns is None, columns or (0, 0)
        self._held = self._columns[1] - self._columns[0]
        wide = max(width, self._held)
        self.shape = tuple(shape) if self._whole else (*shape[:-1], wide)

    def files(self) -> Iterator[Piece]:
        """The pieces that hold something of what is read."""
        first, last = self._columns
        for piece in self._pieces:
            if self._whole or max(first, piece.start) < min(last, piece.stop):
                yield piece

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """A new tensor with the content."""
        out = torch.empty(self.shape, dtype=self.dtype, device=device)
        self.read_into(out)
        return out

    def read_into(self, out: Tensor) -> None:
        """Copy the content to ``out``, which has its shape, block by block."""
        if not self._whole:
            out[:, self._held :] = 0
        for piece in self.files():
            with opened(self._folder / piece.file) as stored:
                if self._whole:
                    out.copy_(stored.get_tensor(piece.key))
                    continue
                first, last = self._columns
                start, stop = max(first, piece.start), min(last, piece.stop)
                lines = stored.get_slice(piece.key)
                for rows, columns in _blocks(len(out), stop - start, out.element_size()):
                    there = slice(start - piece.start + columns.start,
                                  start - piece.start + columns.stop)  # fmt: skip
                    here = slice(start - first + columns.start, start - first + columns.stop)
                    out[rows, here].copy_(lines[rows, there])


def required() -> None:
    """Raise ImportError if the package ``safetensors`` is missing."""
    if importlib.util.find_spec("safetensors") is None:
        raise MissingPackageError("a checkpoint needs safetensors; pip install safetensors")


def opened(path: Path) -> Any:
    """The file for reading, by the package ``safetensors``."""
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def write(path: Path, tensors: Mapping[str, Tensor], checkpoint: str) -> dict[str, int]:
    """Write a file of tensors; returns the CRC-32 of each: of its dtype, shape and bytes.

    The file is written under another name, which it keeps until all is on the disk.
    """
    # in the order of their element sizes, so that all are aligned
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {"__metadata__": {"file": f"{checkpoint} {path.name}"}}
    end = 0
    for key, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    found = {}
    temporary = path.with_name(f"{path.name}.part")
    try:
        with open(temporary, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for key, tensor in ordered:
                crc = _start(header[key])
                for block in _contiguous(tensor.detach()):
                    crc = zlib.crc32(block, crc)
                    stream.write(block)
                found[key] = crc
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return found


def verify(folder: Path, pieces: Sequence[Piece], checkpoint: str) -> None:
    """Compare the pieces with their CRC-32, and the names in their files with ``checkpoint``.

    Raises:
        ValueError: a file is missing, cut, changed or of another generation; the message names it.
    """
    for name in sorted({piece.file for piece in pieces}):
        path = folder / name
        try:
            with open(path, "rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(min(size, path.stat().st_size)))
                found = header["__metadata__"]["file"]
                if found != f"{checkpoint} {name}":
                    raise InputError(f"{name} belongs to another generation or run")
                for piece in pieces:
                    if piece.file == name:
                        begin, end = header[piece.key]["data_offsets"]
                        stream.seek(8 + size + begin)
                        crc = _start(header[piece.key])
                        for at in range(begin, end, CHUNK):
                            crc = zlib.crc32(stream.read(min(CHUNK, end - at)), crc)
                        if crc != piece.crc:
                            raise InputError(f"{name} is damaged: the sum of {piece.key} differs")
        except FileNotFoundError:
            raise InputError(f"{name} is missing") from None
        except (KeyError, TypeError, OverflowError, UnicodeDecodeError, json.JSONDecodeError):
            raise InputError(f"{name} is damaged: its header is not the written one") from None


def _start(entry: Any) -> int:
    """The CRC-32 of a tensor's entry in the header, which that of its bytes continues."""
    return zlib.crc32(json.dumps(entry).encode())


def _contiguous(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in the order of its rows, in blocks, copied only where they must be."""
    rows = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor
    for lines, columns in _blocks(len(rows), rows.shape[1], rows.element_size()):
        block = rows[lines, columns].cpu().contiguous()
        yield block.numpy().data.cast("B")


def _blocks(rows: int, columns: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a matrix of at most CHUNK bytes, in the order of its rows."""
    width = max(1, min(columns, CHUNK // itemsize))
    height = max(1, CHUNK // (width * itemsize)) if width == columns else 1
    if rows * columns == 0:
        return
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield (
                slice(row, min(row + height, rows)),
                slice(column, min(column + width, columns)),
            )
