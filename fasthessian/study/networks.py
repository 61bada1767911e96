"""The networks that are compared: ResNets of several depths, with parts left out."""

from __future__ import annotations

import dataclasses
from typing import Any

from fasthessian.errors import InputError
from fasthessian.study.resnet import STAGES, ResNet, resnet

# The arguments of ``resnet`` by the name of the variant, in the order of figures and tables.
VARIANTS: dict[str, dict[str, Any]] = {
    "resnet": {},
    "no-bn": {"batch_norm": False},
    "no-res": {"residual": False},
    **{f"no-bn-stage{stage}": {"no_bn_stages": (stage,)} for stage in STAGES},
    **{f"no-res-stage{stage}": {"no_res_stages": (stage,)} for stage in STAGES},
}


@dataclasses.dataclass(frozen=True, order=True)
class Network:
    """One architecture: a depth, such as 20, and a variant, a key of ``VARIANTS``.

    Raises:
        ValueError: the variant does not exist. ``make`` checks the depth.
    """

    depth: int
    variant: str = "resnet"

    def __post_init__(self) -> None:
        """Check the variant."""
        if self.variant not in VARIANTS:
            raise InputError(f"variant {self.variant!r} does not exist; use {', '.join(VARIANTS)}")

    @property
    def name(self) -> str:
        """The name in files and tables, such as "resnet20-no-bn"."""
        return f"resnet{self.depth}" + ("" if self.variant == "resnet" else f"-{self.variant}")

    @property
    def has_batch_norm(self) -> bool:
        """Whether the network has batch normalisation anywhere."""
        return bool(VARIANTS[self.variant].get("batch_norm", True))

    def make(self, classes: int, width: int = 16) -> ResNet:
        """A network with new weights, which torch's global generator draws."""
        return resnet(self.depth, num_classes=classes, width=width, **VARIANTS[self.variant])


@dataclasses.dataclass(frozen=True, order=True)
class Run:
    """One training: a network, the seed of its weights and batches, and its initial rate."""

    network: Network
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """The name of the run's folder, such as "resnet20-no-bn-seed0-lr0.1"."""
        return f"{self.network.name}-seed{self.seed}-lr{self.lr:g}"
