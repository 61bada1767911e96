"""Files of the IDX format (LeCun, Cortes, Burges), which MNIST and Fashion-MNIST come in."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fasthessian.errors import InputError

BYTES = 8  # the code of uint8, the only type that these data sets use


def read(path: Path, *shape: int) -> npt.NDArray[np.uint8]:
    """The array of a file, which is compressed if its name ends in ``.gz``.

    The header is two zero bytes, the code of the type, the number of dimensions, and each length
    in 4 bytes, the most significant one first.

    Args:
        path: the file.
        shape: lengths that the dimensions after the first one must have.

    Raises:
        ValueError: the file is damaged, empty, or has other lengths.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"data: {path} is damaged ({error}); download it again") from error
    rank = 1 + len(shape)
    start = 4 + 4 * rank
    head = bytes((0, 0, BYTES, rank))
    if raw[:4] != head or len(raw) < start:
        raise InputError(
            f"data: {path} begins with the bytes {raw[:4].hex(' ')}, not {head.hex(' ')}; it is no "
            f"IDX file of uint8 with {rank} dimensions"
        )
    lengths = tuple(np.frombuffer(raw, ">u4", rank, offset=4).tolist())
    if lengths[1:] != shape or lengths[0] == 0:
        wanted = ", ".join(map(str, ("N", *shape)))
        raise InputError(f"data: {path} has the shape {lengths}, not ({wanted}) with N >= 1")
    if len(raw) - start != math.prod(lengths):
        raise InputError(
            f"data: {path} has {len(raw) - start} bytes of values, not {math.prod(lengths)}; it "
            "is cut short or another file, download it again"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(lengths)
