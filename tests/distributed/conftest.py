"""Pools of gloo processes for the tests of this folder, started once."""

import pytest

from tests.support.ranks import pool


@pytest.fixture(scope="session")
def two():
    yield from pool(2)


@pytest.fixture(scope="session")
def four():
    yield from pool(4)
