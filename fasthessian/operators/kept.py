"""What an operator keeps between its products, as the algorithms deal with it."""

from __future__ import annotations

import contextlib
from typing import Any


class Kept:
    """What an operator keeps between its products; here nothing, as of a plain callable."""

    def changes(self, poll: bool = False) -> tuple[int, str]:
        """How often something that products depend on was found changed, and what changed last.

        Each product compares what it depends on with the product before. A deferred product, or
        one inside ``run``, compares only a part of the values; ``poll`` compares all of them now.
        """
        return 0, ""

    def run(self) -> contextlib.AbstractContextManager[None]:
        """Inside, products of this thread do not compare the values of the data."""
        return contextlib.nullcontext()

    def rebuild(self) -> str | None:
        """Drop the kept graphs: the next product builds them on its stream.

        Returns:
            Why a capture would still fail; None if it would not.
        """
        return None

    def held(self) -> tuple[Any, ...]:
        """What a captured product reads: it must live as long as the capture."""
        return ()
