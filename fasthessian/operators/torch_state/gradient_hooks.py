"""The user's hooks on gradients: suspended while an operator differentiates.

A hook that clips, masks or scales gradients would act in both differentiations of a product. The
result would be neither the Hessian of the loss nor the derivative of the gradient. Hooks act as
usual while the loss is evaluated: a model may differentiate inside, and read or change gradients.

* Hooks on parameters are in a dictionary of the tensor. ``suspended`` replaces its values.
* Hooks on activations and hooks of modules (of one, or of all) are wrapped when torch adds them to
  the graph, by replacements of torch's functions (``REPLACEMENTS``, installed by ``patches``).

Hooks that act after the accumulation into ``.grad`` need no care: ``torch.autograd.grad`` does not
run them.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fasthessian.operators.torch_state.scopes import UndoLog, scope, set_attribute

Hook = Callable[..., Any]


class HookSwitch:
    """Lets the hooks in the graphs of one operator act only while its loss is evaluated."""

    def __init__(self) -> None:
        self.evaluations = 0  # evaluations of the loss that are running
        self.found = False  # whether there is any hook

    def wrapped(self, hook: Hook) -> Hook:
        """The hook, which does nothing while the operator differentiates."""
        self.found = True

        def switched(*args: Any) -> Any:
            return hook(*args) if self.evaluations else None

        return switched


_thread = threading.local()  # .switches: those of the open scopes of this thread, innermost last


def _switch() -> HookSwitch | None:
    switches: list[HookSwitch] = getattr(_thread, "switches", [])
    return switches[-1] if switches else None


@scope
def suspended(undo: UndoLog, switch: HookSwitch, params: Sequence[Tensor]) -> None:
    """Suspend the hooks on ``params``, and those that this thread's forward passes add to graphs.

    The switch keeps control of the hooks in these graphs, even after the end of the scope. The
    parameters then have the hooks that they had before.
    """
    originals = [dict(p._backward_hooks or {}) for p in params]
    before = getattr(_thread, "switches", [])
    undo(_restore_hooks, params, originals)
    undo(setattr, _thread, "switches", before)
    _thread.switches = [*before, switch]
    for p, hooks in zip(params, originals, strict=True):
        for key, hook in hooks.items():
            p._backward_hooks[key] = switch.wrapped(hook)  # type: ignore[index]


def _restore_hooks(params: Sequence[Tensor], originals: Sequence[dict[int, Hook]]) -> None:
    for p, hooks in zip(params, originals, strict=True):
        if p._backward_hooks is not None:
            p._backward_hooks.clear()
            p._backward_hooks.update(hooks)


@scope
def active_hooks(undo: UndoLog) -> None:
    """Let hooks act, for an evaluation of the loss."""
    switch = _switch()
    if switch is not None:
        undo.enter(set_attribute(switch, "evaluations", switch.evaluations + 1))


_register_hook = Tensor.register_hook
_backward_hooks = nn.Module._get_backward_hooks
_backward_pre_hooks = nn.Module._get_backward_pre_hooks


@functools.wraps(_register_hook)
def _register_wrapped_hook(self: Tensor, hook: Hook) -> Any:
    switch = _switch()
    if switch is not None and not self.requires_grad:  # in forward mode: torch would refuse it
        return RemovableHandle(OrderedDict())
    return _register_hook(self, hook if switch is None else switch.wrapped(hook))  # type: ignore[no-untyped-call]


@functools.wraps(_backward_hooks)
def _wrapped_backward_hooks(self: nn.Module) -> tuple[list[Hook], list[Hook]]:
    switch, (full, others) = _switch(), _backward_hooks(self)  # type: ignore[no-untyped-call]
    if switch is None:
        return full, others
    return [switch.wrapped(hook) for hook in full], [switch.wrapped(hook) for hook in others]


@functools.wraps(_backward_pre_hooks)
def _wrapped_backward_pre_hooks(self: nn.Module) -> list[Hook]:
    switch, hooks = _switch(), _backward_pre_hooks(self)  # type: ignore[no-untyped-call]
    return hooks if switch is None else [switch.wrapped(hook) for hook in hooks]


REPLACEMENTS: list[tuple[Any, str, Any]] = [  # owner, name, function that replaces its attribute
    (torch.Tensor, "register_hook", _register_wrapped_hook),
    (nn.Module, "_get_backward_hooks", _wrapped_backward_hooks),
    (nn.Module, "_get_backward_pre_hooks", _wrapped_backward_pre_hooks),
]
