"""Changes that are put back at the end of a ``with`` block, also after a Ctrl-C at any line.

A thread keeps a stack of the steps that put back what it changed. A step is recorded before the
change, may be repeated, and is removed after it was made. If an interrupt ends a scope too early,
the enclosing scope makes the steps that are left. ``restored`` is the outermost one.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_thread = threading.local()  # .steps: of this thread, the latest last
# Private names of torch; where one is missing nothing is recorded.
saving_hooks: Callable[[bool], Any] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)
_CALL = operator.methodcaller("__call__")
# Managers of contextlib whose ``__exit__`` may be interrupted before it does anything.
_UNFINISHED: dict[Any, Callable[[Any], object]] = {
    contextlib._GeneratorContextManager.__exit__.__code__: lambda manager: manager.gen.close(),
    contextlib.closing.__exit__.__code__: lambda manager: manager.thing.close(),
    contextlib.ExitStack.__exit__.__code__: lambda manager: manager.close(),
}


class Undo:
    """Records how changes are put back: ``undo(function, *args)`` before each change."""

    def __init__(self) -> None:
        if not hasattr(_thread, "steps"):
            _thread.steps = []
        self._steps: list[Any] = _thread.steps
        self.after: list[Callable[[], None]] = []  # called when all is put back, if no error flies

    def __call__(self, function: Callable[..., object], *args: Any) -> None:
        """At the end call ``function(*args)``, at least once."""
        self._steps.append((function, args))

    def enter(self, other: Scope[R]) -> R:
        """Enter a scope, which ends with this one."""
        return other.__enter__()


class Scope(Undo, Generic[R]):
    """The span of some changes, a context manager; ``change`` makes them."""

    def __init__(self, change: Callable[[Undo], R]) -> None:
        super().__init__()
        self._change = change
        self._depth = -1  # the place of this scope on the stack

    def __enter__(self) -> R:
        self._depth = len(self._steps)
        self._steps.append(self)
        try:
            return self._change(self)
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        try:
            if traceback is not None:
                _finish(traceback)
        finally:
            self.close()
        if kind is None:
            for call in self.after:
                call()

    def close(self) -> None:
        """Put everything back that was changed since the beginning, the latest first."""
        steps, depth, failed = self._steps, self._depth, None
        while 0 <= depth < len(steps) and steps[depth] is self:
            step = steps[-1]
            if not isinstance(step, Scope):
                try:
                    step[0](*step[1])
                except Exception as error:
                    failed = failed or error
            steps.pop()
        if failed is not None:
            raise failed


def scope(change: Callable[Concatenate[Undo, P], R]) -> Callable[P, Scope[R]]:
    """A context manager from a function that records (``undo``) and then makes changes."""

    @functools.wraps(change)
    def made(*args: P.args, **named: P.kwargs) -> Scope[R]:
        return Scope(lambda undo: change(undo, *args, **named))

    return made


def restored(function: Callable[P, R]) -> Callable[P, R]:
    """The function, after which all scopes inside, and this thread's modes, are put back."""

    @functools.wraps(function)
    def outermost(*args: P.args, **named: P.kwargs) -> R:
        modes = Scope(_modes)
        try:
            with modes:
                return function(*args, **named)
        finally:
            modes.close()

    return outermost


def _modes(undo: Undo) -> None:
    """What contexts of torch set, which an interrupt inside torch may leave."""
    undo(torch._C._set_grad_enabled, torch.is_grad_enabled())
    undo(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
    # up and down at once, in C: no interrupt comes in between
    undo(
        _nest,
        max(map(_CALL, (torch.autocast_increment_nesting, torch.autocast_decrement_nesting))) - 1,
    )
    if saving_hooks is not None:
        undo(_unhook, saving_hooks, saving_hooks(True))


def _nest(depth: int) -> None:
    """Set how many autocast contexts are open: torch drops its copies of weights after the last."""
    while torch.autocast_decrement_nesting() >= depth:
        pass
    while torch.autocast_increment_nesting() < depth:
        pass
    if depth == 0:
        torch.clear_autocast_cache()


def _unhook(latest: Callable[[bool], Any], before: Any) -> None:
    while (now := latest(True)) is not None and not _same(now, before):
        torch._C._autograd._pop_saved_tensors_default_hooks()


def _same(hooks: Any, others: Any) -> bool:
    return others is not None and all(a is b for a, b in zip(hooks, others, strict=True))


@scope
def ordinary(undo: Undo) -> None:
    """Inside, new tensors are ordinary ones, also for callers in inference mode."""
    if torch.is_inference_mode_enabled():
        guard: Any = torch._C._InferenceMode(False)
        undo(guard.__exit__, None, None, None)
        guard.__enter__()


@scope
def set_to(undo: Undo, owner: Any, name: str, value: Any) -> None:
    """Inside, the attribute has this value."""
    undo(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def put_table(table: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Give a dictionary the entries that it had before."""
    table.clear()
    table.update(before)


@scope
def grad_mode(undo: Undo, enabled: bool) -> None:
    """Inside, gradients are recorded or not."""
    undo(torch._C._set_grad_enabled, torch.is_grad_enabled())
    torch._C._set_grad_enabled(enabled)


def _finish(traceback: TracebackType) -> None:
    """Close managers whose exit was interrupted: else that happens at any later time."""
    frames = []
    step: TracebackType | None = traceback
    while step is not None:
        frames.append(step.tb_frame)
        step = step.tb_next
    for frame in reversed(frames):
        close = _UNFINISHED.get(frame.f_code)
        if close is not None:
            close(frame.f_locals["self"])
