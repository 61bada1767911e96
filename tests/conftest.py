"""Shared by all tests: figures without a display, and one thread unless a test asks for more.

Spinning OpenMP threads on a machine whose cores are busy cost minutes; the tests of threading set
their number themselves. Where there is no GPU, the Triton kernels run in Triton's interpreter.
"""

import os

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def pools():
    """Pools of gloo processes by size, each started at its first use."""
    made = {}
    yield made
    for pool in made.values():
        pool.close()


def ready(pools, size):
    """The pool of so many ranks; one that a test had to close is replaced."""
    from tests.support.ranks import Pool

    if size not in pools or pools[size].closed:
        pools[size] = Pool(size)
    return pools[size]


@pytest.fixture
def two(pools):
    return ready(pools, 2)


@pytest.fixture
def three(pools):
    return ready(pools, 3)


@pytest.fixture
def four(pools):
    return ready(pools, 4)
