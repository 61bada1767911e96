"""Custom autograd functions that a loss applies: each is checked, and replaced if it is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import function as autograd

from fasthessian.errors import UnsupportedError
from fasthessian.operators.products.function_check import RIGHT, Verdict, judge
from fasthessian.operators.products.functions import Call, Function, Local, is_unwatched, unwatched
from fasthessian.operators.products.linear_cross_entropy import FORMULAS
from fasthessian.operators.torch_state.scopes import Scope, UndoLog, scope, set_attribute
from fasthessian.operators.torch_state.workarounds import functorch_level

KNOWN = (Tensor, nn.Parameter)  # other subclasses of tensors have rules of their own
OWN = "fasthessian."
BUILT_IN = re.compile(
    r"\w+Backward\d+|(struct )?torch::autograd::(AccumulateGrad|CopyBackwards|CopySlices)"
)
# Its second derivative is wrong in torch 2.13. Rewrites of layers avoid it where they can.
DISTRUSTED = ("WeightNormInterfaceBackward0",)

# Every application of a custom function passes through this class, even if the user holds its
# ``apply``. It is a private name of torch: if it is missing, no function is seen or checked.
_place: Any = getattr(autograd, "_SingleLevelFunction", None)


@dataclass
class _Kind:
    """The calls of one function with arguments of the same dtypes and flags."""

    calls: int = 0
    verdict: Verdict = RIGHT


class Functions:
    """The custom functions of one loss, and what was found of each.

    ``watching`` acts in all threads, as checkpointed layers run again in backward threads. The
    caller holds the lock of the process.
    """

    _open: list[Functions] = []  # noqa: RUF012

    def __init__(self) -> None:
        # torch.func.vmap makes a class for each call: none is held
        self._kinds: WeakKeyDictionary[Function, dict[Any, _Kind]] = WeakKeyDictionary()
        self._errors: dict[str, float] = {}  # of the second derivative, by function replaced
        self._learns = False

    def watching(self) -> Scope[None]:
        """Inside, functions are checked at their first calls, and replaced if they are wrong."""
        return _watching(self)

    def learning(self) -> Scope[None]:
        """Inside, more calls than the first of each kind are checked."""
        return set_attribute(self, "_learns", True)

    def verdict(self, function: Function, args: tuple[Any, ...]) -> Verdict:
        """The verdict on a call that is about to be made."""
        kind = self._kinds.setdefault(function, {}).setdefault(tuple(map(_kind, args)), _Kind())
        if not kind.calls or (self._learns and kind.verdict is RIGHT):
            calls = kind.calls + 1
            if not calls & (calls - 1):  # the 1st, 2nd, 4th, ...: a state may start at 0
                kind.verdict = judge(Call.of(function, args))
                if kind.verdict.treatment is not None:
                    name = function.__qualname__
                    known = self._errors.get(name, 0.0)
                    self._errors[name] = max(known, kind.verdict.treatment.error)
            kind.calls = calls  # last, so that an interrupted check is repeated
        return kind.verdict

    @property
    def met(self) -> bool:
        """Whether the loss applies custom functions."""
        return bool(self._kinds)

    def replaces(self, function: Function) -> bool:
        """Whether some call of the function is replaced."""
        return any(kind.verdict.treatment for kind in self._kinds.get(function, {}).values())

    def words(self) -> str:
        """For ``engine``, which functions were replaced."""
        return "".join(
            f"; second derivative of {name} by central differences, because its backward makes no "
            f"graph of it: relative error {error:.0e}"
            for name, error in self._errors.items()
        )

    def error(self) -> float:
        """The largest relative error of a replaced function; 0 if none was."""
        return max(self._errors.values(), default=0.0)

    def unchecked(self, loss: Tensor, functions: bool = False, beyond: Any = None) -> list[str]:
        """Names of the nodes between a loss and node ``beyond`` that no check has seen.

        With ``functions``, all custom functions count: torch.func differentiates them anew.

        Raises:
            RuntimeError: a function was checked, is wrong, and cannot be replaced.
        """
        found: dict[str, None] = dict.fromkeys(self._errors if functions else ())
        nodes: list[Any] = [loss.grad_fn]
        seen = {None, beyond}
        while nodes:
            node = nodes.pop()
            if node in seen:
                continue
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            function = getattr(type(node), "_forward_cls", None)
            if function is None:
                name = node.name()
                if not BUILT_IN.fullmatch(name) or name in DISTRUSTED:
                    found[name] = None
            elif not function.__module__.startswith(OWN):
                verdicts = [kind.verdict for kind in self._kinds.get(function, {}).values()]
                if any(verdict.wrong for verdict in verdicts):
                    raise UnsupportedError(wrong(function.__qualname__))
                if functions or not verdicts or any(verdict.unknown for verdict in verdicts):
                    found[function.__qualname__] = None
        return list(found)


@scope
def _watching(undo: UndoLog, functions: Functions) -> None:
    undo(_reopen, [*Functions._open])
    Functions._open.append(functions)
    if _place is not None:
        _place.apply = classmethod(_apply)


def _reopen(before: list[Functions]) -> None:
    if not before and "apply" in vars(_place or object):
        del _place.apply
    Functions._open[:] = before


def wrong(name: str) -> str:
    """The message that refuses a function."""
    return (
        f"the second derivative of {name} in the loss is wrong: its backward makes no graph of all "
        f"that it depends on; write its backward with differentiable operations, or use "
        f"engine='difference' with Hessian"
    )


def _kind(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.dtype, x.requires_grad
    return x if x is None or isinstance(x, (bool, str)) else type(x)


def _apply(cls: Function, *args: Any, **named: Any) -> Any:
    """Replaces ``apply`` of custom functions while a loss is watched."""
    normal = super(_place, cls).apply
    if named or is_unwatched() or cls.__module__.startswith(OWN):
        return normal(*args, **named)
    if not torch.is_grad_enabled():
        if Functions._open[-1].replaces(cls):
            args = tuple(x.clone() if isinstance(x, Tensor) else x for x in args)
        return normal(*args)
    inputs = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    simple = all(
        type(x) in KNOWN and x.is_floating_point() and x.layout is torch.strided for x in inputs
    )
    if not inputs or not simple or functorch_level() is not None:
        return normal(*args)
    if cls.__name__ in FORMULAS:
        return FORMULAS[cls.__name__](*args)
    watching = Functions._open[-1]
    with unwatched():
        how = watching.verdict(cls, args).treatment
    return normal(*args) if how is None else Local.apply(how, cls, *args)  # type: ignore[no-untyped-call]
