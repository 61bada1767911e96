"""What serves on this machine: kernels, and several ranks."""

from __future__ import annotations

import platform

import torch

from fasthessian import kernels
from fasthessian.distributed.report import report


def doctor() -> str:
    """Report which backends can serve each device here, and why the others cannot.

    Then what torch.distributed offers here, how this process was started, and what would hinder a
    run over several ranks. Ranks that differ in their versions are found when a run starts.

    Example:
        >>> import fasthessian as fh
        >>> "reference" in fh.doctor()
        True
    """
    first = (
        f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, "
        f"CUDA {'available' if torch.cuda.is_available() else 'not available'}"
    )
    ranks = [f"{'ranks':<10} {line}" for line in report()]
    return "\n".join([first, *kernels.report(), *ranks])
