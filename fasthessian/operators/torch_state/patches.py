"""Functions of torch, replaced while a product is computed.

Three modules have lists of replacements: ``layer_rewrites`` (second derivatives that cost less),
``workarounds`` (second derivatives that are missing or wrong in torch) and ``gradient_hooks``
(hooks that an operator can suspend). Users' modules call torch's functions by name, so the names
are replaced::

    with patched():
        loss = model(x).sum()  # F.conv2d is now layer_rewrites' convolution
"""

from __future__ import annotations

import threading
from typing import Any

from fasthessian.operators.torch_state import gradient_hooks, layer_rewrites, workarounds
from fasthessian.operators.torch_state.scopes import UndoLog, scope

REPLACEMENTS: list[tuple[Any, str, Any]] = [  # owner, name, function that replaces its attribute
    *layer_rewrites.REPLACEMENTS,
    *workarounds.REPLACEMENTS,
    *gradient_hooks.REPLACEMENTS,
]


class Patches:
    """A context manager that replaces the functions, in all threads.

    All threads, because checkpointed layers run again in the threads of a backward pass, and must
    do there what they did before. If several contexts are open, the last one restores the
    functions. ``__exit__`` may be called twice, or after an ``__enter__`` that was interrupted.
    """

    _lock = threading.Lock()
    _users: set[Patches] = set()  # noqa: RUF012  the open contexts
    _originals: list[Any] = []  # noqa: RUF012  what was found, which may be others' replacements

    def __enter__(self) -> None:
        with Patches._lock:
            if not Patches._users:
                Patches._originals = [getattr(owner, name) for owner, name, _ in REPLACEMENTS]
            Patches._users.add(self)
            for owner, name, replacement in REPLACEMENTS:
                setattr(owner, name, replacement)

    def __exit__(self, *exception: object) -> None:
        layer_rewrites.forget_convolution()
        with Patches._lock:
            Patches._users.discard(self)
            if not Patches._users:
                for (owner, name, _), original in zip(
                    REPLACEMENTS, Patches._originals, strict=True
                ):
                    setattr(owner, name, original)


@scope
def patched(undo: UndoLog) -> None:
    """Replace the functions; safe against interrupts, see ``scopes``."""
    patches = Patches()
    undo(patches.__exit__)
    patches.__enter__()
