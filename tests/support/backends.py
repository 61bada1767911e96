"""The rows of the conformance suite: every backend that can be run here, real or simulated.

On a machine with an NVIDIA GPU: reference and native on the CPU, and native, triton and reference
on the GPU. Without one: reference, native, the CUDA kernels on the CPU simulator, and the Triton
kernels in its interpreter.
"""

import dataclasses
import functools
import os
from types import ModuleType

import torch

from fasthessian import kernels


@dataclasses.dataclass(frozen=True)
class Row:
    """A backend on a device; ``slow`` ones (simulated) are asked for small sizes only."""

    name: str
    device: str = "cpu"
    slow: bool = False

    def module(self) -> ModuleType:
        """The backend module, built or imported at first use."""
        if self.name == "cuda-simulated":
            return _simulated()
        return kernels.BACKENDS[self.name.removesuffix("-interpreted")]

    def __str__(self) -> str:
        """The test id."""
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"


@functools.cache
def _simulated() -> ModuleType:
    from tests.support.simulated import load

    return load()


def _rows() -> list[Row]:
    rows = [Row("reference")]
    if kernels.native.unavailable("cpu") is None:
        rows.append(Row("native"))
    if torch.cuda.is_available():
        for name in ("reference", "native", "triton"):
            if kernels.BACKENDS[name].unavailable("cuda") is None:
                rows.append(Row(name, "cuda"))
    else:
        rows.append(Row("cuda-simulated", slow=True))
        if kernels.BACKENDS["triton"].unavailable("cpu") is None:
            rows.append(Row("triton-interpreted", slow=True))
    if "FASTHESSIAN_TEST_ROWS" not in os.environ:
        return rows
    served = {str(row): row for row in rows}
    only = os.environ["FASTHESSIAN_TEST_ROWS"].split(",")
    if missing := set(only) - set(served):  # else a run that tests nothing would pass
        raise ValueError(
            f"FASTHESSIAN_TEST_ROWS names {', '.join(sorted(missing))}, which cannot serve here; "
            f"these can: {', '.join(served)}"
        )
    return [served[name] for name in served if name in only]


ROWS = _rows()
