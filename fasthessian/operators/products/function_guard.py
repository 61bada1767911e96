"""Custom autograd functions of a loss: each is checked, and replaced if it is wrong."""

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

KNOWN = (Tensor, nn.Parameter)  # other subclasses of tensors may define their own rules
OWN = "fasthessian."
BUILT_IN = re.compile(
    r"\w+Backward\d+|(struct )?torch::autograd::(AccumulateGrad|CopyBackwards|CopySlices)"
)
# Its second derivative is wrong in torch 2.13. The layer rewrites avoid it if they can.
DISTRUSTED = ("WeightNormInterfaceBackward0",)

# Every call of a custom function goes through ``apply`` of this class, even if the user has stored
# the function's ``apply``. The name is private to torch. Without it, no function is checked.
_base_class: Any = getattr(autograd, "_SingleLevelFunction", None)


@dataclass
class _Kind:
    """The calls of one function with arguments of the same dtypes and flags."""

    calls: int = 0
    verdict: Verdict = RIGHT


class Functions:
    """The custom functions of one loss, and their verdicts.

    ``watching`` acts in all threads, because checkpointed layers run again in backward threads. The
    caller holds the lock of the process.
    """

    _open: list[Functions] = []  # noqa: RUF012

    def __init__(self) -> None:
        # torch.func.vmap makes a class per call, so references are weak
        self._kinds: WeakKeyDictionary[Function, dict[Any, _Kind]] = WeakKeyDictionary()
        self._errors: dict[str, float] = {}  # replaced function -> error of its second derivative
        self._checks_more = False

    def watching(self) -> Scope[None]:
        """Inside this scope, functions are checked at their first call, and replaced if wrong."""
        return _watching(self)

    def checking_more(self) -> Scope[None]:
        """Inside this scope, some later calls of each kind are checked too."""
        return set_attribute(self, "_checks_more", True)

    def verdict(self, function: Function, args: tuple[Any, ...]) -> Verdict:
        """The verdict on a call that is about to be made."""
        kind = self._kinds.setdefault(function, {}).setdefault(tuple(map(_kind, args)), _Kind())
        if not kind.calls or (self._checks_more and kind.verdict is RIGHT):
            calls = kind.calls + 1
            if not calls & (calls - 1):  # the 1st, 2nd, 4th, ... call: first inputs may be 0
                kind.verdict = judge(Call.of(function, args))
                if kind.verdict.treatment is not None:
                    name = function.__qualname__
                    known = self._errors.get(name, 0.0)
                    self._errors[name] = max(known, kind.verdict.treatment.error)
            kind.calls = calls  # last, so that an interrupted check is repeated
        return kind.verdict

    @property
    def found(self) -> bool:
        """Whether a custom function was found in the loss."""
        return bool(self._kinds)

    def replaces(self, function: Function) -> bool:
        """Whether some call of the function is replaced."""
        return any(kind.verdict.treatment for kind in self._kinds.get(function, {}).values())

    def note(self) -> str:
        """Text for ``engine`` that names the replaced functions."""
        return "".join(
            f"; second derivative of {name} by central differences, because its backward makes no "
            f"graph of it: relative error {error:.0e}"
            for name, error in self._errors.items()
        )

    def error(self) -> float:
        """The largest relative error of a replaced function; 0 if none was."""
        return max(self._errors.values(), default=0.0)

    def unchecked(self, loss: Tensor, functions: bool = False, beyond: Any = None) -> list[str]:
        """Names of the unchecked nodes between a loss and the node ``beyond``.

        With ``functions``, all custom functions count, because torch.func differentiates them
        again.

        Raises:
            RuntimeError: a checked function is wrong and cannot be replaced.
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
    undo(_stop_watching, [*Functions._open])
    Functions._open.append(functions)
    if _base_class is not None:
        _base_class.apply = classmethod(_apply)


def _stop_watching(before: list[Functions]) -> None:
    if not before and "apply" in vars(_base_class or object):
        del _base_class.apply
    Functions._open[:] = before


def wrong(name: str) -> str:
    """The message for a function that is wrong and cannot be replaced."""
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
    """The replacement of ``apply`` of custom functions while a loss is watched."""
    normal = super(_base_class, cls).apply
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
