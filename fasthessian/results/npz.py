"""Reads ``.npz`` files from unknown sources; checks names, dtypes and sizes before the data."""

from __future__ import annotations

import math
import zipfile
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fasthessian.errors import InputError
from fasthessian.memory import readable

TEXT = "__record__"
MOST_TEXT = 32 << 20  # bytes of that member at most; NumPy uses four per character
ROOM = 128 << 20  # all members may take this many bytes, plus RATIO times the size of the file
RATIO = 8
READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Archive:
    """The members of an open ``.npz`` file.

    ``save`` does not compress, so members take less than the file. A file of NumPy's
    ``savez_compressed`` is read too, unless its members would fill the memory.

    Raises:
        ValueError, OSError, zipfile.BadZipFile: the file is not such an archive.
    """

    def __init__(self, stream: BinaryIO):
        """Read and check the list of members."""
        self.zip = zipfile.ZipFile(stream)
        infos = self.zip.infolist()
        self.infos = {info.filename.removesuffix(".npy"): info for info in infos}
        if len(self.infos) < len(infos):
            raise InputError("a member appears twice")
        size = stream.seek(0, 2)
        most, total = ROOM + RATIO * size, sum(info.file_size for info in infos)
        if total > most:
            raise InputError(
                f"its members declare {readable(total)}; accepted are {readable(most)} in a file "
                f"of {readable(size)}"
            )
        for info in infos:
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(f"member {info.filename!r} must be stored or deflated")

    def text(self) -> str:
        """The text of the member that describes the record."""
        if TEXT not in self.infos:
            raise InputError(f"it has no member {TEXT!r}")
        dtype, shape = self.header(TEXT)
        if dtype.kind != "U" or shape != () or dtype.itemsize > MOST_TEXT:
            raise InputError(
                f"{TEXT} must be one text of at most {readable(MOST_TEXT)}, got {dtype} {shape}"
            )
        return str(self.read(TEXT))

    def header(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Dtype and shape that the member declares; its size must agree with them."""
        info = self.infos[name]
        with self.zip.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            if version not in READERS:
                raise InputError(f"{name} has the .npy version {version}; expected (1, 0)")
            shape, _, dtype = READERS[version](stream)
            size = stream.tell() + math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise InputError(f"{name} must be numbers, got pickled objects")
        if min(shape, default=0) < 0 or size != info.file_size:
            raise InputError(
                f"{name}, {dtype} of shape {shape}, takes {size} bytes; its member has "
                f"{info.file_size}"
            )
        return dtype, shape

    def read(self, name: str) -> npt.NDArray[Any]:
        """The data of a member; check its ``header`` first."""
        with self.zip.open(self.infos[name]) as stream:
            return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
