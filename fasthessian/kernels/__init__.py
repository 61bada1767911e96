"""Backends of the kernel contract, and the choice between them.

A backend is a module with ``project_, update_, recur_, signs_, normal_, pack_,
softmax_curvature_`` (see ``reference``) and ``unavailable(device) -> reason | None``.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch

from fasthessian.errors import InputError, UnsupportedError
from fasthessian.kernels import native, reference
from fasthessian.kernels.triton import backend as triton_backend

BACKENDS: dict[str, ModuleType] = {
    "native": native,
    "triton": triton_backend,
    "reference": reference,
}
# in order of preference; interpreted Triton serves a CPU only if it is named
AUTOMATIC = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}


def select(device: torch.device | str, backend: str | None = None) -> ModuleType:
    """The backend module for tensors on ``device``.

    ``backend`` names it, or else the environment variable ``FASTHESSIAN_BACKEND``. Without a name,
    the first backend that can serve is chosen: native, triton (on GPUs), then reference.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the named backend cannot serve here; the message says why.
    """
    device = torch.device(device)
    name = backend or os.environ.get("FASTHESSIAN_BACKEND") or None
    if name is None:
        forced = native.unavailable() if os.environ.get("FASTHESSIAN_ISA") else None
        if forced is not None and "FASTHESSIAN_ISA" in forced and device.type == "cpu":
            raise UnsupportedError(forced)
        for candidate in AUTOMATIC.get(device.type, ()):
            if BACKENDS[candidate].unavailable(device) is None:
                return BACKENDS[candidate]
        return reference
    if name not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    module = BACKENDS[name]
    reason: str | None = module.unavailable(device)
    if reason is not None:
        raise UnsupportedError(f"backend {name!r} cannot serve: {reason}; leave backend unset")
    return module


def report() -> list[str]:
    """Which backends can serve each device here, and why the others cannot: lines of ``doctor``."""
    lines = []
    for name, module in BACKENDS.items():
        detail = getattr(module, "describe", lambda: "pure torch, every device")
        lines.append(f"{name:<10} {detail()}")
        for device in ("cpu", "cuda"):
            reason = module.unavailable(device)
            lines.append(f"{'':<10} {device + ':':<5} " + (f"no: {reason}" if reason else "yes"))
    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        try:
            lines.append(f"{device:<10} served by {select(device).NAME}")
        except (RuntimeError, ValueError) as error:
            lines.append(f"{device:<10} not served: {error}")
    return lines
