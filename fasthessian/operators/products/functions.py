"""The replacement of custom autograd functions whose backward pass has no usable graph.

torch drops derivatives without an error if the backward b(x, u) of a function makes no graph. This
happens if it runs under ``no_grad``, leaves torch, or scales a gradient that was computed in the
forward pass. `Local` has the value and the first derivative of such a function. Its second
derivative is a central difference of b alone, so kinks elsewhere in the network do not matter.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from fasthessian.errors import UnsupportedError
from fasthessian.operators.torch_state.convolution import will_run
from fasthessian.operators.torch_state.module_state import keep_values
from fasthessian.operators.torch_state.scopes import UndoLog, scope

WIDER = {
    torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64,
}  # fmt: skip
Optional = Tensor | None
Function = type[torch.autograd.Function]


class Treatment(NamedTuple):
    """How the second derivative of a function is made."""

    transpose: str  # how J c is made, one of TRANSPOSES
    step: float  # step of central differences, relative to the inputs
    error: float  # estimated relative error of these differences
    wide: bool  # whether differences are made in the next wider dtype


# How to compute J c, the derivative of b with respect to u: from the graph of b in u; as b(x, c) if
# J is symmetric (for elementwise functions); or as the central difference of the outputs.
TRANSPOSES = ("graph", "symmetric", "difference")


class Call(NamedTuple):
    """One call of a custom function. It can be repeated with other inputs."""

    function: Function
    args: tuple[Any, ...]
    at: tuple[int, ...]  # positions of the inputs that require gradients
    parameters: frozenset[int]  # positions of those inputs that are leaves
    autocast: tuple[str, torch.dtype, bool]  # the state of autocast during the call

    @staticmethod
    def of(function: Function, args: tuple[Any, ...]) -> Call:
        """The call of a function with these arguments. A parameter passed twice counts once."""
        at = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad]
        first = {id(args[i]): i for i in reversed(at)}
        at = [i for i in at if not args[i].is_leaf or first[id(args[i])] == i]
        kind = args[at[0]].device.type if at else "cpu"
        autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        parameters = frozenset(i for i in at if args[i].is_leaf)
        return Call(function, args, tuple(at), parameters, autocast)

    @property
    def inputs(self) -> list[Any]:
        """The inputs that require gradients."""
        return [self.args[i] for i in self.at]

    def filled(self, inputs: Sequence[Optional]) -> Call:
        """The same call with other inputs."""
        args = list(self.args)
        for i, x in zip(self.at, inputs, strict=True):
            args[i] = x
        return self._replace(args=tuple(args))

    def widened(self) -> Call:
        """The same call with all numbers in the next wider dtype, outside of autocast."""
        args = tuple(widened(x) if isinstance(x, Tensor) else x for x in self.args)
        kind, dtype, _ = self.autocast
        return self._replace(args=args, parameters=frozenset(), autocast=(kind, dtype, False))

    def run(self, apply: Callable[..., Any] | None = None) -> tuple[Any, list[Tensor]]:
        """The function's outputs, with a graph of their own, and the inputs of that graph.

        Parameters are not copied, because the function may also read them from a module. Other
        tensors are copied, because the function may write into them.
        """
        given = list(self.args)
        inner = {i: x if i in self.parameters else x.detach().requires_grad_()
                 for i, x in zip(self.at, self.inputs, strict=True)}  # fmt: skip
        kind, dtype, enabled = self.autocast
        with (
            unwatched(),
            torch.enable_grad(),
            # a surrounding checkpoint counts saved tensors
            saved_tensors_hooks(_identity, _identity),
        ):
            for i, x in enumerate(given):
                if isinstance(x, Tensor) and not (x.is_leaf and x.requires_grad):
                    given[i] = inner[i].clone() if i in inner else x.detach().clone()
            with torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False):
                return (apply or self.function.apply)(*given), list(inner.values())

    def slopes(self, u: Sequence[Optional]) -> list[Optional]:
        """b(x, u): the gradients of the inputs, given the gradients u of the outputs."""
        out, inner = self.run()
        used = [(y, c) for y, c in zip(outputs(out), u, strict=True)
                if c is not None and isinstance(y, Tensor) and y.requires_grad]  # fmt: skip
        if not used:
            return [None] * len(inner)
        ys, cs = zip(*used, strict=True)
        with unwatched():
            return list(torch.autograd.grad(ys, inner, cs, allow_unused=True))

    def difference(
        self, of: Callable[[Call], Sequence[Optional]], directions: Sequence[Optional], step: float
    ) -> tuple[list[Optional], float]:
        """Central difference of ``of`` when the inputs move along the directions.

        Returns:
            The differences, and the factor h of the directions. No input moves by more than
            ``step`` times its norm. Both are 0 if all directions are 0.
        """
        size = [norm(d) / _scale(x) for x, d in zip(self.inputs, directions, strict=True)
                if d is not None]  # fmt: skip
        h = step / (max(size, default=0.0) or math.inf)
        if not h:
            return [None if y is None else torch.zeros_like(y) for y in of(self)], 0.0
        ends = []
        for shift in (h, -h):
            with _moved(self, directions, shift) as call:
                ends.append([y.detach() if isinstance(y, Tensor) else None for y in of(call)])
        pairs = zip(*ends, strict=True)
        return [None if a is None or b is None else (a - b).div_(2 * h) for a, b in pairs], h


@scope
def _moved(undo: UndoLog, call: Call, directions: Sequence[Optional], shift: float) -> Call:
    """The call with moved inputs; parameters are moved in place."""
    there: list[Tensor] = []
    keep_values(undo, [call.args[i] for i in call.parameters])
    for i, x, d in zip(call.at, call.inputs, directions, strict=True):
        y = x.detach() if d is None else torch.add(x.detach(), d.to(x.dtype), alpha=shift)
        if i in call.parameters:
            x.data = y
        there.append(x if i in call.parameters else y)
    return call.filled(there)


class Local(torch.autograd.Function):
    """A custom function with `LocalBackward` as its derivative."""

    @staticmethod
    def forward(ctx: Any, how: Treatment, function: Function, *args: Any) -> Any:
        """The function's outputs."""
        call = Call.of(function, args)
        out, _ = call.run()
        ys = [y.detach() if isinstance(y, Tensor) else y for y in outputs(out)]
        fixed = [y for y, own in zip(ys, outputs(out), strict=True)
                 if isinstance(y, Tensor) and not own.requires_grad]  # fmt: skip
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        # torch saves all tensors except parameters: the backward must use the same tensor
        ctx.saved = [i for i, x in enumerate(args)
                     if isinstance(x, Tensor) and not (x.is_leaf and x.requires_grad)]  # fmt: skip
        ctx.save_for_backward(*[args[i] for i in ctx.saved])
        kept = tuple(None if i in ctx.saved else x for i, x in enumerate(args))
        ctx.how, ctx.call = how, call._replace(args=kept)
        return tuple(ys) if isinstance(out, tuple) else ys[0]

    @staticmethod
    def backward(ctx: Any, *u: Optional) -> tuple[Optional, ...]:
        """The function's own gradients."""
        args = list(ctx.call.args)
        for i, x in zip(ctx.saved, ctx.saved_tensors, strict=True):
            args[i] = x
        call = ctx.call._replace(args=tuple(args))
        found: list[Optional] = [None] * len(args)
        slopes = LocalBackward.apply(ctx.how, call, *call.inputs, *u)  # type: ignore[no-untyped-call]
        for i, slope in zip(call.at, slopes, strict=True):
            found[i] = slope
        return None, None, *found


class LocalBackward(torch.autograd.Function):
    """``b(x, u)``. Its derivative in x is a central difference; the treatment defines that in u."""

    @staticmethod
    def forward(ctx: Any, how: Treatment, call: Call, *tensors: Optional) -> tuple[Optional, ...]:
        """The gradients of the inputs."""
        count = len(call.at)
        ctx.set_materialize_grads(False)
        saved = [x if i not in call.parameters else None
                 for i, x in zip(call.at, tensors, strict=False)]  # fmt: skip
        ctx.save_for_backward(*saved, *tensors[count:])
        ctx.how = how
        ctx.call = call.filled([x if i in call.parameters else None
                                for i, x in zip(call.at, tensors, strict=False)])  # fmt: skip
        given = [i for i, x in enumerate(tensors) if x is not None]
        ctx.edges = [given.index(i) if i in given else None for i in range(len(tensors))]
        return tuple(call.slopes(tensors[count:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *c: Optional) -> tuple[Optional, ...]:
        """The gradients of x and u, given the gradients c of b."""
        how, count = ctx.how, len(c)
        saved = ctx.saved_tensors
        x = [own if own is not None else kept
             for own, kept in zip(ctx.call.inputs, saved[:count], strict=True)]  # fmt: skip
        u, call = saved[count:], ctx.call.filled(x)
        if how.wide:
            call, u, c = call.widened(), [*map(widened, u)], tuple(map(widened, c))
        gx: Sequence[Optional] = [None] * count
        gu: Sequence[Optional] = [None] * len(u)
        if any(d is not None for d in c):
            if _is_needed(ctx, ctx.edges[:count]):
                # b is a gradient, so its Jacobian in x is symmetric
                gx, _ = call.difference(lambda moved: moved.slopes(u), c, how.step)
            if _is_needed(ctx, ctx.edges[count:]):
                gu = _transposed(call, u, c, how)
        tensors = [*x, *saved[count:]]
        return None, None, *[g if g is None else g.to(like.dtype)
                             for g, like in zip((*gx, *gu), tensors, strict=True)]  # fmt: skip


def _transposed(
    call: Call, u: Sequence[Optional], c: Sequence[Optional], how: Treatment
) -> Sequence[Optional]:
    """J c for each output, where J is the Jacobian of the function."""
    if how.transpose == "symmetric":
        return call.slopes(c)
    if how.transpose == "difference":
        return call.difference(lambda moved: outputs(moved.run()[0]), c, how.step)[0]
    return differentiated(call, u, c)[1]


def differentiated(
    call: Call,
    u: Sequence[Optional],
    c: Sequence[Optional],
    apply: Callable[..., Any] | None = None,
) -> tuple[list[Optional], list[Optional]]:
    """The derivatives of c'b(x, u) in x and in u by the graph of b; zeros without a graph.

    Raises:
        RuntimeError: torch does not have the derivative.
    """
    out, inner = call.run(apply)
    u = [d if d is None else d.detach().requires_grad_() for d in u]
    ys, ds = zip(*[(y, d) for y, d in zip(outputs(out), u, strict=True) if d is not None],
                 strict=True)  # fmt: skip
    with unwatched(), torch.enable_grad(), saved_tensors_hooks(_identity, _identity):
        b = torch.autograd.grad(ys, inner, ds, create_graph=True, allow_unused=True)
        curved = [(y, d) for y, d in zip(b, c, strict=True)
                  if y is not None and y.requires_grad and d is not None]  # fmt: skip
        _differentiable([y for y, _ in curved])
        found: tuple[Tensor, ...] = tuple(torch.zeros_like(x) for x in (*inner, *ds))
        if curved:
            ys, cs = zip(*curved, strict=True)
            found = torch.autograd.grad(
                ys, (*inner, *ds), cs, allow_unused=True, materialize_grads=True
            )
    by_u = iter(found[len(inner) :])
    return list(found[: len(inner)]), [d if d is None else next(by_u) for d in u]


def _differentiable(b: Sequence[Tensor]) -> None:
    """Raise RuntimeError if a backward is once_differentiable, because torch would return zeros."""
    nodes: list[Any] = [y.grad_fn for y in b]
    seen = {None}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            if node.name() == "torch::autograd::Error":
                raise UnsupportedError("a backward is marked once_differentiable")
            nodes += [following for following, _ in node.next_functions]


def outputs(out: Any) -> Sequence[Any]:
    """The outputs of a function as a sequence."""
    return out if isinstance(out, (tuple, list)) else (out,)


def widened(x: Optional) -> Optional:
    """A copy of x in the next wider dtype, without a graph."""
    return x if x is None else x.detach().to(WIDER.get(x.dtype, x.dtype))


def norm(x: Tensor) -> float:
    """The Euclidean norm of all entries of x."""
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64))


def _scale(x: Tensor) -> float:
    size = norm(x)  # an output buffer may be uninitialised, and hold NaN or Inf
    return size if size and math.isfinite(size) else 1.0


_thread = threading.local()


def is_unwatched() -> bool:
    """Whether this thread calls custom functions without checks and replacements."""
    return getattr(_thread, "unwatched", False)


@scope
def unwatched(undo: UndoLog) -> None:
    """Inside this scope, this thread calls custom functions without checks and replacements."""
    undo(setattr, _thread, "unwatched", is_unwatched())
    _thread.unwatched = True


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _is_needed(ctx: Any, edges: Sequence[int | None]) -> bool:
    """Whether the current backward pass needs the gradient of one of these inputs."""
    nodes = [ctx.next_functions[edge][0] for edge in edges if edge is not None]
    return any(node is not None and will_run(node) for node in nodes)
