"""The user's world, left as it was found.

``engaged`` sets what a product needs and puts everything back, also when an exception flies. What
it sets belongs to the whole process, so threads take turns (``turn``).
"""

from __future__ import annotations

import functools
import math
import os
import random
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian.operators.torch_state.scopes import (
    P,
    R,
    Undo,
    grad_mode,
    ordinary,
    put_table,
    restored,
    scope,
    set_to,
)
from fasthessian.vectors import like, real

_turn = threading.RLock()
# The backends of scaled dot-product attention, of which this version of torch may have fewer.
_BACKENDS = [name for name in ("cudnn", "flash", "mem_efficient", "math", "overrideable")
             if hasattr(torch._C, f"_set_sdp_use_{name}")]  # fmt: skip


def turn() -> threading.RLock:
    """The lock of the process: whoever changes global state or an operator's holds it."""
    return _turn


def _new_turn() -> None:
    """In a forked process, such as a loader's worker: no thread is there that would release it."""
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_new_turn)


def in_turn(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which takes its turn and is ``restored``."""

    @functools.wraps(function)
    def alone(*args: P.args, **named: P.kwargs) -> R:
        with turn():
            return function(*args, **named)

    return restored(alone)


@scope
def seeded(undo: Undo, seed: int, generators: Sequence[torch.Generator] = ()) -> None:
    """Seed torch, NumPy, Python and the given generators; restore all of them at the end."""
    # torch.manual_seed would queue a seed for a CUDA context that does not exist yet
    own = [torch.default_generator, *generators]
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        own += torch.cuda.default_generators
    for generator in own:
        undo(generator.set_state, generator.get_state())
        generator.manual_seed(seed)
    undo(random.setstate, random.getstate())
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy:
        undo(numpy.random.set_state, numpy.random.get_state())
        numpy.random.seed(seed)


Copies = dict[int, tuple[Tensor, Tensor]]  # a buffer and its copy, by the buffer's id
Buffers = list[tuple[nn.Module, dict[str, Tensor | None]]]  # of modules, as they were


@scope
def own_buffers(undo: Undo, roots: Iterable[nn.Module], copies: Copies | None = None) -> Buffers:
    """Let the modules work on copies of their buffers: the originals are never written.

    ``copies`` are taken from there, and kept there, so that later passes need not make them.
    Returns what is put back at the end; see ``copy_buffers``.
    """
    held: Buffers = []
    undo(put_buffers, held)
    copies = {} if copies is None else copies
    for root in roots:
        copy_buffers(root.modules(), held, copies)
    return held


def copy_buffers(modules: Iterable[nn.Module], held: Buffers, copies: Copies) -> None:
    """Replace the buffers of the modules by copies; ``held`` gets the originals first."""
    for module in modules:
        buffers = dict(module._buffers)
        held.append((module, buffers))
        for name, buffer in buffers.items():
            if buffer is not None:
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer, buffer.detach().clone()
                module._buffers[name] = copies[id(buffer)][1]


def put_buffers(held: Buffers) -> None:
    """Give modules the buffers that they had before."""
    for module, buffers in reversed(held):
        for name in set(module._buffers) - set(buffers):  # made by the forward pass
            del module._buffers[name]
        for name, buffer in buffers.items():
            module._buffers[name] = buffer


@scope
def own_parameters(undo: Undo, roots: Iterable[nn.Module]) -> None:
    """Inside, others may take the places of the modules' parameters: functional_call does."""
    for root in roots:
        for module in root.modules():
            undo(put_table, module._parameters, dict(module._parameters))


@scope
def _float32(undo: Undo, tf32: bool) -> None:
    """TF32 or not: 11 bits instead of 24, which cuDNN's convolutions use unless told otherwise."""
    cudnn: Any = torch.backends.cudnn
    try:
        matmul, convolution = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # the user chose by torch's newer switches, which exclude the older
        switches: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
        for switch in switches:
            undo(_put_switch, switch, switch.fp32_precision)
            switch.fp32_precision = "tf32" if tf32 else "ieee"
        return
    undo(torch.set_float32_matmul_precision, matmul)
    undo(setattr, cudnn, "allow_tf32", convolution)
    cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def _put_switch(switch: Any, value: str) -> None:
    switch.fp32_precision = "none"  # as the switch above it says: may be all there was
    if switch.fp32_precision != value:
        switch.fp32_precision = value


@scope
def _no_cudnn(undo: Undo) -> None:
    undo.enter(set_to(torch.backends.cudnn, "enabled", False))


def _math_attention(undo: Undo) -> None:
    """Scaled dot-product attention and nn.MultiheadAttention by plain operations.

    The fused kernels have no second derivative, and the fused inference path would take the tensors
    of torch.func.
    """
    for name in _BACKENDS:
        choose = getattr(torch._C, f"_set_sdp_use_{name}")
        undo(choose, getattr(torch._C, f"_get_{name}_sdp_enabled")())
        choose(name == "math")
    undo(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)


def _autocast(undo: Undo, kind: str, lower: bool) -> None:
    """Autocast to bfloat16 or off, with no cache, which would outlive a change of parameters."""
    undo(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
    undo(torch.set_autocast_dtype, kind, torch.get_autocast_dtype(kind))
    undo(torch.set_autocast_enabled, kind, torch.is_autocast_enabled(kind))
    torch.set_autocast_cache_enabled(False)
    torch.set_autocast_dtype(kind, torch.bfloat16)
    torch.set_autocast_enabled(kind, lower)


@scope
def training(undo: Undo, roots: Sequence[nn.Module], mode: str) -> None:
    """Set the modules to "train" or "eval"; "own": to training but for torch's own modules."""
    # the flag itself: a user's train() may do more than set it (merge adapters, keep layers frozen)
    held = [(module, module.training) for root in roots for module in root.modules()]
    undo(_put_flags, held)
    for module, _ in held:
        torchs = type(module).__module__.startswith("torch.nn.")
        module.training = mode == "train" or (mode == "own" and not torchs)


def _put_flags(held: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, before in held:
        module.training = before


@scope
def engaged(
    undo: Undo,
    roots: Sequence[nn.Module],
    mode: str,
    device: torch.device,
    copies: Copies | None = None,
    precision: str | None = None,
) -> None:
    """Everything a forward pass and its two derivatives need, for the span of one pass.

    Gradients on, autocast and TF32 off but for ``precision``, scaled dot-product attention under
    its math kernel (the fused ones have no second derivative), compiled code run eagerly, flags by
    ``mode`` ("own": train for modules that are not torch's), buffers and random states protected;
    ``copies`` as of ``own_buffers``. The caller holds the turn.
    """
    undo.enter(ordinary())
    undo.enter(grad_mode(True))
    _autocast(undo, device.type, precision == "bf16")
    _math_attention(undo)
    if device.type == "cuda":
        undo.enter(_float32(tf32=precision == "tf32"))
    if device.type == "cuda" and any(
        isinstance(module, nn.RNNBase) for root in roots for module in root.modules()
    ):  # cuDNN's recurrent layers have no second derivative
        undo.enter(_no_cudnn())
    if "torch._dynamo" in sys.modules:
        compiler = sys.modules["torch._dynamo.eval_frame"]
        undo(compiler._set_stance, compiler._stance)
        torch.compiler.set_stance("force_eager")
    undo.enter(seeded(0))
    undo.enter(own_buffers(roots, copies))
    undo.enter(training(roots, mode))


@scope
def shifted(undo: Undo, params: Sequence[Tensor], step: float) -> None:
    """Inside, the parameters are moved by ``step`` times their root mean square, at random."""
    if not step:
        return
    held = keep_values(undo, params)
    square = sum(float(real(p).double().square().sum()) for p in held)
    step *= math.sqrt(square / sum(real(p).numel() for p in held)) or 1.0
    generator = torch.Generator().manual_seed(0)
    for p in params:
        noise = torch.randn(real(p.data).shape, generator=generator, dtype=torch.float32)
        p.data = p.data + step * like(noise.to(p.device), p)


def keep_values(undo: Undo, params: Sequence[Tensor]) -> list[Tensor]:
    """The values of tensors, which get them back at the end."""
    held = [p.data for p in params]
    undo(_put_values, params, held)
    return held


def _put_values(params: Sequence[Tensor], held: Sequence[Tensor]) -> None:
    for p, at in zip(params, held, strict=True):
        p.data = at
