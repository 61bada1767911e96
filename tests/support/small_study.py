"""Small images in the format of CIFAR-10, and records of trainings that never took place."""

import numpy as np
import torch

from fasthessian.results.records import Landscape
from fasthessian.study import analysis
from fasthessian.study.records import TRAINED, Measurement, Training

FILES = [*((f"data_batch_{i}.bin", 12) for i in range(1, 6)), ("test_batch.bin", 20)]


def images(folder, classes=10):
    """Write 60 training and 20 test images, which differ in brightness by class; the folder."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name, count in FILES:
        labels = np.arange(count, dtype=np.uint8)[:, None] % classes
        pixels = draw.integers(0, 100, (count, 3072), dtype=np.uint8) + 15 * labels
        (folder / name).write_bytes(np.hstack([labels, pixels]).astype(np.uint8).tobytes())
    return folder


def training(run, accuracy=0.5, status=TRAINED, seconds=2.0):
    """The record of a training with this accuracy after each of its two epochs."""
    column = torch.full((2,), accuracy, dtype=torch.float64)
    return Training(
        run.network.depth, run.network.variant, run.seed, run.lr, status,
        rates=column, train_loss=column, train_accuracy=column, test_loss=column,
        test_accuracy=column, weight_norm=column, seconds=seconds,
    )  # fmt: skip


def measurement(run, epoch, mode, value=1.0):
    """The record of a checkpoint with one eigenvalue and one stage, of this value."""
    row = torch.full((1,), value, dtype=torch.float64)
    return Measurement(
        run.network.depth, run.network.variant, run.seed, run.lr, epoch, mode,
        images=1, spectrum_images=1, loss=1.0, accuracy=1.0, weight_norm=1.0, gradient_norm=1.0,
        top=row, residuals=row, converged=True, trace=value, trace_interval=(value, value),
        stages=("stem",), stage_sizes=row, stage_traces=row, stage_low=row, stage_high=row,
        nodes=row, weights=row, sigma=1.0, matvecs=1, passes=1.0, seconds=1.0,
    )  # fmt: skip


def landscape(value=1.0):
    """A landscape of 2 x 2 points."""
    axis = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    return Landscape(axis, axis, torch.full((2, 2), value, dtype=torch.float64))


def replace_analysis(monkeypatch):
    """Let measurements give the size of the weights, and landscapes the epoch.

    Returns the start vectors that the measurements are given, by run, epoch and mode.
    """
    given = {}

    def measure(run, epoch, mode, model, data, recipe, start=None, progress=None):
        given[run.name, epoch, mode] = None if start is None else start.item()
        value = float(sum((p.detach().double() ** 2).sum() for p in model.parameters()))
        progress(1, 2)
        return measurement(run, epoch, mode, value), torch.full((1, 1), float(epoch))

    def surface(model, mode, data, recipe, vectors, progress=None):
        progress(1, None)
        return landscape(vectors.item())

    monkeypatch.setattr(analysis, "measure", measure)
    monkeypatch.setattr(analysis, "surface", surface)
    return given


def contents(folder):
    """All results in the folder of a study, as JSON, without the times that they took."""
    found = folder.results()
    rows = [*found.trainings, *found.measurements, *found.descents]
    return [{**row.to_json(), "seconds": 0} for row in rows] + [
        (str(key), surface.to_json()) for key, surface in found.landscapes.items()
    ]
