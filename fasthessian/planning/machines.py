"""What a rank of a machine offers: its memory and its rates.

The figures of named machines are those of public data sheets of NVIDIA, which are peaks: a GPU in
an HGX or DGX node of eight, with one network adapter per GPU (A100: 200 Gb/s, H100 and H200: 400
Gb/s). NVLink and PCI Express count one direction, half of what data sheets print.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from fasthessian.planning.steps import Collective

GB = 1e9
TFLOPS = 1e12
LATENCY = 5e-6  # seconds per collective and doubling of the ranks, if nothing is said: assumed
REACHED = 0.4  # of the peak rate of a data sheet that products reach: assumed


@dataclasses.dataclass(frozen=True)
class Machine:
    """One rank of a machine; bytes, seconds, and bytes per second. None: not known."""

    memory: float | None = None  # of the device
    host_memory: float | None = None
    memory_bandwidth: float | None = None
    bandwidth: float | None = None  # network, in one direction
    node_bandwidth: float | None = None  # to ranks of the same node, in one direction
    ranks_per_node: int | None = None
    latency: float = LATENCY
    host_bandwidth: float | None = None  # host to device
    disk_bandwidth: float | None = None  # of the file system, for all ranks together
    flops: Mapping[str, float] = dataclasses.field(default_factory=dict)  # peak by dtype
    gpu: bool = True
    about: str = ""  # what it is, if it has a name

    def rate(self, dtype: str) -> float | None:
        """FLOP/s that products reach: a part of the data sheet's peak; None if not known."""
        return REACHED * self.flops[dtype] if dtype in self.flops else None

    def sharing_node(self, ranks: int) -> int:
        """How many of the ranks are on one node."""
        return min(ranks, self.ranks_per_node or 1)

    def seconds(self, collective: Collective, ranks: int) -> float | None:
        """The time of one collective; None if a bandwidth is missing.

        ``latency * ceil(log2 P) + sent / bandwidth``. With g ranks per node and a bandwidth inside
        it, ring algorithms use all g network adapters of a node: of the bytes that a rank sends,
        the part (g-1)/g / ((P-1)/P) stays in the node, and the rest leaves it.
        """
        if ranks == 1:
            return 0.0
        latency = self.latency * math.ceil(math.log2(ranks))
        sent, g = collective.sent(ranks), self.sharing_node(ranks)
        inner = sent * ((g - 1) / g) / ((ranks - 1) / ranks)
        if self.node_bandwidth is None or g == 1:
            inner = 0.0
        total = latency + (inner / self.node_bandwidth if self.node_bandwidth else 0.0)
        if ranks == g and self.node_bandwidth is not None:
            return total
        return None if self.bandwidth is None else total + (sent - inner) / self.bandwidth


def data_sheet(
    about: str,
    memory: float,
    memory_bandwidth: float,
    link: float,
    network: float,
    pci: float,
    **flops: float,
) -> Machine:
    """A GPU of a data sheet, in GB, GB/s and TFLOP/s."""
    return Machine(
        memory=memory * GB,
        memory_bandwidth=memory_bandwidth * GB,
        bandwidth=network * GB,
        node_bandwidth=link * GB,
        ranks_per_node=8,
        host_bandwidth=pci * GB,
        about=about,
        flops={dtype: rate * TFLOPS for dtype, rate in flops.items()},
    )


# TFLOP/s: float64 and float32 without tensor cores, as torch computes by default; 16 bits with them
HOPPER = {"float64": 34, "float32": 67, "bfloat16": 989, "float16": 989}
AMPERE = {"float64": 9.7, "float32": 19.5, "bfloat16": 312, "float16": 312}
MACHINES = {
    "a100": data_sheet("A100 SXM 80 GB", 80, 2039, 300, 25, 32, **AMPERE),
    "h100": data_sheet("H100 SXM 80 GB", 80, 3350, 450, 50, 64, **HOPPER),
    "h200": data_sheet("H200 SXM 141 GB", 141, 4800, 450, 50, 64, **HOPPER),
}
