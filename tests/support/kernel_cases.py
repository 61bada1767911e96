"""What the conformance suite of the kernels runs on: every backend, and random rows."""

import pytest
import torch

from tests.support.backends import ROWS

F16, F32, F64 = torch.float16, torch.float32, torch.float64


def marked(rows):
    """Rows as parameters, marked as slow or as those of a GPU."""
    for row in rows:
        marks = [pytest.mark.slow] * row.slow + [pytest.mark.gpu] * (row.device == "cuda")
        yield pytest.param(row, marks=marks)


each_backend = pytest.mark.parametrize("row", list(marked(ROWS)), ids=str)


def rows(k, n, dtype, seed, pad=0, device="cpu"):
    """Random rows; with ``pad`` they are a window of longer ones, off alignment."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(k, n + pad, generator=generator, dtype=F64).to(dtype).to(device)
    return buffer[:, pad // 2 : pad // 2 + n]
