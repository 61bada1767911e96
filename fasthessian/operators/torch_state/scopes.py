"""Temporary changes that are undone at the end of a ``with`` block, after Ctrl-C at any line, too.

A usual context manager cannot promise that: an interrupt may come between the change and the
``try``, or inside ``__exit__``. The functions here use an undo log, as databases do:

* Each thread has a stack of steps. A step is a function call that undoes one change.
* A step is recorded before the change is made. So it must be right even if no change was made.
* A step is removed after it was called. So it must be right to call it twice.
* A scope remembers its position on the stack. At its end it calls and removes all steps above,
  the latest first.
* If an interrupt ends a scope too early, the enclosing scope calls the steps that are left.
  ``restored`` opens the outermost scope.

A new change is a function that first records and then acts::

    @scope
    def eval_mode(undo, module):
        undo(setattr, module, "training", module.training)
        module.training = False

    with eval_mode(model):
        ...
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

_thread = threading.local()  # .steps: the stack of this thread, the latest step last
# A private function of torch; None if this version of torch does not have it.
saving_hooks: Callable[[bool], Any] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)
_CALL = operator.methodcaller("__call__")  # calls a function without a line of Python
# How to close the managers of contextlib whose ``__exit__`` was interrupted, by the code of that.
_CLOSE: dict[Any, Callable[[Any], object]] = {
    contextlib._GeneratorContextManager.__exit__.__code__: lambda manager: manager.gen.close(),
    contextlib.closing.__exit__.__code__: lambda manager: manager.thing.close(),
    contextlib.ExitStack.__exit__.__code__: lambda manager: manager.close(),
}


class UndoLog:
    """Records how changes are undone: ``undo(function, *args)`` before each change."""

    def __init__(self) -> None:
        if not hasattr(_thread, "steps"):
            _thread.steps = []
        self._steps: list[Any] = _thread.steps
        self.after: list[Callable[[], None]] = []  # called after all is undone, unless it raised

    def __call__(self, function: Callable[..., object], *args: Any) -> None:
        """Call ``function(*args)`` at the end, once or more often."""
        self._steps.append((function, args))

    def enter(self, other: Scope[R]) -> R:
        """Enter another scope, which ends together with this one."""
        return other.__enter__()


class Scope(UndoLog, Generic[R]):
    """A context manager: ``change`` makes changes at the start, and the end undoes them."""

    def __init__(self, change: Callable[[UndoLog], R]) -> None:
        super().__init__()
        self._change = change
        self._depth = -1  # the position of this scope on the stack

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
                _close_interrupted(traceback)
        finally:
            self.close()
        if kind is None:
            for call in self.after:
                call()

    def close(self) -> None:
        """Undo everything that was recorded since the start, the latest first."""
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


def scope(change: Callable[Concatenate[UndoLog, P], R]) -> Callable[P, Scope[R]]:
    """Make a context manager of a function that records changes in ``undo`` and makes them."""

    @functools.wraps(change)
    def new_scope(*args: P.args, **named: P.kwargs) -> Scope[R]:
        return Scope(lambda undo: change(undo, *args, **named))

    return new_scope


def restored(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function: at its end all scopes inside it end, and torch's modes are restored."""

    @functools.wraps(function)
    def outermost(*args: P.args, **named: P.kwargs) -> R:
        modes = Scope(_modes)
        try:
            with modes:
                return function(*args, **named)
        finally:
            modes.close()

    return outermost


def _modes(undo: UndoLog) -> None:
    """Record the modes of torch, whose own context managers are not safe against interrupts."""
    undo(torch._C._set_grad_enabled, torch.is_grad_enabled())
    undo(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
    # The depth is read by one step up and one step down. Both are made in C, by ``map``, so that
    # no interrupt comes in between.
    undo(
        _set_autocast_nesting,
        max(map(_CALL, (torch.autocast_increment_nesting, torch.autocast_decrement_nesting))) - 1,
    )
    if saving_hooks is not None:
        undo(_pop_saving_hooks, saving_hooks, saving_hooks(True))


def _set_autocast_nesting(depth: int) -> None:
    """Set how many autocast contexts are open; at 0 torch drops its cache of cast weights."""
    while torch.autocast_decrement_nesting() >= depth:
        pass
    while torch.autocast_increment_nesting() < depth:
        pass
    if depth == 0:
        torch.clear_autocast_cache()


def _pop_saving_hooks(latest: Callable[[bool], Any], before: Any) -> None:
    """Remove the hooks on saved tensors that were added after ``before``."""
    while (now := latest(True)) is not None and not _same(now, before):
        torch._C._autograd._pop_saved_tensors_default_hooks()


def _same(hooks: Any, others: Any) -> bool:
    return others is not None and all(a is b for a, b in zip(hooks, others, strict=True))


@scope
def saved_tensors(undo: UndoLog, pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> None:
    """Inside this scope, graphs keep ``pack(t)`` instead of a tensor t that they save."""
    pushed: list[bool] = []

    def pop() -> None:
        if pushed:
            pushed.clear()
            torch._C._autograd._pop_saved_tensors_default_hooks()

    undo(pop)
    torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
    pushed.append(True)


@scope
def no_inference_mode(undo: UndoLog) -> None:
    """Leave inference mode, if the caller is in it: new tensors can be used by autograd."""
    if torch.is_inference_mode_enabled():
        guard: Any = torch._C._InferenceMode(False)
        undo(guard.__exit__, None, None, None)
        guard.__enter__()


@scope
def set_attribute(undo: UndoLog, owner: Any, name: str, value: Any) -> None:
    """Give an attribute another value."""
    undo(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def restore_dict(changed: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Give a dictionary the entries that it had before."""
    changed.clear()
    changed.update(before)


@scope
def grad_mode(undo: UndoLog, enabled: bool) -> None:
    """Record gradients, or do not."""
    undo(torch._C._set_grad_enabled, torch.is_grad_enabled())
    torch._C._set_grad_enabled(enabled)


def _close_interrupted(traceback: TracebackType) -> None:
    """Close managers whose exit was interrupted.

    Otherwise the garbage collector closes them at an unknown later time.
    """
    frames = []
    entry: TracebackType | None = traceback
    while entry is not None:
        frames.append(entry.tb_frame)
        entry = entry.tb_next
    for frame in reversed(frames):
        close = _CLOSE.get(frame.f_code)
        if close is not None:
            close(frame.f_locals["self"])
