"""Pools of gloo processes for the tests of this folder, started once."""

import pytest

from tests.support.ranks import Pool


@pytest.fixture(scope="session")
def pools():
    """By size; a pool that a test had to close is replaced for the next one."""
    made = {}
    yield made
    for pool in made.values():
        pool.close()


def ready(pools, size):
    if size not in pools or pools[size].closed:
        pools[size] = Pool(size)
    return pools[size]


@pytest.fixture
def two(pools):
    return ready(pools, 2)


@pytest.fixture
def four(pools):
    return ready(pools, 4)
