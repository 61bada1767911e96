"""Public API, messages and counts are recorded in files, so that a diff shows their changes."""

import sys
from pathlib import Path

import pytest

import fasthessian as fh
from fasthessian.kernels import native
from fasthessian.krylov.space import Space
from tests.support.counts import count_lines, each
from tests.support.messages import messages
from tests.support.public_api import lines
from tests.support.spectra import F32, diagonal, outliers

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.version_info < (3, 11), reason="overloads are not kept before Python 3.11")
def test_the_public_api_is_the_recorded_one():
    """After an intended change: python tests/support/public_api.py > the file."""
    assert list(lines()) == (HERE / "public_api.txt").read_text().splitlines()


def test_the_messages_are_the_recorded_ones():
    """After an intended change: python tests/support/messages.py > the file."""
    assert messages() == (HERE / "messages.txt").read_text().splitlines()


@pytest.mark.skipif(native.unavailable() is not None, reason="counts are those of our kernels")
def test_no_run_costs_more_calls_allocations_or_bytes_than_recorded():
    """After an intended change, or an update of torch: python tests/support/counts.py > the file.

    Less than recorded fails as well: the gain is to be recorded.
    """
    assert count_lines() == (HERE / "counts.txt").read_text().splitlines()


@pytest.mark.skipif(native.unavailable() is not None, reason="counts are those of our kernels")
def test_a_call_more_in_each_step_is_counted(monkeypatch):
    def step():
        return each(lambda m: fh.density(A, steps=m), 20, 40)

    A = diagonal(outliers(), F32)
    before, dots = step(), Space.dots

    def with_a_copy(self, V, W, H=None, *, count=None):
        W.clone()
        return dots(self, V, W, H, count=count)

    assert step() == before
    monkeypatch.setattr(Space, "dots", with_a_copy)
    after = step()
    assert after.calls == before.calls + 2 and after.allocations == before.allocations + 2
    assert after.kernels == before.kernels
