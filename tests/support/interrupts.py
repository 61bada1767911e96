"""A KeyboardInterrupt at any line of a call, and the state that a call must not change."""

from __future__ import annotations

import importlib
import linecache
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn

from fasthessian.operators.products import function_guard as watched
from fasthessian.operators.products import functions
from fasthessian.operators.torch_state import gradient_hooks, layer_rewrites, scopes
from fasthessian.operators.torch_state.patches import Patches

eager_transforms = importlib.import_module("torch._functorch.eager_transforms")
TRACED = ("fasthessian/", "contextlib")
# Where a ``with`` block of a lock ends Python calls its exit before it handles a signal.
UNREACHED = ("with Patches._lock", "with process_lock()")


def switches() -> dict[str, Any]:
    """What is global in torch, in Python and in this package."""
    cuda = torch.backends.cuda
    places = [(F, "conv2d"), (F, "batch_norm"), (F, "mse_loss"), (torch, "_weight_norm"),
              (torch.Tensor, "register_hook"), (nn.Module, "_get_backward_hooks")]  # fmt: skip
    torch.autocast_increment_nesting()
    return {
        "functions": [getattr(place, name) for place, name in places],
        "applications": sorted(vars(watched._base_class)),
        "rng": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": [np.asarray(part).tolist() for part in np.random.get_state()],
        "attention": [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
                      cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
                      torch.backends.mha.get_fastpath_enabled()],
        "grad": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        "autocast": [torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
                     torch.is_autocast_cache_enabled(), torch.autocast_decrement_nesting()],
        "saving": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "forward mode": [torch._C._functorch.get_dynamic_layer_stack_depth(),
                         eager_transforms.JVP_NESTING, forward_ad._current_level],
        "compiler": str(torch._dynamo.eval_frame._stance),
        "global hooks": len(nn.modules.module._global_forward_pre_hooks),
        "warnings": list(warnings.filters),
        "scopes": list(getattr(scopes._thread, "steps", [])),
        "patches": [set(Patches._users), list(watched.Functions._open), functions.is_unwatched(),
                    gradient_hooks._switch(), getattr(layer_rewrites._thread, "separate", False)],
    }  # fmt: skip


def of_modules(*roots: nn.Module) -> dict[str, Any]:
    """What belongs to modules: flags, hooks, gradients, and tensors by identity and value."""
    modules = [module for root in roots for module in root.modules()]
    tensors = [tensor for root in roots for tensor in (*root.parameters(), *root.buffers())]
    return {
        "flags": [module.training for module in modules],
        "names": [[*module._parameters, *module._buffers] for module in modules],
        "tensors": [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors],
        "values": [tensor.tolist() for tensor in tensors],
        "gradients": [id(tensor.grad) for tensor in tensors],
        "hooks": [len(module._forward_hooks) for module in modules]
        + [dict(tensor._backward_hooks or {}) for tensor in tensors],
    }


def interrupted(call: Callable[[], object], at: int, traced: tuple[str, ...] = TRACED) -> str:
    """Interrupt a call at its line ``at``; where that was, "" if it has fewer lines."""
    seen, where = 0, ""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen, where
        name = frame.f_code.co_filename
        if not any(part in name for part in traced):
            return None
        if event == "line":
            if linecache.getline(name, frame.f_lineno).strip().startswith(UNREACHED):
                return trace
            if seen == at:
                where = f"{name.rsplit('/', 1)[1]}:{frame.f_lineno} in {frame.f_code.co_name}"
                sys.settrace(None)
                raise KeyboardInterrupt
            seen += 1
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return where


def left_changed(
    call: Callable[[], object],
    world: Callable[[], dict[str, Any]],
    step: int,
    first: int = 0,
    traced: tuple[str, ...] = TRACED,
) -> Iterator[tuple[str, list[str]]]:
    """Interrupt a call at every ``step``-th line: each place, and what was not put back there."""
    at = first
    while True:
        before = world()
        where = interrupted(call, at, traced)
        if not where:
            return
        after = world()
        yield where, [key for key in before if before[key] != after[key]]
        at += step
