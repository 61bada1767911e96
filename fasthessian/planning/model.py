"""What a model takes of a rank's memory, and what its products cost, by the way it is wrapped."""

from __future__ import annotations

import dataclasses
import math

from fasthessian.planning.machines import Machine
from fasthessian.planning.steps import PARAMETERS, Collective

# plain: the whole model on every rank. unshard: fully_shard, all modules gathered for the run.
# regather: fully_shard, modules gathered again when a product needs them.
WRAPS = ("plain", "unshard", "regather")
# parameters gathered per product by regather: 1 to 1.75 times were measured (two ranks; MLP,
# LayerNorm, CNN and GPT); the largest is taken
GATHERS = {"plain": 0.0, "unshard": 0.0, "regather": 1.75}
LARGEST = 0.05  # the largest module as a part of the model, if nothing is said: assumed
FLOPS = 12  # per parameter and sample: 6 matrix products per layer, of 2 operations per entry
PER_GRADIENT = 2.3  # a product in gradients; 1.9 to 2.3 were measured (README)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on some ranks.

    Example:
        >>> model = Model(n=1000, ranks=4, wrap="regather")
        >>> model.device_bytes  # a quarter and the largest module; gradient and product
        9200
    """

    n: int  # parameters
    ranks: int = 1
    dtype: str = "float32"
    wrap: str = "plain"  # one of WRAPS
    largest: float = LARGEST  # module, as a part of the model
    activations: int = 0  # bytes: kept graphs and all else that the user adds

    @property
    def parameters_bytes(self) -> int:
        """Parameters on one rank: their shard, and what is gathered at one time."""
        whole = self.n * PARAMETERS[self.dtype]
        if self.wrap == "plain":
            return whole
        gathered = 1.0 if self.wrap == "unshard" else self.largest
        return -(-whole // self.ranks) + math.ceil(gathered * whole)

    @property
    def gradients_bytes(self) -> int:
        """The gradient that is kept with its graph, and a product before it is made a vector."""
        return 2 * self.n * PARAMETERS[self.dtype]

    @property
    def device_bytes(self) -> int:
        """All of it."""
        return self.parameters_bytes + self.gradients_bytes + self.activations

    @property
    def gathering(self) -> Collective:
        """One all-gather of the parameters; torch makes it module by module."""
        return Collective("all_gather", -(-self.n // self.ranks) * PARAMETERS[self.dtype])

    def gather_seconds(self, machine: Machine) -> float | None:
        """The gathers of one product, without the latency of each module."""
        times = GATHERS[self.wrap]
        if times == 0:
            return 0.0
        once = machine.seconds(self.gathering, self.ranks)
        return None if once is None else times * once

    def start_seconds(self, machine: Machine) -> float:
        """Gathers before the first product; 0 if not known."""
        if self.wrap != "unshard":
            return 0.0
        return machine.seconds(self.gathering, self.ranks) or 0.0


def seconds_of_flops(n: int, samples: int, rate: float) -> float:
    """One product by its floating-point operations: 12 n samples / rate, for matrix layers.

    A product of vectors with a kept graph multiplies by each layer's matrix six times (Pearlmutter
    1994, Fast exact multiplication by the Hessian; a gradient does it three times). ``samples``
    counts how often a parameter is applied on a rank: tokens for a language model.

    Example:
        >>> seconds_of_flops(10**9, 1000, 12e12)
        1.0
    """
    return FLOPS * n * samples / rate
