"""Real images: scikit-learn's digits, and CIFAR-10/100 in both official layouts."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from fasthessian.errors import InputError, MissingPackageError

PIXELS = 3 * 32 * 32  # one image: the planes red, green, blue, each 32 rows of 32
COARSE_CLASSES = 20  # CIFAR-100 stores this label too; it is checked and dropped

# Mean and standard deviation of each channel over the official 50,000 training images.
CHANNELS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}

# What a folder may contain: training files, test file, number of classes.
Layout = tuple[list[str], str, int]
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
LAYOUTS: tuple[Layout, ...] = (
    ([f"{name}.bin" for name in BATCHES], "test_batch.bin", 10),
    (["train.bin"], "test.bin", 100),
    (BATCHES, "test_batch", 10),
    (["train"], "test", 100),
)

# NumPy moved its private modules in version 2; files in circulation name both places.
RECONSTRUCTION = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """Normalised images and their labels, split into training and test."""

    train_x: Tensor  # (N, channels, h, w) float32
    train_y: Tensor  # (N,) int64
    test_x: Tensor
    test_y: Tensor
    classes: int
    name: str
    flips: bool = True  # whether a mirror image keeps its label: photographs, not digits

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of images and labels."""
        found = hashlib.sha256()
        for tensor in (self.train_x, self.train_y, self.test_x, self.test_y):
            found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.cpu().contiguous().numpy().data)
        return found.hexdigest()[:16]


def subset(
    x: Tensor, y: Tensor, samples: int | None, batch_size: int, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """The same images in each call, drawn without replacement, as a list of batches.

    With the same seed, a smaller subset is the beginning of a larger one.

    Args:
        x: images (N, ...).
        y: labels (N,).
        samples: number of images; None for all N, also in the order of the seed.
        batch_size: images per batch; the last one may have fewer.
        seed: seed of the choice.

    Raises:
        ValueError: a size is out of range.

    Example:
        >>> x = torch.arange(5.0)
        >>> [len(labels) for _, labels in subset(x, x, 3, 2)]
        [2, 1]
    """
    count = len(y)
    if samples is not None and not 1 <= samples <= count:
        raise InputError(f"samples={samples} is not in 1..{count}, the training images there are")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is below 1")
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    return [(x[index], y[index]) for index in chosen.split(batch_size)]


def digits(*, size: int = 32, channels: int = 3, seed: int = 0) -> ImageData:
    """scikit-learn's 1,797 handwritten digits (8x8, UCI), 1,437 to train and 360 to test.

    Args:
        size: side in pixels; 8 keeps the images, other sides resample them bilinearly.
        channels: copies of the grey image, for networks that expect colours.
        seed: seed of the split.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingPackageError(
            "the digits come with scikit-learn, which is missing; pip install scikit-learn"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    y = torch.from_numpy(labels).long()
    if size != 8:
        x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1437], order[1437:]
    x = (x - x[train].mean()) / x[train].std()
    x = x.expand(-1, channels, -1, -1)
    return ImageData(x[train], y[train], x[test], y[test], 10, "digits")


def cifar(folder: str | os.PathLike[str]) -> ImageData:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009) from an unpacked official archive.

    The file names show which: ``data_batch_1.bin`` ... (CIFAR-10 binary), ``train.bin`` (CIFAR-100
    binary), ``data_batch_1`` ... (CIFAR-10 python), ``train`` (CIFAR-100 python). Files may have
    fewer records than the official ones. The labels of CIFAR-100 are its 100 fine labels.

    Raises:
        ValueError: the folder does not exist, or a file is missing, cut short or damaged.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"data: {root} is not a folder; give the unpacked CIFAR folder")
    layout = next((row for row in LAYOUTS if present(root, row)), None)
    if layout is None:
        raise InputError(
            f"data: {root} holds no CIFAR file; expected data_batch_1.bin, train.bin, "
            "data_batch_1 or train"
        )
    train_names, test_name, classes = layout
    found = present(root, layout)
    missing = [name for name in (*train_names, test_name) if name not in found]
    if missing:
        raise InputError(f"data: {root} has {found[0]} but lacks {', '.join(missing)}")
    read = read_binary if test_name.endswith(".bin") else read_python
    parts = [read(root / name, classes) for name in train_names]
    train_x, train_y = normalised(
        np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts]), classes
    )
    test_x, test_y = normalised(*read(root / test_name, classes), classes)
    return ImageData(train_x, train_y, test_x, test_y, classes, f"CIFAR-{classes}")


def present(root: Path, layout: Layout) -> list[str]:
    """The files of a layout that exist in the folder."""
    return [name for name in (*layout[0], layout[1]) if (root / name).is_file()]


def normalised(pixels: Bytes, labels: Labels, classes: int) -> tuple[Tensor, Tensor]:
    """Bytes (N, 3072) -> float32 (N, 3, 32, 32) with zero mean and unit variance per channel."""
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in CHANNELS[classes])
    x = torch.from_numpy(pixels).reshape(-1, 3, 32, 32).float()
    return x.div_(255).sub_(mean).div_(std), torch.from_numpy(labels)


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
