"""Files of CIFAR-10 and CIFAR-100 in both official layouts, read as arrays of bytes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fasthessian.errors import InputError

PIXELS = 3 * 32 * 32  # one image: the planes red, green, blue, each 32 rows of 32
COARSE_CLASSES = 20  # CIFAR-100 stores this label too; it is checked and dropped

# NumPy moved its private modules in version 2; files in circulation name both places.
RECONSTRUCTION = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def read_binary(path: Path, classes: int) -> tuple[Bytes, Labels]:
    """Images (N, 3072) and labels (N,) from a file of fixed records: label bytes, then pixels."""
    head = 1 if classes == 10 else 2
    raw = np.fromfile(path, dtype=np.uint8)
    if raw.size == 0 or raw.size % (head + PIXELS):
        raise InputError(
            f"data: {path} has {raw.size} bytes, not a positive multiple of the CIFAR-{classes} "
            f"record of {head + PIXELS}; it is cut short or another file, download it again"
        )
    records = raw.reshape(-1, head + PIXELS)
    if head == 2:
        check_labels(path, records[:, 0], COARSE_CLASSES)
    labels = records[:, head - 1].astype(np.int64)
    check_labels(path, labels, classes)
    return records[:, head:], labels


def read_python(path: Path, classes: int) -> tuple[Bytes, Labels]:
    """The same from a pickled dictionary, which may hold only NumPy arrays and containers."""
    try:
        with open(path, "rb") as stream:
            content = ArraysOnly(stream, encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:
        raise InputError(f"data: {path} is not a CIFAR python file ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"data: {path} holds a {type(content).__name__}, not a dictionary")
    # Python 2 wrote the keys as bytes; copies that Python 3 wrote again have text.
    table = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}
    label_key = "labels" if classes == 10 else "fine_labels"
    for key in ("data", label_key):
        if key not in table:
            raise InputError(f"data: {path} has no entry {key!r}; it is not CIFAR-{classes}")
    pixels = table["data"]
    if not (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.ndim == 2
        and pixels.shape[1] == PIXELS
        and pixels.shape[0] > 0
    ):
        found = (
            f"{pixels.dtype} {pixels.shape}"
            if isinstance(pixels, np.ndarray)
            else type(pixels).__name__
        )
        raise InputError(f"data: {path} has images {found}, not uint8 (N, {PIXELS})")
    try:
        labels = np.asarray(table[label_key])
    except ValueError:
        labels = np.empty(0)
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu":
        raise InputError(f"data: {path} has no whole-number label for each of {len(pixels)} images")
    check_labels(path, labels, classes)
    return pixels, labels.astype(np.int64)


class ArraysOnly(pickle.Unpickler):
    """An unpickler that rebuilds NumPy arrays and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        """Find one of the few names that the reconstruction of arrays needs."""
        if (module, name) in RECONSTRUCTION:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")


def latin1(text: str, encoding: str) -> bytes:
    """Rebuild bytes from an old pickle protocol; every other encoding is refused."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the text encoding {encoding!r}")
    return text.encode("latin1")


def check_labels(path: Path, labels: npt.NDArray[Any], classes: int) -> None:
    """Raise ValueError if a label is not in 0 .. classes - 1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise InputError(
            f"data: {path}, record {wrong[0]}: label {labels[wrong[0]]} is not in 0..{classes - 1}"
        )
