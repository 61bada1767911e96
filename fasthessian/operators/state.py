"""The user's world, left as it was found.

``engaged`` sets what a product needs and puts everything back, also when an exception flies. What
it sets belongs to the whole process, so threads take turns (``turn``).
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fasthessian.vectors import like, real

_turn = threading.RLock()


def turn() -> threading.RLock:
    """The lock of the process: whoever changes global state or an operator's holds it."""
    return _turn


def _new_turn() -> None:
    """In a forked process, such as a loader's worker: no thread is there that would release it."""
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_new_turn)


@contextlib.contextmanager
def seeded(seed: int, generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Seed torch, NumPy, Python and the given generators; restore all of them at the end."""
    # torch.manual_seed would queue a seed for a CUDA context that does not exist yet
    own = [torch.default_generator, *generators]
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        own += torch.cuda.default_generators
    numpy = sys.modules.get("numpy")
    with turn():
        saved = [generator.get_state() for generator in own]
        python_state = random.getstate()
        numpy_state = numpy.random.get_state() if numpy else None
        try:
            for generator in own:
                generator.manual_seed(seed)
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed)
            yield
        finally:
            for generator, state in zip(own, saved, strict=True):
                generator.set_state(state)
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


Copies = dict[int, tuple[Tensor, Tensor]]  # a buffer and its copy, by the buffer's id


@contextlib.contextmanager
def own_buffers(roots: Sequence[nn.Module], copies: Copies | None = None) -> Iterator[None]:
    """Let the modules work on copies of their buffers: the originals are never written.

    ``copies`` are taken from there, and kept there, so that later passes need not make them.
    """
    held = [(module, dict(module._buffers)) for root in roots for module in root.modules()]
    copies = {} if copies is None else copies
    try:
        for module, buffers in held:
            for name, buffer in buffers.items():
                if buffer is not None:
                    if id(buffer) not in copies:
                        copies[id(buffer)] = buffer, buffer.detach().clone()
                    module._buffers[name] = copies[id(buffer)][1]
        yield
    finally:
        for module, buffers in held:
            for name in set(module._buffers) - set(buffers):  # made by the forward pass
                del module._buffers[name]
            for name, buffer in buffers.items():
                module._buffers[name] = buffer


@contextlib.contextmanager
def _float32(tf32: bool) -> Iterator[None]:
    """TF32 or not: 11 bits instead of 24, which cuDNN's convolutions use unless told otherwise."""
    try:
        matmul = torch.get_float32_matmul_precision()
        convolution = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the user chose by torch's newer switches, which exclude the older
        with _newer_switches("tf32" if tf32 else "ieee"):
            yield
        return
    try:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolution
        torch.set_float32_matmul_precision(matmul)


@contextlib.contextmanager
def _newer_switches(precision: str) -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    held = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = precision
        yield
    finally:
        for switch, value in zip(switches, held, strict=True):
            switch.fp32_precision = "none"  # as the switch above it says: may be all there was
            if switch.fp32_precision != value:
                switch.fp32_precision = value


@contextlib.contextmanager
def _no_cudnn() -> Iterator[None]:
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextlib.contextmanager
def _slow_attention() -> Iterator[None]:
    """No fused inference path of nn.MultiheadAttention, which torch.func's tensors would take."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def training(roots: Sequence[nn.Module], mode: str) -> Iterator[None]:
    """Set the modules to "train" or "eval"; "own": to training but for torch's own modules."""
    # the flag itself: a user's train() may do more than set it (merge adapters, keep layers frozen)
    held = [(module, module.training) for root in roots for module in root.modules()]
    try:
        for module, _ in held:
            torchs = type(module).__module__.startswith("torch.nn.")
            module.training = mode == "train" or (mode == "own" and not torchs)
        yield
    finally:
        for module, before in held:
            module.training = before


@contextlib.contextmanager
def engaged(
    roots: Sequence[nn.Module],
    mode: str,
    device: torch.device,
    copies: Copies | None = None,
    precision: str | None = None,
) -> Iterator[None]:
    """Everything a forward pass and its two derivatives need, for the span of one pass.

    Gradients on, autocast and TF32 off but for ``precision``, scaled dot-product attention under
    its math kernel (the fused ones have no second derivative), compiled code run eagerly, flags by
    ``mode`` ("own": train for modules that are not torch's), buffers and random states protected;
    ``copies`` as of ``own_buffers``.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(turn())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        lower = precision == "bf16"
        # no cache: inside the user's autocast it would outlive a change of the parameters
        stack.enter_context(
            torch.autocast(device.type, torch.bfloat16, enabled=lower, cache_enabled=False)
        )
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_slow_attention())
        if device.type == "cuda":
            stack.enter_context(_float32(tf32=precision == "tf32"))
        if device.type == "cuda" and any(
            isinstance(module, nn.RNNBase) for root in roots for module in root.modules()
        ):  # cuDNN's recurrent layers have no second derivative
            stack.enter_context(_no_cudnn())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(seeded(0))
        stack.enter_context(own_buffers(roots, copies))
        stack.enter_context(training(roots, mode))
        yield


@contextlib.contextmanager
def shifted(params: Sequence[Tensor], step: float) -> Iterator[None]:
    """Inside, the parameters are moved by ``step`` times their root mean square, at random."""
    if not step:
        yield
        return
    held = [p.data for p in params]
    square = sum(float(real(p).double().square().sum()) for p in held)
    step *= math.sqrt(square / sum(real(p).numel() for p in held)) or 1.0
    generator = torch.Generator().manual_seed(0)
    try:
        for p in params:
            noise = torch.randn(real(p.data).shape, generator=generator, dtype=torch.float32)
            p.data = p.data + step * like(noise.to(p.device), p)
        yield
    finally:
        for p, at in zip(params, held, strict=True):
            p.data = at
