"""What a study finds: records of trainings, of the checkpoints analysed, and of descents."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from torch import Tensor

from fasthessian.results.record import Record
from fasthessian.results.records import Landscape
from fasthessian.study.descents import Descent
from fasthessian.study.networks import Network, Run

TRAINED, DIVERGED, UNTRAINED = "trained", "diverged", "not trained"


@dataclasses.dataclass(frozen=True, eq=False)
class Training(Record):
    """One training, epoch by epoch. Losses are mean cross-entropies without weight decay."""

    depth: int
    variant: str
    seed: int
    lr: float  # initial learning rate
    # "trained"; "diverged" if the loss became infinite or NaN; "not trained" if the last epoch's
    # accuracy on the training images is below 1.5 times that of guessing
    status: str
    rates: Annotated[Tensor, "e"]  # learning rate of each epoch
    train_loss: Annotated[Tensor, "e"]  # over the epoch, while the weights change
    train_accuracy: Annotated[Tensor, "e"]
    test_loss: Annotated[Tensor, "e"]  # after the epoch, in eval mode
    test_accuracy: Annotated[Tensor, "e"]
    weight_norm: Annotated[Tensor, "e", ">= 0"]  # after the epoch, of all parameters
    seconds: float

    @property
    def run(self) -> Run:
        """Which training it is."""
        return Run(Network(self.depth, self.variant), self.seed, self.lr)


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement(Record):
    """The curvature at one checkpoint, with one kind of statistics of batch normalisation.

    Intervals are at 95 %. They cover what random vectors add, for the images that were used.
    """

    depth: int
    variant: str
    seed: int
    lr: float
    epoch: int
    mode: str  # "eval": running statistics; "train": those of each batch
    images: int  # training images that define loss, trace and stages
    spectrum_images: int  # those that define eigenvalues, density and landscape
    loss: float  # on ``images``, in ``mode``
    accuracy: float
    weight_norm: float
    gradient_norm: float  # on ``images``
    top: Annotated[Tensor, "k"]  # largest eigenvalues, descending
    residuals: Annotated[Tensor, "k", ">= 0"]
    converged: bool
    trace: float
    trace_interval: Annotated[tuple[float, float], "ascending"]
    stages: Annotated[tuple[str, ...], "s"]  # names: stem, stage1, stage2, stage3, head
    stage_sizes: Annotated[Tensor, "s"]  # parameters
    stage_traces: Annotated[Tensor, "s"]
    stage_low: Annotated[Tensor, "s"]
    stage_high: Annotated[Tensor, "s"]
    nodes: Annotated[Tensor, "m", "ascending"]  # of the spectral density
    weights: Annotated[Tensor, "m", ">= 0"]
    sigma: float  # width of the kernel that smooths the density
    matvecs: Annotated[int, ">= 0"]  # products with the Hessian of ``spectrum_images``
    passes: float  # products with the Hessian of ``images``
    seconds: float

    @property
    def run(self) -> Run:
        """Which training it belongs to."""
        return Run(Network(self.depth, self.variant), self.seed, self.lr)


@dataclasses.dataclass(frozen=True, eq=False)
class Stability(Record):
    """What was measured along one descent. ``steps[i]`` steps precede measurement i."""

    rate: float  # learning rate
    batch: int  # images per step
    images: int
    steps: Annotated[Tensor, "m", ">= 0", "ascending"]
    losses: Annotated[Tensor, "m"]  # of all images
    sharpness: Annotated[Tensor, "m"]  # largest eigenvalue of the Hessian of all images
    batch_sharpness: Annotated[Tensor, "m"]
    seconds: float

    @property
    def threshold(self) -> float:
        """2 / rate: gradient descent diverges on a quadratic that is sharper."""
        return 2 / self.rate

    @property
    def run(self) -> Descent:
        """Which descent it is."""
        batch = None if self.batch == self.images else self.batch
        return Descent(self.rate, batch, int(self.steps[-1]), int(self.steps[1]))


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """All that a study found so far, in the order of its networks, seeds and epochs."""

    settings: Mapping[str, Any]  # plain JSON: recipe, data, versions, machine
    trainings: tuple[Training, ...]  # also those whose rate was not kept
    measurements: tuple[Measurement, ...]
    landscapes: Mapping[tuple[Run, int, str], Landscape]  # by run, epoch and mode
    descents: tuple[Stability, ...] = ()  # gradient descent by falling rate, then SGD

    def kept(self) -> tuple[Training, ...]:
        """The training of each network and seed whose last test accuracy is highest."""
        best: dict[tuple[Network, int], Training] = {}
        for training in self.trainings:
            run = training.run
            key = run.network, run.seed
            if key not in best or _final(training) > _final(best[key]):
                best[key] = training
        return tuple(best.values())


def _final(training: Training) -> float:
    """The last test accuracy; below any other if the training diverged."""
    if training.status == DIVERGED or not len(training.test_accuracy):
        return -1.0
    return float(training.test_accuracy[-1])
