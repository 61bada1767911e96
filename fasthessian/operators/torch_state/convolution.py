"""A convolution whose double backward pass consists of convolutions alone.

Torch expresses the derivative of the weight gradient as a convolution whose kernel is as large as
the image, which is slow. Here the backward pass is an autograd function of its own. It is bilinear
in the output's gradient and in (input, weight), so its derivative is at most four convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten
# Whether the running differentiation executes a node; a private function, which may be missing.
_will_engine_execute = getattr(torch._C, "_will_engine_execute_node", None)
MaybeTensor = Tensor | None


class Geometry(NamedTuple):
    """The trailing arguments of aten.convolution."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


class Convolution(torch.autograd.Function):
    """``y = conv(x, w) + b``; its backward pass is `ConvolutionBackward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: MaybeTensor, geometry: Geometry) -> Tensor:
        """Convolve x (N, C, ...) with w (D, C / groups, ...)."""
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        y: Tensor = aten.convolution(x, w, b, *geometry)
        return y

    @staticmethod
    def backward(ctx: Any, gy: MaybeTensor) -> tuple[MaybeTensor, MaybeTensor, MaybeTensor, None]:
        """Gradients of x, w and b from that of y."""
        if gy is None:
            return None, None, None, None
        x, w = ctx.saved_tensors
        wanted = [_needed(ctx, i) for i in range(3)]
        return (*ConvolutionBackward.apply(gy, x, w, ctx.geometry, wanted), None)  # type: ignore[no-untyped-call]


class ConvolutionBackward(torch.autograd.Function):
    """``(gy, x, w) -> (gx, gw, gb)``, the gradients of x, w and b from the gradient gy of y."""

    @staticmethod
    def forward(
        ctx: Any, gy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, wanted: Iterable[bool]
    ) -> tuple[MaybeTensor, MaybeTensor, MaybeTensor]:
        """Torch's backward pass of a convolution."""
        ctx.save_for_backward(gy, x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        gx, gw, gb = aten.convolution_backward(gy, x, w, [w.shape[0]], *geometry, list(wanted))
        return gx, gw, gb

    @staticmethod
    def backward(
        ctx: Any, ggx: MaybeTensor, ggw: MaybeTensor, ggb: MaybeTensor
    ) -> tuple[MaybeTensor, MaybeTensor, MaybeTensor, None, None]:
        """The cotangents of gy, x and w from those of gx, gw and gb."""
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
        # gx does not depend on x, nor gw on w: what is passed in that place is not read
        if ggw is not None and _needed(ctx, 1):
            gx = _backward(gy, x, ggw, ctx.geometry, 0)
        if ggx is not None and _needed(ctx, 2):
            gw = _backward(gy, ggx, w, ctx.geometry, 1)
        return ggy, gx, gw, None, None


def _needed(ctx: Any, which: int) -> bool:
    """Whether the running differentiation needs the gradient of a function's input ``which``.

    ``needs_input_grad`` says whether it can ever be needed; the product of a block needs fewer.
    """
    if not ctx.needs_input_grad[which]:
        return False
    return will_run(ctx.next_functions[which][0])


def will_run(node: Any) -> bool:
    """Whether the running differentiation executes this node of the graph."""
    leaf = hasattr(node, "variable")  # the engine cannot be asked about the nodes of leaves
    return leaf or _will_engine_execute is None or bool(_will_engine_execute(node))


def _backward(gy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, which: int) -> Tensor:
    mask = [which == 0, which == 1, False]
    grads: tuple[Tensor, ...] = aten.convolution_backward(gy, x, w, None, *geometry, mask)
    return grads[which]


def convolve(x: Tensor, w: Tensor, b: MaybeTensor, geometry: Geometry) -> Tensor:
    """`Convolution` as a function.

    Leaves are replaced by views of themselves: ``will_run`` cannot tell for the nodes of leaves.
    """
    inner = [t.view_as(t) if t is not None and t.is_leaf else t for t in (x, w, b)]
    y: Tensor = Convolution.apply(*inner, geometry)  # type: ignore[no-untyped-call]
    return y
