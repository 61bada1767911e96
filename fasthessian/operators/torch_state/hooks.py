"""Hooks on gradients, which do not act while an operator differentiates.

A hook that clips, masks or scales gradients acts in both differentiations of a product, whose
result is then neither the Hessian of the loss nor the derivative of the gradient. Hooks act as
usual while the loss is computed: a model may differentiate inside, and read or change gradients.

* Hooks on parameters are in a dictionary of the tensor, whose values are replaced for a pass.
* Hooks that the forward pass puts on activations, and those of modules (of a single one and of all)
  are wrapped where torch adds them to the graph (``PLACES``, replaced by ``rewrite.Rewrite``).

Hooks after accumulation are not run by ``torch.autograd.grad``.
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

from fasthessian.operators.torch_state.scopes import Undo, scope, set_to

Hook = Callable[..., Any]


class Lift:
    """Which hooks of one operator's graphs act: none but while its loss is computed."""

    def __init__(self) -> None:
        self.computing = 0  # evaluations of the loss that are running
        self.met = False  # whether there is any hook

    def wrapped(self, hook: Hook) -> Hook:
        """The hook, which changes nothing while products are made."""
        self.met = True

        def lifted(*args: Any) -> Any:
            return hook(*args) if self.computing else None

        return lifted


_open = threading.local()  # .lifts: of the passes of this thread, the innermost last


def _lift() -> Lift | None:
    lifts: list[Lift] = getattr(_open, "lifts", [])
    return lifts[-1] if lifts else None


@scope
def lifted(undo: Undo, lift: Lift, params: Sequence[Tensor]) -> None:
    """Inside, hooks of this thread's forward passes, and those on ``params``, are lifted.

    At the end the parameters have the hooks that they had before.
    """
    held = [dict(p._backward_hooks or {}) for p in params]
    before = getattr(_open, "lifts", [])
    undo(_put_hooks, params, held)
    undo(setattr, _open, "lifts", before)
    _open.lifts = [*before, lift]
    for p, hooks in zip(params, held, strict=True):
        for key, hook in hooks.items():
            p._backward_hooks[key] = lift.wrapped(hook)  # type: ignore[index]


def _put_hooks(params: Sequence[Tensor], held: Sequence[dict[int, Hook]]) -> None:
    for p, hooks in zip(params, held, strict=True):
        if p._backward_hooks is not None:
            p._backward_hooks.clear()
            p._backward_hooks.update(hooks)


@scope
def acting(undo: Undo) -> None:
    """Inside, where the loss is computed, hooks act."""
    lift = _lift()
    if lift is not None:
        undo.enter(set_to(lift, "computing", lift.computing + 1))


_register_hook = Tensor.register_hook
_backward_hooks = nn.Module._get_backward_hooks
_backward_pre_hooks = nn.Module._get_backward_pre_hooks


@functools.wraps(_register_hook)
def _registered(self: Tensor, hook: Hook) -> Any:
    lift = _lift()
    if lift is not None and not self.requires_grad:  # as in forward mode: it would not be called
        return RemovableHandle(OrderedDict())
    return _register_hook(self, hook if lift is None else lift.wrapped(hook))  # type: ignore[no-untyped-call]


@functools.wraps(_backward_hooks)
def _of_module(self: nn.Module) -> tuple[list[Hook], list[Hook]]:
    lift, (full, others) = _lift(), _backward_hooks(self)  # type: ignore[no-untyped-call]
    if lift is None:
        return full, others
    return [lift.wrapped(hook) for hook in full], [lift.wrapped(hook) for hook in others]


@functools.wraps(_backward_pre_hooks)
def _before_module(self: nn.Module) -> list[Hook]:
    lift, hooks = _lift(), _backward_pre_hooks(self)  # type: ignore[no-untyped-call]
    return hooks if lift is None else [lift.wrapped(hook) for hook in hooks]


# (where, name, what was there, what is put there)
PLACES = [
    (torch.Tensor, "register_hook", _register_hook, _registered),
    (nn.Module, "_get_backward_hooks", _backward_hooks, _of_module),
    (nn.Module, "_get_backward_pre_hooks", _backward_pre_hooks, _before_module),
]
