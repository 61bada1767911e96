"""The tasks of a study, their order, what each needs before it, and what each costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from fasthessian.planning.model import PER_GRADIENT
from fasthessian.study.descents import Descent
from fasthessian.study.networks import Network, Run
from fasthessian.study.recipes import Recipe
from fasthessian.study.records import DIVERGED, Measurement, Stability, Study, Training
from fasthessian.study.stability import SAMPLES, WIDTH

TRAIN, MEASURE, SURFACE, DESCEND = "train", "analyse", "landscape", "descend"
READY, WAITING, SKIPPED = "ready", "waiting", "skipped"
PER_FORWARD = 1 / 3  # a pass without gradient, in gradients
# Assumed until the first checkpoint is measured: products for the eigenvalues, and passes over the
# images for loss, gradient and traces.
TOP_PRODUCTS, PASSES = 60, 2.5
SHARPNESS_PRODUCTS = 10  # for one eigenvalue of a descent, from the eigenvector before


class Images(NamedTuple):
    """How many images there are."""

    train: int
    test: int


@dataclasses.dataclass(frozen=True)
class Task:
    """One piece of work, which ends with a file in the folder of its run.

    Attributes:
        kind: "train", "analyse" a checkpoint, "landscape" of a checkpoint, or "descend".
        run: the training, or the descent. For a rate that is not known yet, the first one of the
            recipe.
        epoch: of the checkpoint; -1 for a training and a descent.
        mode: statistics of batch normalisation, "eval" or "train"; empty for a training and a
            descent.
        cost: operations, in millions of multiplications and additions.
        state: "ready"; "waiting" for another task; "skipped", as the training diverged.
    """

    kind: str
    run: Run | Descent
    epoch: int
    mode: str
    cost: float
    state: str

    @property
    def place(self) -> tuple[str, Run | Descent, int, str]:
        """Which task it is, whatever its state."""
        return self.kind, self.run, self.epoch, self.mode

    @property
    def words(self) -> str:
        """What is done, in words.

        Example:
            >>> Task("analyse", Run(Network(20), 0, 0.1), 5, "eval", 1.0, "ready").words
            'analyse resnet20, seed 0, epoch 5, eval statistics'
        """
        if isinstance(self.run, Descent):
            batches = "" if self.run.batch is None else f", batches of {self.run.batch}"
            return f"{self.kind} at rate {self.run.rate:g}{batches}"
        of = f"{self.kind} {self.run.network.name}, seed {self.run.seed}"
        if self.kind == TRAIN:
            return f"{of}, rate {self.run.lr:g}"
        return f"{of}, epoch {self.epoch}, {self.mode} statistics"


def tasks(
    networks: Iterable[Network],
    seeds: int,
    recipe: Recipe,
    images: Images,
    trainings: Mapping[Run, Training],
    descents: Iterable[Descent] = (),
) -> list[Task]:
    """All tasks of a study in the order in which they are done, also those that are done already.

    Each rate is tried with seed 0, and the best one is kept for the other seeds. The kept runs are
    analysed at each checkpoint, in ascending order, because the eigenvectors of one checkpoint are
    the start of the next. Landscapes are made with seed 0 alone. Costly trainings come first, so
    that several processes end at about the same time, and the first seed comes before others.

    Args:
        networks: to compare.
        seeds: number of seeds of each network.
        recipe: all numbers.
        images: how many there are.
        trainings: those that ended.
        descents: of the edge of stability; they come last.
    """
    train, measure, surface = [], [], []
    ordered = sorted(dict.fromkeys(networks), key=lambda each: -each.depth)
    for seed in range(seeds):
        for network in ordered:
            first = [Run(network, 0, lr) for lr in recipe.lrs]
            kept = kept_run(first, trainings)
            rate = state_of(kept, trainings)
            runs = first if seed == 0 else [Run(network, seed, (kept or first[0]).lr)]
            price = training_cost(network, recipe, images)
            state = READY if seed == 0 else rate
            train += [Task(TRAIN, run, -1, "", price, state) for run in runs]
            run = (kept or first[0]) if seed == 0 else runs[0]
            state = state_of(run, trainings) if rate == READY else rate
            for epoch in recipe.checkpoints:
                for mode in modes(network):
                    price = measure_cost(network, recipe, images)
                    measure.append(Task(MEASURE, run, epoch, mode, price, state))
                    if seed == 0:
                        price = surface_cost(network, recipe, images)
                        surface.append(Task(SURFACE, run, epoch, mode, price, state))
    descend = [Task(DESCEND, each, -1, "", descent_cost(each, images), READY) for each in descents]
    return [*train, *measure, *surface, *descend]


def kept_run(runs: Sequence[Run], trainings: Mapping[Run, Training]) -> Run | None:
    """The run whose rate is kept, or None before all of them have ended."""
    if not all(run in trainings for run in runs):
        return None
    return Study({}, tuple(trainings[run] for run in runs), (), {}).kept()[0].run


def state_of(run: Run | None, trainings: Mapping[Run, Training]) -> str:
    """The state of what needs a training that did not diverge."""
    if run is None or run not in trainings:
        return WAITING
    return SKIPPED if trainings[run].status == DIVERGED else READY


def modes(network: Network) -> tuple[str, ...]:
    """The statistics of batch normalisation with which a network is analysed."""
    return ("eval", "train") if network.has_batch_norm else ("eval",)


# costs


def gradient_cost(network: Network, recipe: Recipe) -> float:
    """Millions of multiplications and additions for the gradient of one image of 32x32 pixels.

    A convolution of w channels at full resolution takes 9 w^2 per pixel, as do those of later
    stages, with twice the channels at a quarter of the pixels. Gradients take three forward passes.

    Example:
        >>> from fasthessian.study.recipes import RECIPES
        >>> round(gradient_cost(Network(20), RECIPES["paper"]))
        122
    """
    convolutions = network.depth - 2
    return 3 * 9 * 1024 * recipe.width * (3 + recipe.width * (convolutions - 1)) / 1e6


def training_cost(network: Network, recipe: Recipe, images: Images) -> float:
    """Of one training, with the test after each epoch."""
    per_epoch = recipe.train_images or images.train
    gradients = recipe.epochs * (per_epoch + PER_FORWARD * images.test)
    return gradients * gradient_cost(network, recipe)


def measure_cost(network: Network, recipe: Recipe, images: Images) -> float:
    """Of the eigenvalues, the density and the traces of one checkpoint."""
    used = recipe.train_images or images.train
    whole, part = recipe.images or used, recipe.spectrum_images or used
    products = PASSES * whole + (TOP_PRODUCTS + recipe.steps) * part
    return products * PER_GRADIENT * gradient_cost(network, recipe)


def surface_cost(network: Network, recipe: Recipe, images: Images) -> float:
    """Of the landscape of one checkpoint."""
    part = recipe.spectrum_images or recipe.train_images or images.train
    return recipe.points**2 * part * PER_FORWARD * gradient_cost(network, recipe)


def descent_gradient() -> float:
    """Millions of multiplications and additions for a gradient of the descents' network."""
    pixels, classes = 3 * 1024, 10  # as in ``gradient_cost``
    return 3 * WIDTH * (pixels + WIDTH + classes) / 1e6


def descent_cost(descent: Descent, images: Images) -> float:
    """Of a descent and its measurements."""
    batch = images.train if descent.batch is None else descent.batch
    samples = SAMPLES * batch if descent.batch else images.train
    measured = (SHARPNESS_PRODUCTS * images.train + samples) * PER_GRADIENT
    gradients = descent.steps * batch + (descent.steps / descent.every + 1) * measured
    return gradients * descent_gradient()


class Speed:
    """How many seconds a task takes, from those that ended.

    Kinds of tasks have speeds of their own. One without a task that ended takes that of the others.

    Example:
        >>> speed = Speed()
        >>> speed.seconds(Task("train", Run(Network(20), 0, 0.1), -1, "", 10.0, "ready")) is None
        True
        >>> speed.add("train", 10.0, 2.0)
        >>> speed.seconds(Task("train", Run(Network(32), 0, 0.1), -1, "", 20.0, "ready"))
        4.0
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}  # kind -> cost, seconds

    def add(self, kind: str, cost: float, seconds: float) -> None:
        """A task, or a part of one, took so many seconds."""
        before = self._sums.get(kind, (0.0, 0.0))
        self._sums[kind] = before[0] + cost, before[1] + seconds

    def seconds(self, task: Task) -> float | None:
        """The expected time of a task; None before any has ended."""
        known = [self._sums[task.kind]] if task.kind in self._sums else list(self._sums.values())
        cost, seconds = (sum(column) for column in zip(*known, strict=True)) if known else (0, 0)
        return task.cost * seconds / cost if cost else None

    @classmethod
    def of(cls, study: Study, planned: Iterable[Task]) -> Speed:
        """The speed that the results of a study show."""
        speed = cls()
        costs = {(task.kind, task.run): task.cost for task in planned}
        for kind, record in _timed(study):
            if (cost := costs.get((kind, record.run))) and record.seconds > 0:
                speed.add(kind, cost, record.seconds)
        return speed


def _timed(study: Study) -> Iterator[tuple[str, Training | Measurement | Stability]]:
    yield from ((TRAIN, each) for each in study.trainings if each.status != DIVERGED)
    yield from ((MEASURE, each) for each in study.measurements)
    yield from ((DESCEND, each) for each in study.descents)
