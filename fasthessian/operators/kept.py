"""The interface between the algorithms and what an operator keeps between its products."""

from __future__ import annotations

import contextlib
from typing import Any


class Kept:
    """What an operator keeps between its products. An operator from a callable keeps nothing."""

    def changes(self, poll: bool = False) -> tuple[int, str]:
        """How many changes were found in what products depend on, and what changed last.

        Each product compares the state that it depends on with that of the previous product. A
        deferred product, or one inside ``run``, compares only some values; ``poll`` compares all
        values now.
        """
        return 0, ""

    @property
    def running(self) -> bool:
        """Whether this thread is inside ``run``."""
        return False

    def run(self) -> contextlib.AbstractContextManager[None]:
        """Inside this context, products of this thread do not compare the values of the data."""
        return contextlib.nullcontext()

    def rebuild(self) -> str | None:
        """Drop the kept graphs: the next product builds them on its stream.

        Returns:
            Why a capture would still fail; None if it would succeed.
        """
        return None

    def held(self) -> tuple[Any, ...]:
        """The objects that a captured product reads. They must live as long as the capture."""
        return ()
