"""The public API and the messages are recorded in files, so that a diff shows their changes."""

import sys
from pathlib import Path

import pytest

from tests.support.messages import messages
from tests.support.public_api import lines

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.version_info < (3, 11), reason="overloads are not kept before Python 3.11")
def test_the_public_api_is_the_recorded_one():
    """After an intended change: python tests/support/public_api.py > the file."""
    assert list(lines()) == (HERE / "public_api.txt").read_text().splitlines()


def test_the_messages_are_the_recorded_ones():
    """After an intended change: python tests/support/messages.py > the file."""
    assert messages() == (HERE / "messages.txt").read_text().splitlines()
