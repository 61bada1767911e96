"""Layers computed in another way, so that their second derivative costs less.

* A convolution is computed by ``convolution``.
* Batch normalisation with fixed statistics is an affine map. If its input is the result of a
  convolution, it is folded into the weight and bias of that convolution; otherwise it is one
  multiply-add.

The results are the same up to rounding. On ResNet-20 (batch 64, CPU) the cost of a product falls
from 2.5 to 1.7 gradients.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthessian.operators.torch_state.convolution import Geometry, MaybeTensor, convolve
from fasthessian.operators.torch_state.scopes import UndoLog, saving_hooks, scope
from fasthessian.operators.torch_state.workarounds import functorch_level

_thread = threading.local()  # .last: this thread's last convolution; .separate: see ``no_folding``
_own_batch_norm = F.batch_norm


class _Call(NamedTuple):
    """A convolution that was computed, and the version counters of its tensors after that."""

    y: Tensor
    x: Tensor
    w: Tensor
    b: MaybeTensor
    geometry: Geometry
    versions: tuple[int, ...]


def forget_convolution() -> None:
    """Drop the record of this thread's last convolution, which keeps its tensors alive."""
    _thread.last = None


@scope
def no_folding(undo: UndoLog) -> None:
    """Fold nothing in this thread: the loss depends on the output of each single layer."""
    undo(setattr, _thread, "separate", False)
    _thread.separate = True


def _convolution(name: str, dims: int) -> Callable[..., Tensor]:
    original = getattr(F, name)

    @functools.wraps(original)
    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: MaybeTensor = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        sizes = [_per_dimension(dims, value) for value in (stride, padding, dilation)]
        if input.dim() != dims + 2 or None in sizes or not _served(input, weight, bias):
            y: Tensor = original(input, weight, bias, stride, padding, dilation, groups)
            return y
        stride, padding, dilation = sizes
        geometry = Geometry(stride, padding, dilation, False, [0] * dims, groups)
        y = convolve(input, weight, bias, geometry)
        call = _Call(y, input, weight, bias, geometry, ())
        _thread.last = call._replace(versions=_versions(call))
        return y

    return convolution


@functools.wraps(_own_batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: MaybeTensor,
    running_var: MaybeTensor,
    weight: MaybeTensor = None,
    bias: MaybeTensor = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    given = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    # torch refuses other shapes, which the formula below would broadcast
    served = _served(input, *given) and all(t.shape == input.shape[1:2] for t in given)
    if training or running_mean is None or running_var is None or not served:
        return _own_batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    scale = torch.rsqrt(running_var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale
    if bias is not None:
        shift = shift + bias
    call, _thread.last = getattr(_thread, "last", None), None
    if call is not None and _foldable(call, input):
        if call.b is not None:
            shift = shift + call.b * scale
        w = call.w * scale.view(-1, *[1] * (call.w.dim() - 1))
        return convolve(call.x, w, shift, call.geometry)
    shape = (1, -1, *[1] * (input.dim() - 2))
    return torch.addcmul(shift.view(shape), input, scale.view(shape))


def _served(input: Tensor, *others: MaybeTensor) -> bool:
    """Whether the tensors are real and of one dtype, and only autograd records gradients.

    torch.func and autocast have their own rules, and torch splits complex convolutions itself.
    """
    autocast = torch.is_autocast_enabled(input.device.type)
    recorded = torch.is_grad_enabled() and functorch_level() is None and not autocast
    alike = all(t is None or t.dtype == input.dtype for t in others)
    return recorded and alike and input.is_floating_point()


def _versions(call: _Call) -> tuple[int, ...]:
    return tuple(t._version for t in (call.y, call.x, call.w, call.b) if t is not None)


def _foldable(call: _Call, input: Tensor) -> bool:
    """Whether ``input`` is the result of the convolution, not written since and without hooks.

    Nothing is folded inside a checkpointed segment, which has hooks on saved tensors: if the
    segment starts after the convolution, it would save other tensors when it runs again.
    """
    if getattr(_thread, "separate", False):
        return False
    if call.y is not input or _versions(call) != call.versions or input._backward_hooks:
        return False
    return saving_hooks is not None and saving_hooks(True) is None


def _per_dimension(dims: int, value: Any) -> list[int] | None:
    """One number per dimension; None for a string and for other values that only torch accepts."""
    if isinstance(value, int):
        return [value] * dims
    if not isinstance(value, (list, tuple)) or len(value) not in (1, dims):
        return None
    return list(value) * dims if len(value) == 1 else list(value)


REPLACEMENTS: list[tuple[Any, str, Any]] = [  # owner, name, function that replaces its attribute
    *((F, f"conv{dims}d", _convolution(f"conv{dims}d", dims)) for dims in (1, 2, 3)),
    (F, "batch_norm", _batch_norm),
]
