"""A study that was never run: plausible records by formulas, with planted findings."""

import dataclasses
import math

import torch

from fasthessian.results.records import Landscape
from fasthessian.study.networks import Network, Run
from fasthessian.study.records import (
    DIVERGED,
    TRAINED,
    UNTRAINED,
    Measurement,
    Stability,
    Study,
    Training,
)

STAGES = ("stem", "stage1", "stage2", "stage3", "head")
SIZES = (464.0, 14_016.0, 52_096.0, 205_696.0, 650.0)
SHARES = (0.15, 0.3, 0.2, 0.25, 0.1)  # of the trace, per stage
DEPTHS, SEEDS, EPOCHS = (20, 32), (0, 1), (0, 5, 20)
VARIANTS = ("resnet", "no-bn", "no-res", "no-bn-stage3")
LR = 0.1


@dataclasses.dataclass(frozen=True)
class Plant:
    """What a network has at the end of its training; a seed changes it by ``spread``."""

    trace: float = 600.0  # with running statistics
    accuracy: float = 0.70  # on the test images
    loss: float = 0.35
    batch: float = 1.25  # trace with statistics of the batches, relative to ``trace``
    stages: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)  # factors on the traces of the stages
    spread: float = 0.03
    status: str = TRAINED


# The findings of the paper: the network without batch normalisation is flatter at depth 20 only.
PLANTS = {
    Network(20, "resnet"): Plant(),
    Network(20, "no-bn"): Plant(200.0, 0.62, 0.60),
    Network(20, "no-res"): Plant(1800.0, 0.66, 0.45),
    Network(20, "no-bn-stage3"): Plant(1500.0, 0.64, 0.50, stages=(1.0, 1.0, 1.0, 3.0, 1.0)),
    Network(32, "resnet"): Plant(700.0, 0.71, 0.30),
    Network(32, "no-bn"): Plant(9000.0, 0.45, 0.65),
    Network(32, "no-res"): Plant(2500.0, 0.64, 0.50),
    Network(32, "no-bn-stage3"): Plant(4000.0, 0.60, 0.55, stages=(1.0, 1.0, 1.0, 4.0, 1.0)),
}


def synthetic(plants=None, *, depths=DEPTHS, variants=VARIANTS, seeds=SEEDS, epochs=EPOCHS):
    """A study of the networks in ``plants`` (default PLANTS) that have these depths and variants.

    Every first seed also has a training at a lower rate, which is not kept. Landscapes exist for
    the first seed at all epochs, and two descents.
    """
    plants = PLANTS if plants is None else plants
    trainings, measurements, landscapes = [], [], {}
    for network in [Network(d, v) for d in depths for v in variants if Network(d, v) in plants]:
        plant = plants[network]
        for seed in seeds:
            run = Run(network, seed, LR)
            if seed == seeds[0]:
                worse = dataclasses.replace(plant, accuracy=0.8 * plant.accuracy)
                trainings.append(_training(Run(network, seed, LR / 10), worse, max(epochs)))
            trainings.append(_training(run, plant, max(epochs)))
            if plant.status == DIVERGED:
                continue
            for epoch in epochs:
                for mode in ("eval", "train") if network.has_batch_norm else ("eval",):
                    found = _measurement(run, plant, epoch, max(epochs), mode)
                    measurements.append(found)
                    if seed == seeds[0]:
                        landscapes[run, epoch, mode] = _landscape(found)
    settings = {
        "data": {"name": "CIFAR-10", "training images": 4660, "test images": 10_000},
        "recipe": {"epochs": max(epochs)},
    }
    descents = (_descent(0.05, 4660), _descent(0.05, 32))
    return Study(settings, tuple(trainings), tuple(measurements), landscapes, descents)


def _descent(rate, batch):
    """A sharpness that rises to 2 / rate and stays there."""
    steps = torch.arange(0, 401, 20, dtype=torch.float64)
    rising = (2 / rate) * (1 - torch.exp(-steps / 80))
    return Stability(rate, batch, 4660, steps, torch.exp(-steps / 200), rising, rising, 9.0)


def _jitter(run, plant):
    """A factor near 1; seeds 0, 1, 2, ... lie on both sides."""
    return math.exp(plant.spread * (-1) ** run.seed * (1 + 0.1 * run.seed))


def _loss(plant, epoch, last):
    """Falls from log(10) to the planted loss."""
    return plant.loss * (math.log(10) / plant.loss) ** ((1 - epoch / last) ** 2)


def _training(run, plant, epochs):
    made = torch.arange(1, epochs + 1, dtype=torch.float64) / epochs
    rise = 1 - torch.exp(-4 * made)
    final = plant.accuracy + 0.1 * (_jitter(run, plant) - 1)
    losses = torch.tensor([_loss(plant, e, epochs) for e in range(1, epochs + 1)]).double()
    if plant.status == UNTRAINED:
        final, losses = 0.1, torch.full_like(losses, math.log(10))
    if plant.status == DIVERGED:
        losses[-1] = math.nan
    wave = 0.012 * torch.sin(9 * made + run.seed) * (1 - made)
    return Training(
        depth=run.network.depth,
        variant=run.network.variant,
        seed=run.seed,
        lr=run.lr,
        status=plant.status,
        rates=run.lr * torch.ones(epochs, dtype=torch.float64),
        train_loss=losses,
        train_accuracy=(0.1 + (final + 0.2 - 0.1) * rise).clamp(max=1),
        test_loss=losses + 0.3,
        test_accuracy=0.1 + (final - 0.1) * rise / rise[-1] + wave,
        weight_norm=20 + 10 * made,
        seconds=100.0,
    )


def _measurement(run, plant, epoch, last, mode):
    size = plant.trace * _jitter(run, plant) * (plant.batch if mode == "train" else 1.0)
    trace = size * (0.1 + 0.9 * (epoch / last) ** 0.5)
    stages = trace * torch.tensor(SHARES).double() * torch.tensor(plant.stages).double()
    trace = float(stages.sum())
    top = 0.12 * trace / torch.arange(1, 6).double()
    bulk = torch.linspace(-0.05, 0.2, 30).double() * float(top[0])
    weights = torch.exp(-(((bulk / float(top[0])) / 0.03) ** 2))
    nodes = torch.cat((bulk, top.flip(0)[1:]))
    weights = torch.cat((weights / weights.sum() * (1 - 5e-5), 1e-5 * torch.ones(4)))
    order = nodes.argsort()
    return Measurement(
        depth=run.network.depth,
        variant=run.network.variant,
        seed=run.seed,
        lr=run.lr,
        epoch=epoch,
        mode=mode,
        images=4660,
        spectrum_images=1024,
        loss=_loss(plant, epoch, last),
        accuracy=min(0.1 + 0.8 * epoch / last, 1.0),
        weight_norm=20 + 10 * epoch / last,
        gradient_norm=0.5,
        top=top,
        residuals=1e-3 * top,
        converged=True,
        trace=trace,
        trace_interval=(0.96 * trace, 1.04 * trace),
        stages=STAGES,
        stage_sizes=torch.tensor(SIZES).double(),
        stage_traces=stages,
        stage_low=0.9 * stages,
        stage_high=1.1 * stages,
        nodes=nodes[order],
        weights=weights[order],
        sigma=0.01 * float(top[0]),
        matvecs=120,
        passes=1.0,
        seconds=50.0,
    )


def _landscape(found):
    steps = torch.linspace(-0.5, 0.5, 9).double()
    height = 0.5 * (found.top[0] * steps[:, None] ** 2 + found.top[1] * steps[None, :] ** 2)
    return Landscape(steps, steps, found.loss + height / (1 + 0.05 * height))
