"""What a figure reads from a record, so that ``plots`` lies below ``records``."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Pairs(Protocol):
    """See ``Eigenpairs``."""

    @property
    def values(self) -> Tensor: ...
    @property
    def residuals(self) -> Tensor: ...
    @property
    def converged(self) -> bool: ...


class Mean(Protocol):
    """See ``Estimate``."""

    @property
    def value(self) -> float: ...
    @property
    def interval(self) -> tuple[float, float]: ...
    @property
    def confidence(self) -> float: ...
    @property
    def samples(self) -> Tensor: ...
    @property
    def converged(self) -> bool: ...


class Curve(Protocol):
    """See ``Density``."""

    @property
    def nodes(self) -> Tensor: ...
    @property
    def weights(self) -> Tensor: ...
    @property
    def grid(self) -> Tensor: ...
    @property
    def values(self) -> Tensor: ...
    @property
    def lower(self) -> Tensor: ...
    @property
    def upper(self) -> Tensor: ...
    @property
    def sigma(self) -> float: ...


class Blocks(Protocol):
    """See ``BlockSpectra``."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def values(self) -> Tensor: ...
    @property
    def residuals(self) -> Tensor: ...
    @property
    def traces(self) -> Tensor: ...
    @property
    def errors(self) -> Tensor: ...


class Losses(Protocol):
    """See ``Landscape``."""

    @property
    def alphas(self) -> Tensor: ...
    @property
    def betas(self) -> Tensor: ...
    @property
    def losses(self) -> Tensor: ...
    @property
    def trajectory(self) -> Tensor: ...
