"""Rewrites of a forward pass that make its second derivative cheaper, and change nothing else.

* A convolution whose double backward is four convolutions. Torch's own expresses the derivative
  of the weight gradient as a convolution with an image-sized kernel.
* Batch normalisation with fixed statistics is an affine map: behind a convolution it is folded
  into the convolution's weight, elsewhere it is one multiply-add.

* Some functions as their ``formulas``, where torch's own second derivatives are missing or wrong.

Measured on ResNet-20, batch 64, CPU: the product falls from 2.5 to 1.7 gradients.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthessian.operators.torch_state import formulas, hooks
from fasthessian.operators.torch_state.formulas import functorch_level
from fasthessian.operators.torch_state.scopes import Undo, saving_hooks, scope

aten = torch.ops.aten
# Private names of torch; where one is missing the rewrite stays off.
_will_run = getattr(torch._C, "_will_engine_execute_node", None)
Optional = Tensor | None


class Geometry(NamedTuple):
    """The trailing arguments of aten.convolution."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


class Convolution(torch.autograd.Function):
    """``y = conv(x, w) + b`` with `ConvolutionBackward` as its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Optional, geometry: Geometry) -> Tensor:
        """Convolve x (N, C, ...) with w (D, C / groups, ...)."""
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        y: Tensor = aten.convolution(x, w, b, *geometry)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Optional) -> tuple[Optional, Optional, Optional, None]:
        """Gradients of x, w and b from that of y."""
        if gy is None:
            return None, None, None, None
        x, w = ctx.saved_tensors
        wanted = [_needed(ctx, i) for i in range(3)]
        return (*ConvolutionBackward.apply(gy, x, w, ctx.geometry, wanted), None)  # type: ignore[no-untyped-call]


class ConvolutionBackward(torch.autograd.Function):
    """``(gy, x, w) -> (gx, gw, gb)``, bilinear in gy and (w, x): its derivative is convolutions."""

    @staticmethod
    def forward(
        ctx: Any, gy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, wanted: Iterable[bool]
    ) -> tuple[Optional, Optional, Optional]:
        """The ordinary backward pass of a convolution."""
        ctx.save_for_backward(gy, x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        gx, gw, gb = aten.convolution_backward(gy, x, w, [w.shape[0]], *geometry, list(wanted))
        return gx, gw, gb

    @staticmethod
    def backward(
        ctx: Any, ggx: Optional, ggw: Optional, ggb: Optional
    ) -> tuple[Optional, Optional, Optional, None, None]:
        """Cotangents of gy, x and w from those of gx, gw and gb."""
        gy, x, w = ctx.saved_tensors
        ggy = gx = gw = None
        if _needed(ctx, 0):
            bias = ggb
            for source, kernel in ((ggx, w), (x, ggw)):
                if source is not None and kernel is not None:
                    term = aten.convolution(source, kernel, bias, *ctx.geometry)
                    ggy, bias = term if ggy is None else ggy.add_(term), None
            if bias is not None:
                ggy = bias.view(-1, *[1] * (gy.dim() - 2)).expand_as(gy)
        # the gradient of x by w, and of w by x: the other factor is not read
        if ggw is not None and _needed(ctx, 1):
            gx = _backward(gy, x, ggw, ctx.geometry, 0)
        if ggx is not None and _needed(ctx, 2):
            gw = _backward(gy, ggx, w, ctx.geometry, 1)
        return ggy, gx, gw, None, None


def _needed(ctx: Any, which: int) -> bool:
    """Whether the running differentiation asks for input ``which`` of a function.

    ``needs_input_grad`` tells what could be asked for; products of a block ask for less.
    """
    if not ctx.needs_input_grad[which]:
        return False
    return will_run(ctx.next_functions[which][0])


def will_run(node: Any) -> bool:
    """Whether the running differentiation asks for what this node receives."""
    leaf = hasattr(node, "variable")  # of which the engine does not tell
    return leaf or _will_run is None or bool(_will_run(node))


def _backward(gy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, which: int) -> Tensor:
    mask = [which == 0, which == 1, False]
    grads: tuple[Tensor, ...] = aten.convolution_backward(gy, x, w, None, *geometry, mask)
    return grads[which]


def convolve(x: Tensor, w: Tensor, b: Optional, geometry: Geometry) -> Tensor:
    """`Convolution` as a function.

    Leaves go in as views of themselves: autograd tells only of inner nodes whether they will run.
    """
    inner = [t.view_as(t) if t is not None and t.is_leaf else t for t in (x, w, b)]
    y: Tensor = Convolution.apply(*inner, geometry)  # type: ignore[no-untyped-call]
    return y


class _Call(NamedTuple):
    """A convolution that was made, and the versions of what went in and came out."""

    y: Tensor
    x: Tensor
    w: Tensor
    b: Optional
    geometry: Geometry
    versions: tuple[int, ...]


class Rewrite:
    """Inside this context ``torch.nn.functional`` has the rewrites, which modules call.

    Where hooks on gradients enter the graph they are lifted too; see ``hooks``.

    The names are replaced for all threads, once however many contexts are open: checkpointed
    layers are run again in backward threads and must do there what they did before. ``__exit__``
    may be called again, and after an ``__enter__`` that did not end.
    """

    _lock = threading.Lock()
    _users: set[Rewrite] = set()  # noqa: RUF012
    _found: list[Any] = []  # noqa: RUF012  what was at the places, which others may have replaced
    _last = threading.local()  # .call: the convolution this thread made last

    def __enter__(self) -> None:
        with Rewrite._lock:
            if not Rewrite._users:
                Rewrite._found = [getattr(place, name) for place, name, *_ in PLACES]
            Rewrite._users.add(self)
            for place, name, _, own in PLACES:
                setattr(place, name, own)

    def __exit__(self, *exception: object) -> None:
        Rewrite._last.call = None
        with Rewrite._lock:
            Rewrite._users.discard(self)
            if not Rewrite._users:
                for (place, name, *_), found in zip(PLACES, Rewrite._found, strict=True):
                    setattr(place, name, found)


@scope
def rewritten(undo: Undo) -> None:
    """The rewrites, which an enclosing scope takes back too."""
    rewrite = Rewrite()
    undo(rewrite.__exit__)
    rewrite.__enter__()


@scope
def unfolded(undo: Undo) -> None:
    """Inside, this thread folds nothing: each layer's output is on the way to the loss."""
    undo(setattr, Rewrite._last, "apart", False)
    Rewrite._last.apart = True


def _convolution(name: str, dims: int) -> Callable[..., Tensor]:
    original = getattr(F, name)

    @functools.wraps(original)
    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Optional = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        sizes = [_spread(dims, value) for value in (stride, padding, dilation)]
        if input.dim() != dims + 2 or None in sizes or not _plain(input, weight, bias):
            y: Tensor = original(input, weight, bias, stride, padding, dilation, groups)
            return y
        stride, padding, dilation = sizes
        geometry = Geometry(stride, padding, dilation, False, [0] * dims, groups)
        y = convolve(input, weight, bias, geometry)
        call = _Call(y, input, weight, bias, geometry, ())
        Rewrite._last.call = call._replace(versions=_versions(call))
        return y

    return convolution


@functools.wraps(F.batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: Optional,
    running_var: Optional,
    weight: Optional = None,
    bias: Optional = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    given = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    # what torch would refuse must not be broadcast
    plain = _plain(input, *given) and all(t.shape == input.shape[1:2] for t in given)
    if training or running_mean is None or running_var is None or not plain:
        normal = ORIGINAL["batch_norm"]
        return normal(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(running_var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale
    if bias is not None:
        shift = shift + bias
    call, Rewrite._last.call = getattr(Rewrite._last, "call", None), None
    if call is not None and _foldable(call, input):
        if call.b is not None:
            shift = shift + call.b * scale
        w = call.w * scale.view(-1, *[1] * (call.w.dim() - 1))
        return convolve(call.x, w, shift, call.geometry)
    shape = (1, -1, *[1] * (input.dim() - 2))
    return torch.addcmul(shift.view(shape), input, scale.view(shape))


def _plain(input: Tensor, *others: Optional) -> bool:
    """Whether these are real, of one dtype, and gradients are recorded by autograd alone.

    torch.func and autocast have rules of their own, and torch splits complex convolutions itself.
    """
    lower = torch.is_autocast_enabled(input.device.type)
    recorded = torch.is_grad_enabled() and functorch_level() is None and not lower
    alike = all(t is None or t.dtype == input.dtype for t in others)
    return recorded and alike and input.is_floating_point()


def _versions(call: _Call) -> tuple[int, ...]:
    return tuple(t._version for t in (call.y, call.x, call.w, call.b) if t is not None)


def _foldable(call: _Call, input: Tensor) -> bool:
    """Whether ``input`` is what the convolution returned, untouched and unwatched.

    Not inside a checkpointed segment, known by its hooks on saved tensors: run again, it would
    not see a convolution in front of it, and save other tensors than before.
    """
    if getattr(Rewrite._last, "apart", False):
        return False
    if call.y is not input or _versions(call) != call.versions or input._backward_hooks:
        return False
    return saving_hooks is not None and saving_hooks(True) is None


def _spread(dims: int, value: Any) -> list[int] | None:
    """A number for each dimension; None for words, and for what torch takes and this does not."""
    if isinstance(value, int):
        return [value] * dims
    if not isinstance(value, (list, tuple)) or len(value) not in (1, dims):
        return None
    return list(value) * dims if len(value) == 1 else list(value)


REWRITTEN: dict[str, Callable[..., Tensor]] = {
    **{f"conv{dims}d": _convolution(f"conv{dims}d", dims) for dims in (1, 2, 3)},
    "batch_norm": _batch_norm,
}
ORIGINAL: dict[str, Callable[..., Tensor]] = {name: getattr(F, name) for name in REWRITTEN}
# (where, name, what was there, what is put there)
PLACES: list[tuple[Any, str, Any, Any]] = [
    *((F, name, ORIGINAL[name], REWRITTEN[name]) for name in REWRITTEN),
    *formulas.PLACES,
    *hooks.PLACES,
]
