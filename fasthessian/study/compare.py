"""Comparisons between two networks of a study: at the end, at equal training loss, in accuracy.

Only trainings with the status "trained" enter: the curvature where a network diverged, or never
left its start, says nothing of a minimum.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fasthessian.study.intervals import (
    Difference,
    Group,
    Quantity,
    at_loss,
    common_loss,
    contrast,
    logarithms,
)
from fasthessian.study.networks import Network
from fasthessian.study.records import TRAINED, Measurement
from fasthessian.study.select import Selection


class AtLoss(NamedTuple):
    """The logarithm of a ratio at one training loss."""

    loss: float
    ratio: Difference


def base_of(network: Network) -> Network:
    """The ResNet of the same depth, from which a part was removed."""
    return Network(network.depth, "resnet")


def paths(selection: Selection, network: Network, mode: str) -> list[list[Measurement]]:
    """The measurements of each seed that trained, by epoch."""
    found = selection.paths(network, mode)
    return [path for path in found if selection.training_of(path[0]).status == TRAINED]


def at_end(selection: Selection, network: Network, mode: str) -> list[Measurement]:
    """The measurement of each seed that trained, at the last epoch of the study."""
    last = [path[-1] for path in paths(selection, network, mode)]
    return [row for row in last if row.epoch == selection.end and row.epoch > 0]


def ratio(
    selection: Selection, network: Network, base: Network, mode: str, quantity: Quantity
) -> Difference | None:
    """log(quantity of the network / quantity of the base) at the end; None if not measured."""
    groups = [logarithms(at_end(selection, n, mode), quantity) for n in (network, base)]
    return _difference(*groups)


def ratio_at_loss(
    selection: Selection, network: Network, base: Network, mode: str, quantity: Quantity
) -> AtLoss | None:
    """The same where both have the same training loss, the lowest that all their seeds reach."""
    both = [paths(selection, n, mode) for n in (network, base)]
    if not all(both):
        return None
    level = common_loss([path for group in both for path in group])
    if level is None:
        return None
    found = _difference(*(at_loss(group, level, quantity) for group in both))
    return None if found is None else AtLoss(level, found)


def accuracy(selection: Selection, network: Network) -> Group | None:
    """The last test accuracy of each seed that trained, in percent.

    Its seeds share the binomial error of the test images, as their number is in the settings. For
    two networks these errors count as independent; as both see the same images, that is too wide.
    """
    rows = [t for t in selection.trainings.get(network, []) if t.status == TRAINED]
    values = tuple(100 * float(t.test_accuracy[-1]) for t in rows if len(t.test_accuracy))
    if not values:
        return None
    mean = sum(values) / len(values)
    images = selection.study.settings.get("data", {}).get("test images", math.inf)
    return Group(values, (0.0,) * len(values), math.sqrt(mean * (100 - mean) / images))


def loss_of_accuracy(selection: Selection, network: Network) -> Difference | None:
    """Accuracy of the ResNet of the same depth less that of the network, in percentage points."""
    return _difference(accuracy(selection, base_of(network)), accuracy(selection, network))


def _difference(a: Group | None, b: Group | None) -> Difference | None:
    return None if a is None or b is None else contrast([(1, a), (-1, b)])
