"""Real images: scikit-learn's digits, CIFAR-10/100 in both official layouts, Fashion-MNIST."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fasthessian.errors import InputError, MissingPackageError
from fasthessian.study import idx_files
from fasthessian.study.cifar_files import Bytes, Labels, check_labels, read_binary, read_python

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

# Training images and labels, test images and labels of MNIST and Fashion-MNIST.
IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


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
            for part in torch.split(tensor, 4096):
                found.update(part.cpu().contiguous().numpy().data)
        return found.hexdigest()[:16]


def load(source: str | os.PathLike[str] | None = None) -> ImageData:
    """The images of a folder, whose file names show what it holds, or scikit-learn's digits.

    Args:
        source: a folder for ``cifar`` or ``fashion_mnist``; None or "digits" for ``digits``.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: the folder does not exist, holds none of these, is damaged, or all training
            images have one label.
    """
    if source is None or source == "digits":
        return digits()
    root = Path(source)
    names = sorted(path.name for path in root.iterdir()) if root.is_dir() else None
    if names is None:
        raise InputError(f"data: {root} is not a folder; give a folder of images, or digits")
    if any(present(root, layout) for layout in LAYOUTS):
        data = cifar(root)
    elif any(name.removesuffix(".gz") in IDX for name in names):
        data = fashion_mnist(root)
    else:
        found = ", ".join(names[:4] + ["..."] * (len(names) > 4)) or "nothing"
        raise InputError(
            f"data: {root} holds {found}; accepted are CIFAR-10 (data_batch_1.bin, data_batch_1), "
            f"CIFAR-100 (train.bin, train) and MNIST or Fashion-MNIST ({IDX[0]}, also .gz)"
        )
    label = int(data.train_y[0])
    if bool((data.train_y == label).all()):
        raise InputError(
            f"data: all {len(data.train_y)} training images of {root} have the label {label}; at "
            "least two classes are needed"
        )
    return data


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
    return [(x[index], y[index]) for index in torch.split(chosen, batch_size)]


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
    return ImageData(x[train], y[train], x[test], y[test], 10, "digits", flips=False)


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


def fashion_mnist(folder: str | os.PathLike[str]) -> ImageData:
    """Fashion-MNIST (Xiao et al. 2017), or MNIST, from its four IDX files, also compressed (.gz).

    The grey images are padded with black from 28 to 32 pixels, and repeated for three colours.
    Mean and standard deviation are those of the training images before padding. The name is that of
    the folder, as the file names of the two data sets are the same; therefore no image is mirrored.

    Raises:
        ValueError: the folder does not exist, or a file is missing, cut short or damaged.
    """
    root = Path(folder)
    paths = {}
    for name in IDX:
        found = [path for path in (root / name, root / f"{name}.gz") if path.is_file()]
        if not found:
            raise InputError(f"data: {root} lacks {name} or {name}.gz")
        paths[name] = found[0]
    pixels, labels = [], []
    for images_name, labels_name in (IDX[:2], IDX[2:]):
        pixels.append(idx_files.read(paths[images_name], 28, 28))
        labels.append(idx_files.read(paths[labels_name]))
        if len(labels[-1]) != len(pixels[-1]):
            raise InputError(
                f"data: {paths[labels_name]} has {len(labels[-1])} labels for the "
                f"{len(pixels[-1])} images of {paths[images_name].name}"
            )
        check_labels(paths[labels_name], labels[-1], 10)
    mean, std = pixels[0].mean(dtype=np.float64), pixels[0].std(dtype=np.float64)
    if std == 0:
        raise InputError(f"data: all pixels of {paths[IDX[0]]} are {pixels[0].flat[0]}")
    train_x, test_x = (
        F.pad(torch.from_numpy(part).float().unsqueeze(1), (2, 2, 2, 2))
        .sub_(float(mean))
        .div_(float(std))
        .expand(-1, 3, -1, -1)
        for part in (np.array(part) for part in pixels)
    )
    train_y, test_y = (torch.from_numpy(part.astype(np.int64)) for part in labels)
    return ImageData(train_x, train_y, test_x, test_y, 10, root.resolve().name, flips=False)


def present(root: Path, layout: Layout) -> list[str]:
    """The files of a layout that exist in the folder."""
    return [name for name in (*layout[0], layout[1]) if (root / name).is_file()]


def normalised(pixels: Bytes, labels: Labels, classes: int) -> tuple[Tensor, Tensor]:
    """Bytes (N, 3072) -> float32 (N, 3, 32, 32) with zero mean and unit variance per channel."""
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in CHANNELS[classes])
    x = torch.from_numpy(pixels).reshape(-1, 3, 32, 32).float()
    return x.div_(255).sub_(mean).div_(std), torch.from_numpy(labels)
