"""Networks and numbers in words, the same in figures, tables and claims."""

from __future__ import annotations

import math

from fasthessian.study.networks import Network

LABELS = {
    "resnet": "ResNet",
    "no-bn": "no BN",
    "no-res": "no residual",
    **{f"no-bn-stage{stage}": f"no BN in stage {stage}" for stage in (1, 2, 3)},
    **{f"no-res-stage{stage}": f"no residual in stage {stage}" for stage in (1, 2, 3)},
}


def name_of(network: Network) -> str:
    """The network as it is called in figures and tables, such as "ResNet-20, no BN"."""
    name = f"ResNet-{network.depth}"
    return name if network.variant == "resnet" else f"{name}, {LABELS[network.variant]}"


def number(x: float) -> str:
    """Three significant digits, without an exponent from 0.001 to a million.

    Example:
        >>> number(1234.5), number(0.01234), number(1.2e9)
        ('1230', '0.0123', '1.20e+09')
    """
    if not math.isfinite(x) or x == 0:
        return "0" if x == 0 else "not finite"
    size = math.floor(math.log10(float(f"{abs(x):.2e}")))
    if not -3 <= size < 6:
        return f"{x:.2e}"
    return f"{round(x, 2 - size):.{max(2 - size, 0)}f}"


def interval(low: float, high: float) -> str:
    """An interval in brackets."""
    return f"[{number(low)}, {number(high)}]"
