"""The public API and the messages are those on record: a change of either shows in the diff."""

import sys
from pathlib import Path

import pytest

from tests.support.messages import messages
from tests.support.public_api import lines

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.version_info < (3, 11), reason="overloads are not kept before Python 3.11")
def test_the_public_api_is_the_one_on_record():
    """After a change that is meant: python tests/support/public_api.py > the file."""
    assert list(lines()) == (HERE / "public_api.txt").read_text().splitlines()


def test_the_messages_are_those_on_record():
    """After a change that is meant: python tests/support/messages.py > the file."""
    assert messages() == (HERE / "messages.txt").read_text().splitlines()
