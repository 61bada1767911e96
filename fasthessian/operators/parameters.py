"""The choice and validation of the parameters that a loss is differentiated by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fasthessian.distributed.fsdp import is_distributed, not_supported
from fasthessian.distributed.ranks import ALONE, Ranks
from fasthessian.distributed.wrappers import refuse_divided
from fasthessian.errors import InputError, InputTypeError, UnsupportedError
from fasthessian.operators.base import FLOATS
from fasthessian.operators.torch_state.gathered import WHOLE, Gathered
from fasthessian.vectors import Layout, real

LOW = (torch.bfloat16, torch.float16)  # vectors of these parameters are float32
COMPLEX = (torch.complex64, torch.complex128)  # vectors of these are real, see ``Layout``


def unwrapped(model: Any, ranks: Ranks = ALONE) -> tuple[Any, str]:
    """The module inside DataParallel, DistributedDataParallel or torch.compile, and their names.

    Each process makes products alone, which needs no wrapper. Wrappers hide second derivatives.

    Raises:
        ValueError: the model is a DistributedDataParallel over several ranks, but no group says
            that the products of these ranks are to be summed.
        RuntimeError: the model is wrapped by FSDP1, or is a stage of a pipeline.
    """
    refuse_divided(model)
    names = []
    while isinstance(model, nn.Module):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
            several = getattr(model, "process_group", None)
            if several is not None and several.size() > 1 and not ranks:
                raise InputError(
                    f"group must be given for a DistributedDataParallel of {several.size()} ranks, "
                    f"got None: each rank would have the matrix of its own data; pass "
                    f"group=torch.distributed.group.WORLD, or model.module if that is meant"
                )
        elif hasattr(model, "_orig_mod"):
            inner = model._orig_mod
        else:
            break
        names.append(type(model).__name__)
        model = inner
    return model, " and ".join(names)


def common_dtype(chosen: dict[str, Tensor]) -> torch.dtype:
    """The dtype of flat vectors: float64 if a parameter is float64, otherwise float32."""
    double = torch.float64 in {p.dtype.to_real() for p in chosen.values()}
    return torch.float64 if double else torch.float32


def of_model(
    model: Any, params: Any, wrapper: str = "", gathered: Gathered = WHOLE
) -> dict[str, Tensor]:
    """The model's parameters chosen by ``params``: None, names, or the parameters themselves.

    Names may carry the prefixes of a ``wrapper`` that was removed. The parameters of a fully_shard
    model are those of ``gathered``.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; "
            f"for other losses use Hessian.from_closure(closure, params)"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise InputTypeError(
            "model is or holds a ScriptModule; pass the torch.nn.Module it came from"
        )
    named = dict(model.named_parameters())
    if params is None:
        chosen: dict[str, Tensor] = {k: p for k, p in named.items() if p.requires_grad}
        if not chosen:
            raise InputError(
                f"model has no trainable parameters ({len(named)} in all, none with requires_grad)"
            )
    else:
        chosen = _pick(model, named, params, bool(wrapper))
    return accepted(gathered.replaced(chosen))


def _pick(
    model: nn.Module, named: dict[str, nn.Parameter], params: Any, prefixed: bool
) -> dict[str, Tensor]:
    if isinstance(params, (str, Tensor)) or not isinstance(params, Iterable):
        raise InputTypeError(
            f"params must be None, or an iterable of names or parameters of the model, "
            f"got {type(params).__name__}; use params=[...]"
        )
    by_id = {id(p): name for name, p in named.items()}
    # a tied parameter has several names; named_parameters keeps only the first
    by_name = dict(model.named_parameters(remove_duplicate=False))
    chosen: dict[str, Tensor] = {}
    for item in params:
        while prefixed and isinstance(item, str) and item not in by_name and "." in item:
            if not item.startswith(("module.", "_orig_mod.")):
                break
            item = item.partition(".")[2]
        found = by_name.get(item) if isinstance(item, str) else item
        name = by_id.get(id(found))
        if found is None or name is None:
            label = repr(item) if isinstance(item, str) else f"a {type(item).__name__}"
            raise InputError(
                f"params holds {label}, which is not a parameter of the model; "
                f"its names are {', '.join(list(named)[:4])}{', ...' if len(named) > 4 else ''}"
            )
        if name in chosen:
            raise InputError(f"params holds {name!r} twice")
        chosen[name] = found
    if not chosen:
        raise InputError("params is empty; pass None for all parameters")
    return chosen


def of_closure(params: Any) -> dict[str, Tensor]:
    """The tensors of a closure, by name, from a mapping, an iterable or ``named_parameters()``."""
    if isinstance(params, (str, Tensor)) or not isinstance(params, Iterable):
        raise InputTypeError(
            f"params must be an iterable of tensors or a mapping of names to tensors, "
            f"got {type(params).__name__}; use [tensor]"
        )
    items = list(params.items()) if isinstance(params, Mapping) else list(params)
    if not items:
        raise InputError("params is empty; pass the tensors that the loss depends on")
    pairs = [
        item if isinstance(item, tuple) and len(item) == 2 else (str(index), item)
        for index, item in enumerate(items)
    ]
    for name, tensor in pairs:
        if not isinstance(tensor, Tensor):
            raise InputTypeError(f"params[{name!r}] must be a tensor, got {type(tensor).__name__}")
        if is_distributed(tensor):
            raise InputTypeError(
                f"params[{name!r}] must be a plain tensor, got a DTensor; for a fully_shard model "
                f"use Hessian(model, criterion, data), whose criterion may be a function of "
                f"(model, batch)"
            )
    if len({id(tensor) for _, tensor in pairs}) < len(pairs):
        raise InputError("params holds the same tensor twice")
    return accepted(dict(pairs))


def accepted(chosen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters, or raise an exception if they cannot be used.

    All or none of them must be float64. They must be on one device and require gradients.
    """
    first_name, first = next(iter(chosen.items()))
    for name, p in chosen.items():
        if is_distributed(p):
            raise not_supported(name, p)
        if is_lazy(p):
            raise InputError(f"parameter {name!r} has no shape yet; run the model once on a batch")
        if p.dtype not in (*FLOATS, *LOW, *COMPLEX):
            way = ".to(torch.complex64)" if p.is_complex() else ".float() or .double()"
            raise InputTypeError(
                f"parameter {name!r} is {p.dtype}; accepted are torch.float32 and torch.float64, "
                f"bfloat16, float16, complex64 and complex128; use {way}"
            )
        if (p.dtype.to_real() is torch.float64) != (first.dtype.to_real() is torch.float64):
            # model.double() does not convert complex parameters
            either = p if p.is_complex() else first
            to = torch.complex64 if either.dtype is torch.complex128 else torch.complex128
            way = f"p.data = p.data.to({to}) for the complex ones"
            raise InputError(
                f"parameters mix dtypes: {first_name!r} is {first.dtype}, {name!r} is {p.dtype}; "
                f"use {way if either.is_complex() else '.float() or .double()'}"
            )
        if p.device != first.device:
            raise InputError(
                f"parameters are on several devices: {first_name!r} on {first.device}, "
                f"{name!r} on {p.device}; move them to one"
            )
        if not p.requires_grad:
            raise InputError(
                f"parameter {name!r} does not require gradients; "
                f"use requires_grad_() or leave it out of params"
            )
        if p.is_inference():
            raise InputTypeError(
                f"parameter {name!r} was made under torch.inference_mode(); "
                f"build the model outside of it"
            )
        if not p.is_leaf:
            raise InputError(f"parameter {name!r} is computed from other tensors; pass those")
    return chosen


def current(
    layout: Layout, dtypes: Mapping[str, torch.dtype], named: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The current parameters of the layout, by name.

    Raises:
        RuntimeError: a parameter was removed, or changed its shape, dtype or device.
    """
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        p = named.get(name)
        if p is None:
            raise UnsupportedError(f"parameter {name!r} left the model; build a new Hessian")
        if (real(p).shape, p.dtype, p.device) != (shape, dtypes[name], layout.device):
            raise UnsupportedError(
                f"parameter {name!r} was {tuple(shape)} {dtypes[name]} on {layout.device} and is "
                f"now {tuple(p.shape)} {p.dtype} on {p.device}; build a new Hessian"
            )
    return accepted({name: named[name] for name in layout.names})
