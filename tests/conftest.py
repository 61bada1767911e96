"""Shared by all tests: figures without a display, and one thread unless a test asks for more.

Spinning OpenMP threads on a machine whose cores are busy cost minutes; the tests of threading set
their number themselves. Where there is no GPU, the Triton kernels run in Triton's interpreter.
"""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
