"""A loss given by a function without arguments: a closure, for losses without batches."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from fasthessian.errors import InputTypeError
from fasthessian.operators.loss.calls import scalar
from fasthessian.operators.loss.coupling import Coupling
from fasthessian.operators.loss.part import Part
from fasthessian.operators.torch_state.gathered import WHOLE
from fasthessian.operators.torch_state.gradient_hooks import active_hooks
from fasthessian.operators.torch_state.module_state import (
    Buffers,
    Copies,
    copy_buffers,
    restore_buffers,
)
from fasthessian.operators.torch_state.random_state import seeded
from fasthessian.operators.torch_state.reachable import OTHER, POINT, Entry, reachable
from fasthessian.operators.torch_state.scopes import Scope, UndoLog, set_attribute


class ClosureLoss:
    """The loss of a closure: a single part. With several ranks it counts as ``terms`` terms.

    The closure does not say which modules it calls. A global hook finds them while it runs. As the
    modules of a model do, they work on copies of their buffers. The gradients in ``.grad`` are
    restored too, since the closure of an optimizer clears them.
    """

    origin = "closure"
    freed_graph_advice = (
        "closure frees its graph, by backward() or by a derivative inside without "
        "create_graph=True; pass one that only returns the loss (for an optimizer's closure: "
        "without zero_grad() and backward())"
    )
    model = None
    gathered = WHOLE
    fixed_order = True
    size = count = samples = 1
    note = ""
    counted = True
    terms_vary = False
    way_to_count = ""

    def __init__(
        self, closure: Callable[[], Tensor], params: dict[str, Tensor], terms: float = 1.0
    ) -> None:
        if not callable(closure):
            raise InputTypeError(f"closure must be callable, got {type(closure).__name__}")
        self._closure, self._params = closure, params
        self.terms_here, self._weight, self._position = terms, 1.0, 0
        self.roots: list[nn.Module] = []
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # called so far
        found = (tensor for _, tensor, _ in self.entries(True) if isinstance(tensor, Tensor))
        self._leaves = [weakref.ref(t) for t in found if t.is_leaf and t.requires_grad]
        self._scopes: list[tuple[Buffers, Copies]] = []  # of the open ``_own_buffers``

    def survey(self) -> None:
        """Do nothing: there are no batches to count."""

    def count_terms(self, params: Sequence[Tensor], allowed: float) -> None:
        """Do nothing: there is nothing to count."""

    def set_share(self, terms: float, parts: int = 0, samples: int = 0) -> None:
        """See ``Loss``."""
        self._weight, self._position = self.terms_here / terms, parts

    def totals(self, ways: Sequence[str]) -> list[float]:
        """Nothing: a closure counts no terms."""
        return [math.nan] * len(ways)

    def coupling(self, params: Sequence[Tensor], allowed: float) -> Coupling:
        """That it does not apply."""
        return Coupling(math.nan, -1, "a closure has no batches")

    def entries(self, whole: bool) -> Iterator[Entry]:
        """The tensors given as ``params``, and if ``whole`` what the closure can reach."""
        for name, tensor in self._params.items():
            yield f"parameter {name!r}", tensor, POINT
        if whole:
            seen = {id(tensor) for tensor in self._params.values()}
            yield from reachable("closure", self._closure, OTHER, seen)

    def named_parameters(self) -> dict[str, Tensor]:
        """The tensors given as ``params``."""
        return self._params

    def parts(self) -> Generator[Part, None, None]:
        """The one part."""
        yield Part(self._position, self._weight, None, 1)

    def protected(self) -> Scope[None]:
        """A scope for one pass: finds modules, and restores what the closure may write.

        Only calls in this thread count: another thread may use modules of its own. Modules inside
        a found module are found with it, since a backward pass may run checkpointed ones again in
        another thread.
        """
        thread = threading.get_ident()

        def find(module: nn.Module, inputs: Any) -> None:
            if module not in self._modules and threading.get_ident() == thread:
                for each in module.modules():
                    if each not in self._modules:
                        self._modules.add(each)
                        for originals, copies in self._scopes:
                            copy_buffers([each], originals, copies)

        def begin(undo: UndoLog) -> None:
            handle = RemovableHandle(torch_module._global_forward_pre_hooks)
            undo(handle.remove)
            torch_module._global_forward_pre_hooks[handle.id] = find
            self._own_buffers(undo)
            leaves = [leaf() for leaf in self._leaves]
            leaves += [p for module in self._modules for p in module.parameters(recurse=False)]
            for p in {id(p): p for p in leaves if p is not None}.values():
                if p.grad is not None:
                    undo(setattr, p, "grad", p.grad)
                    p.grad = p.grad.detach().clone()

        return Scope(begin)

    def _own_buffers(self, undo: UndoLog) -> None:
        """Let all modules work on copies of their buffers, also those that are found later."""
        originals: Buffers = []
        copies: Copies = {}
        undo(restore_buffers, originals)
        undo.enter(set_attribute(self, "_scopes", [*self._scopes, (originals, copies)]))
        copy_buffers([*self._modules], originals, copies)

    def evaluate(
        self, part: Part, values: Mapping[str, Tensor] | None = None
    ) -> tuple[Any, Tensor]:
        """No outputs, and the closure's loss with its graph."""
        with seeded(part.position), Scope(self._own_buffers), active_hooks():
            return None, scalar(self._closure(), self.origin)
