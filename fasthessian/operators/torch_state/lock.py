"""The lock of the process: products of several threads are computed one after another.

A product changes what belongs to the whole process (torch's switches, random generators, functions
that are replaced) and to the model (buffers, training flags). So only one thread at a time may
compute a product.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable

from fasthessian.operators.torch_state.scopes import P, R, restored

_lock = threading.RLock()


def process_lock() -> threading.RLock:
    """The lock: whoever changes global state, or the state of an operator, holds it."""
    return _lock


def _replace_lock() -> None:
    """Make a new lock in a forked process: the thread that holds the old one is not there."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_replace_lock)


def exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function: it holds the lock of the process, and is ``restored``."""

    @functools.wraps(function)
    def locked(*args: P.args, **named: P.kwargs) -> R:
        with process_lock():
            return function(*args, **named)

    return restored(locked)
