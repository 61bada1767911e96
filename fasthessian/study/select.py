"""The measurements of a study by network and statistics, in the order of figures and tables."""

from __future__ import annotations

import math
from typing import NamedTuple

from fasthessian.study.networks import VARIANTS, Network, Run
from fasthessian.study.records import Measurement, Study, Training

MODES = {"eval": "running statistics", "train": "batch statistics"}  # of batch normalisation


class Value(NamedTuple):
    """A measured number and its interval at 95 %."""

    value: float
    low: float
    high: float


def trace(found: Measurement) -> Value:
    """The trace of the Hessian."""
    return Value(found.trace, *found.trace_interval)


def top(found: Measurement) -> Value:
    """The largest eigenvalue; its interval is the residual."""
    value, residual = float(found.top[0]), float(found.residuals[0])
    return Value(value, value - residual, value + residual)


def stage(found: Measurement, name: str) -> Value:
    """The trace of one stage."""
    at = found.stages.index(name)
    parts = (found.stage_traces, found.stage_low, found.stage_high)
    return Value(*(float(part[at]) for part in parts))


def order(network: Network) -> tuple[int, int]:
    """The key by which networks are sorted: by depth, then as in ``VARIANTS``."""
    return network.depth, list(VARIANTS).index(network.variant)


class Selection:
    """What the kept trainings of a study found, by network.

    Attributes:
        study: where it comes from.
        trainings: the kept trainings of each network, by seed.
        networks: all that have a kept training, in order.
        depths: depths of the networks, ascending.
        variants: variants of the networks, in order.
        end: the last epoch that was measured anywhere; -1 if nothing was measured.
    """

    def __init__(self, study: Study):
        """Sort the trainings and measurements; those whose trace is not finite are left out."""
        self.study = study
        kept = sorted(study.kept(), key=lambda t: (order(t.run.network), t.seed))
        self.trainings: dict[Network, list[Training]] = {}
        for training in kept:
            self.trainings.setdefault(training.run.network, []).append(training)
        self.networks = tuple(self.trainings)
        self.depths = tuple(dict.fromkeys(network.depth for network in self.networks))
        present = {network.variant for network in self.networks}
        self.variants = tuple(variant for variant in VARIANTS if variant in present)
        self._found: dict[tuple[Run, str], list[Measurement]] = {}
        runs = {training.run for training in kept}
        for found in sorted(study.measurements, key=lambda m: m.epoch):
            if found.run in runs and math.isfinite(found.trace):
                self._found.setdefault((found.run, found.mode), []).append(found)
        self.end = max((rows[-1].epoch for rows in self._found.values()), default=-1)

    @property
    def modes(self) -> tuple[str, ...]:
        """The kinds of statistics that were measured, "eval" first."""
        return tuple(mode for mode in MODES if any(mode == key[1] for key in self._found))

    def paths(self, network: Network, mode: str) -> list[list[Measurement]]:
        """The measurements of each seed, by epoch.

        Without batch normalisation both kinds of statistics are the same: then "train" gives
        those of "eval".
        """
        mode = mode if network.has_batch_norm else "eval"
        runs = [training.run for training in self.trainings.get(network, [])]
        return [self._found[run, mode] for run in runs if (run, mode) in self._found]

    def by_epoch(self, network: Network, mode: str) -> dict[int, list[Measurement]]:
        """The measurements of all seeds at each epoch."""
        found: dict[int, list[Measurement]] = {}
        for path in self.paths(network, mode):
            for row in path:
                found.setdefault(row.epoch, []).append(row)
        return dict(sorted(found.items()))

    def last(self, network: Network, mode: str) -> list[Measurement]:
        """The measurements of all seeds at the last epoch of the study."""
        return self.by_epoch(network, mode).get(self.end, [])

    def training_of(self, found: Measurement) -> Training:
        """The training that a measurement belongs to."""
        rows = self.trainings[found.run.network]
        return next(training for training in rows if training.run == found.run)

    def statuses(self, network: Network) -> list[str]:
        """The status of each seed's training."""
        return [training.status for training in self.trainings.get(network, [])]
