"""All numbers of a study: how the networks are trained, and how they are analysed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fasthessian.arguments import integer, positive
from fasthessian.errors import InputError, InputTypeError

# What decides the weights of a run, besides the run itself and the data.
TRAINING = (
    "epochs", "batch_size", "momentum", "weight_decay", "drops", "augment", "checkpoints",
    "train_images", "width",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The numbers of a study.

    Attributes:
        name: key of ``RECIPES`` that the numbers come from.
        epochs: passes over the training images, at least 1.
        batch_size: images per step of the training.
        lrs: initial learning rates; each is tried with the first seed, and the best is kept.
        momentum: of SGD, in [0, 1).
        weight_decay: L2 penalty in the optimiser, at least 0.
        drops: numbers of finished epochs after which the learning rate is divided by ten.
        augment: whether images are cropped and mirrored at random during training.
        checkpoints: numbers of finished epochs whose weights are kept and analysed; 0 is before
            the training.
        train_images: training images that are used; None for all.
        images: training images that define loss, trace and traces of stages; None for all that
            are used in the training.
        analysis_batch: images per batch of the analysis.
        spectrum_images: images that define eigenvalues, density and landscape; None as above.
        top: largest eigenvalues, at least 2, as the landscape needs two directions.
        steps: steps of the Lanczos run for the density.
        trace_rtol: half-width of the 95 % interval of the trace, relative to the trace.
        points: points of the landscape along each direction, at least 2.
        span: the landscape covers [-span, span] along each direction.
        width: channels of the networks' first stage.
        seeds: number of seeds, 0, 1, ..., for each network.

    Raises:
        TypeError, ValueError: a number has another type or is out of range; the message names it.

    Example:
        >>> RECIPES["laptop"].changed(epochs=10).drops
        (4, 6)
    """

    name: str
    epochs: int
    batch_size: int
    lrs: tuple[float, ...]
    momentum: float
    weight_decay: float
    drops: tuple[int, ...]
    augment: bool
    checkpoints: tuple[int, ...]
    train_images: int | None
    images: int | None
    analysis_batch: int
    spectrum_images: int | None
    top: int
    steps: int
    trace_rtol: float
    points: int
    span: float
    width: int
    seeds: int

    def __post_init__(self) -> None:
        """Check every number."""
        least = {"top": 2, "points": 2}
        for name in ("epochs", "batch_size", "analysis_batch", "top", "steps", "points", "width",
                     "seeds"):  # fmt: skip
            integer(name, getattr(self, name), least.get(name, 1))
        for name in ("train_images", "images", "spectrum_images"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 1)
        positive("span", self.span)
        positive("trace_rtol", self.trace_rtol, 1)
        for name, below in (("momentum", 1.0), ("weight_decay", math.inf)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < below:
                raise InputError(f"{name} must be a number in [0, {below:g}), got {value!r}")
        if not isinstance(self.augment, bool):
            raise InputTypeError(f"augment must be True or False, got {self.augment!r}")
        for lr in _several("lrs", self.lrs):
            positive("lrs", lr)
        if len({f"{lr:g}" for lr in self.lrs}) < len(self.lrs):
            raise InputError(f"lrs must differ in their first six digits, got {self.lrs}")
        for name, low in (("drops", 1), ("checkpoints", 0)):
            values = _several(name, getattr(self, name), empty=name == "drops")
            for value in values:
                integer(name, value, low, self.epochs)
            if list(values) != sorted(set(values)):
                raise InputError(f"{name} must ascend, got {values}")

    def rate(self, lr: float, epoch: int) -> float:
        """The learning rate of a run with initial rate ``lr`` after ``epoch`` finished epochs."""
        return lr / 10.0 ** sum(epoch >= drop for drop in self.drops)

    def training(self) -> dict[str, Any]:
        """The numbers that decide the weights of a run."""
        return {name: getattr(self, name) for name in TRAINING}

    def changed(self, **numbers: Any) -> Recipe:
        """The recipe with other numbers, by name; None keeps the number of the recipe.

        With other ``epochs``, drops and checkpoints that are not given move to the same fractions
        of the training. With other ``train_images``, analysis sets that are not given have at most
        that size.
        """
        given = {name: value for name, value in numbers.items() if value is not None}
        epochs = integer("epochs", given.get("epochs", self.epochs), 1)
        moved: dict[str, Any] = {}
        if epochs != self.epochs:
            for name, low, high in (("drops", 1, epochs - 1), ("checkpoints", 0, epochs)):
                places = {round(at * epochs / self.epochs) for at in getattr(self, name)}
                moved[name] = tuple(sorted(at for at in places if low <= at <= high))
        if "train_images" in given:
            for name in ("images", "spectrum_images"):
                size = getattr(self, name)
                moved[name] = size and min(size, given["train_images"])
        return dataclasses.replace(self, **{**moved, **given})

    def check_images(self, count: int) -> None:
        """Raise ValueError if the recipe asks for more than ``count`` training images."""
        used = count if self.train_images is None else self.train_images
        if used > count:
            raise InputError(f"train_images={used} is above the {count} training images there are")
        for name in ("images", "spectrum_images"):
            if (getattr(self, name) or 1) > used:
                raise InputError(
                    f"{name}={getattr(self, name)} is above the {used} images of the training"
                )


def _several(name: str, values: Any, *, empty: bool = False) -> tuple[Any, ...]:
    """``values`` if it is a tuple with at least one item, or with none if ``empty``."""
    if not isinstance(values, tuple) or not (values or empty):
        raise InputTypeError(f"{name} must be a tuple of numbers, got {values!r}")
    return values


PAPER = Recipe(  # Yao et al. 2020, section IV; analysis on all 50,000 training images
    name="paper",
    epochs=180,
    batch_size=128,
    lrs=(0.1, 0.05, 0.01, 0.005, 0.001),
    momentum=0.9,
    weight_decay=5e-4,
    drops=(80, 120),
    augment=True,
    checkpoints=tuple(range(0, 181, 20)),
    train_images=None,
    images=None,
    analysis_batch=128,
    spectrum_images=None,
    top=2,
    steps=100,
    trace_rtol=0.02,
    points=51,
    span=0.5,
    width=16,
    seeds=3,
)
RECIPES = {
    "laptop": PAPER.changed(
        name="laptop",
        epochs=20,
        batch_size=64,
        lrs=(0.1, 0.02),
        checkpoints=(0, 5, 10, 20),
        spectrum_images=512,
        steps=40,
        trace_rtol=0.05,
        points=15,
        seeds=2,
    ),
    "paper": PAPER,
}
