"""Small files in the official layout of CIFAR-10, and a mark for tests of the digits."""

import importlib.util

import numpy as np
import pytest

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed"
)
TEN = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def images(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def binary10(folder, counts=(3, 2, 1, 2, 1, 2)):
    """A CIFAR-10 binary folder with these record counts; returns the pixels and labels by file."""
    made = {}
    for seed, (name, count) in enumerate(zip(TEN, counts, strict=True)):
        pixels, labels = images(count, seed), np.arange(count, dtype=np.uint8) + seed
        (folder / f"{name}.bin").write_bytes(np.c_[labels, pixels].tobytes())
        made[name] = pixels, labels
    return made
