"""Everything that a forward pass and its two derivatives need, set in one scope.

* Gradients are recorded; inference mode and autocast are off.
* Attention runs its math kernel: the fused kernels have no second derivative.
* TF32 is off, and cuDNN is off for recurrent layers, which have no second derivative there.
* Compiled code runs eagerly.
* Random generators are seeded, and modules work on copies of their buffers.
* Training flags are those of the mode that was asked for.

``product_state`` sets all of this and restores it at the end, also after an exception. Most of it
belongs to the whole process, so the caller holds the lock of the process (``lock``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fasthessian.operators.torch_state.module_state import Copies, own_buffers, training
from fasthessian.operators.torch_state.random_state import seeded
from fasthessian.operators.torch_state.scopes import (
    UndoLog,
    grad_mode,
    no_inference_mode,
    scope,
    set_attribute,
)

# Implementations of scaled dot-product attention; older versions of torch have fewer.
_ATTENTION = [name for name in ("cudnn", "flash", "mem_efficient", "math", "overrideable")
              if hasattr(torch._C, f"_set_sdp_use_{name}")]  # fmt: skip


@scope
def product_state(
    undo: UndoLog,
    roots: Sequence[nn.Module],
    mode: str,
    device: torch.device,
    copies: Copies | None = None,
    precision: str | None = None,
) -> None:
    """Set everything that a product needs.

    ``mode`` is "train", "eval" or "own", see ``training``; ``copies`` as in ``own_buffers``;
    ``precision`` is "bf16" for autocast, "tf32", or None for neither.
    """
    undo.enter(no_inference_mode())
    undo.enter(grad_mode(True))
    _set_autocast(undo, device.type, precision == "bf16")
    _use_math_attention(undo)
    if device.type == "cuda":
        undo.enter(_float32(tf32=precision == "tf32"))
    if device.type == "cuda" and any(
        isinstance(module, nn.RNNBase) for root in roots for module in root.modules()
    ):
        undo.enter(_no_cudnn())
    if "torch._dynamo" in sys.modules:
        compiler = sys.modules["torch._dynamo.eval_frame"]
        undo(compiler._set_stance, compiler._stance)
        torch.compiler.set_stance("force_eager")
    undo.enter(seeded(0))
    undo.enter(own_buffers(roots, copies))
    undo.enter(training(roots, mode))


def _set_autocast(undo: UndoLog, kind: str, enabled: bool) -> None:
    """Switch autocast to bfloat16 on or off for a kind of device.

    Its cache is off: it would outlive a change of the parameters.
    """
    undo(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
    undo(torch.set_autocast_dtype, kind, torch.get_autocast_dtype(kind))
    undo(torch.set_autocast_enabled, kind, torch.is_autocast_enabled(kind))
    torch.set_autocast_cache_enabled(False)
    torch.set_autocast_dtype(kind, torch.bfloat16)
    torch.set_autocast_enabled(kind, enabled)


def _use_math_attention(undo: UndoLog) -> None:
    """Let scaled dot-product attention and nn.MultiheadAttention use plain operations.

    The fused kernels have no second derivative. The fast path for inference does not accept the
    tensors of torch.func.
    """
    for name in _ATTENTION:
        choose = getattr(torch._C, f"_set_sdp_use_{name}")
        undo(choose, getattr(torch._C, f"_get_{name}_sdp_enabled")())
        choose(name == "math")
    undo(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)


@scope
def _float32(undo: UndoLog, tf32: bool) -> None:
    """Switch TF32 (11 bits instead of 24) on or off; cuDNN's convolutions use it by default."""
    cudnn: Any = torch.backends.cudnn
    try:
        matmul, convolution = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # the user set torch's newer switches: the older ones must not be read
        switches: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
        for switch in switches:
            undo(_restore_switch, switch, switch.fp32_precision)
            switch.fp32_precision = "tf32" if tf32 else "ieee"
        return
    undo(torch.set_float32_matmul_precision, matmul)
    undo(setattr, cudnn, "allow_tf32", convolution)
    cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def _restore_switch(switch: Any, value: str) -> None:
    switch.fp32_precision = "none"  # inherit from the switch above, which may give the value
    if switch.fp32_precision != value:
        switch.fp32_precision = value


@scope
def _no_cudnn(undo: UndoLog) -> None:
    """Switch cuDNN off."""
    undo.enter(set_attribute(torch.backends.cudnn, "enabled", False))
