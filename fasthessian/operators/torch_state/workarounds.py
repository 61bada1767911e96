"""Replacements for functions of torch whose second derivative is missing or wrong.

Each is computed from operations that have right derivatives. Its value is torch's. Calls that it
does not serve, such as those without gradients, go to torch's own function. ``patches`` installs
the replacements while a product is computed.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 1 << 28  # numbers of the largest temporary that ``_cdist`` makes
# What torch.func transforms run, or None; a private function of torch, which may be missing.
functorch_level = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: "unknown")
_own_mse_loss = F.mse_loss
_own_weight_norm: Any = getattr(torch, "_weight_norm", None)
_own_hardsigmoid = torch._C._nn.hardsigmoid
_own_hardsigmoid_ = torch._C._nn.hardsigmoid_
_own_embedding_bag = torch.embedding_bag
_own_cdist: Any = torch._VF.cdist  # type: ignore[attr-defined]


@functools.wraps(_own_mse_loss)
def _mse_loss(input: Tensor, target: Tensor, *options: Any, **named: Any) -> Tensor:
    # forward mode of torch 2.13 fails in the gradient of the mean: it writes into a symbolic zero
    mean = not options and set(named) <= {"reduction"} and named.get("reduction", "mean") == "mean"
    if mean and input.shape == target.shape and functorch_level() is not None:
        return (input - target).square().mean()
    loss: Tensor = _own_mse_loss(input, target, *options, **named)
    return loss


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``; in torch 2.13 its second derivative is wrong, and not symmetric."""
    if v.dtype != g.dtype:  # torch refuses this
        w: Tensor = _own_weight_norm(v, g, dim)
        return w
    # norm_except_dim has no forward mode where it sums over all numbers
    size = torch.linalg.vector_norm(v) if dim == -1 else torch.norm_except_dim(v, 2, dim)
    return v * (g / size)


def _hardsigmoid(input: Tensor, **out: Any) -> Tensor:
    """``(clamp(x, -3, 3) + 3) / 6``, bit for bit; torch 2.13 has no second derivative.

    The slope at the kinks is 0, as in torch.
    """
    if out or not (torch.is_grad_enabled() and input.is_floating_point()):
        y: Tensor = _own_hardsigmoid(input, **out)
        return y
    low = input.dtype in (torch.bfloat16, torch.float16)  # torch rounds these once, at the end
    x = input.float() if low else input
    return ((F.hardtanh(x, -3.0, 3.0) + 3) / 6).to(input.dtype)


def _hardsigmoid_(input: Tensor) -> Tensor:
    """The same, in place."""
    if not (torch.is_grad_enabled() and input.is_floating_point()):
        y: Tensor = _own_hardsigmoid_(input)
        return y
    return input.copy_(_hardsigmoid(input.clone()))


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, ...]:
    """Rows of weight (m, d), reduced per bag: the sum, mean or maximum for ``mode`` 0, 1, 2.

    Torch has no second derivative. Bags are padded to the longest one, so that no sum depends on
    the order of threads. ``torch.nn.functional`` reads only the first result.
    """
    if not torch.is_grad_enabled() or scale_grad_by_freq or sparse or indices.numel() == 0:
        own: tuple[Tensor, ...] = _own_embedding_bag(
            weight, indices, offsets, scale_grad_by_freq, mode, sparse, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
        return own
    if not include_last_offset:
        offsets = torch.cat([offsets, offsets.new_tensor([len(indices)])])
    count = offsets.diff()
    steps = torch.arange(int(count.max()), device=indices.device)
    at = (offsets[:-1, None] + steps).clamp(max=len(indices) - 1)  # (bags, longest)
    valid = steps < count[:, None]
    if padding_idx is not None:
        valid = valid & (indices[at] != padding_idx)
    rows = F.embedding(indices[at], weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[at][..., None]
    if mode == 2:
        out = rows.masked_fill(~valid[..., None], -torch.inf).max(1).values
        out = out.masked_fill(~valid.any(1)[:, None], 0.0)
    else:
        out = rows.masked_fill(~valid[..., None], 0.0).sum(1)
        out = out / valid.sum(1).clamp(min=1)[:, None] if mode == 1 else out
    return out, count.new_empty(0), valid.sum(1), count.new_empty(0)


def _cdist(x: Tensor, y: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """Euclidean distances (..., m, n) of x (..., m, d) and y (..., n, d); the slope at 0 is 0.

    Torch has no second derivative. Its own function serves other ``p``, and temporaries of more
    than ``LARGEST`` numbers.
    """
    large = x.numel() * y.shape[-2] > LARGEST
    if p != 2 or large or not torch.is_grad_enabled() or x.dtype != y.dtype:
        distances: Tensor = _own_cdist(x, y, p, compute_mode)
        return distances
    square = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    zero = square == 0
    return square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


REPLACEMENTS: list[tuple[Any, str, Any]] = [  # owner, name, function that replaces its attribute
    (F, "mse_loss", _mse_loss),
    *(
        (owner, "_weight_norm", _weight_norm)
        for owner in (torch, importlib.import_module("torch.nn.utils.weight_norm"))
        if hasattr(owner, "_weight_norm")
    ),
    (torch, "embedding_bag", _embedding_bag),
    (torch._VF, "cdist", _cdist),
    (torch._C._nn, "hardsigmoid", _hardsigmoid),
    (torch._C._nn, "hardsigmoid_", _hardsigmoid_),
    *(  # called by graphs of torch.export and torch.fx
        (owner, "_op", function)
        for packet, function in (
            (torch.ops.aten.hardsigmoid, _hardsigmoid),
            (torch.ops.aten.hardsigmoid_, _hardsigmoid_),
        )
        for owner in (packet, packet.default)
        if hasattr(owner, "_op")
    ),
]
