"""Buffers, parameters and training flags of modules: changed for a while, then restored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from fasthessian.operators.torch_state.scopes import UndoLog, restore_dict, scope

Copies = dict[int, tuple[Tensor, Tensor]]  # a buffer and its copy, by the id of the buffer
Buffers = list[tuple[nn.Module, dict[str, Tensor | None]]]  # modules and their original buffers


@scope
def own_buffers(undo: UndoLog, roots: Iterable[nn.Module], copies: Copies | None = None) -> None:
    """Let the modules work on copies of their buffers: the originals are never written.

    ``copies`` keeps the copies, so that later calls with the same dictionary need not make them.
    """
    originals: Buffers = []
    undo(restore_buffers, originals)
    copies = {} if copies is None else copies
    for root in roots:
        copy_buffers(root.modules(), originals, copies)


def copy_buffers(modules: Iterable[nn.Module], originals: Buffers, copies: Copies) -> None:
    """Replace the buffers of the modules by copies, after ``originals`` got the buffers."""
    for module in modules:
        buffers = dict(module._buffers)
        originals.append((module, buffers))
        for name, buffer in buffers.items():
            if buffer is not None:
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer, buffer.detach().clone()
                module._buffers[name] = copies[id(buffer)][1]


def restore_buffers(originals: Buffers) -> None:
    """Give the modules the buffers that they had before."""
    for module, buffers in reversed(originals):
        for name in set(module._buffers) - set(buffers):  # made by the forward pass
            del module._buffers[name]
        for name, buffer in buffers.items():
            module._buffers[name] = buffer


@scope
def own_parameters(undo: UndoLog, roots: Iterable[nn.Module]) -> None:
    """Restore the parameters of the modules at the end: ``functional_call`` replaces them."""
    for root in roots:
        for module in root.modules():
            undo(restore_dict, module._parameters, dict(module._parameters))


@scope
def training(undo: UndoLog, roots: Sequence[nn.Module], mode: str) -> None:
    """Set the training flags of all modules to "train" or "eval".

    The mode "own" sets torch's own modules (``torch.nn``) to eval, and all others to train.
    """
    # The flag is set, train() is not called: a user's train() may do more, as merge adapters.
    flags = [(module, module.training) for root in roots for module in root.modules()]
    undo(_restore_flags, flags)
    for module, _ in flags:
        of_torch = _own_class(module).__module__.startswith("torch.nn.")
        module.training = mode == "train" or (mode == "own" and not of_torch)


def _own_class(module: nn.Module) -> type:
    """The class that the module had before ``fully_shard`` gave it another one."""
    classes = type(module).__mro__
    return next(each for each in classes if not each.__module__.startswith("torch.distributed"))


def _restore_flags(flags: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, before in flags:
        module.training = before


def keep_values(undo: UndoLog, params: Sequence[Tensor]) -> list[Tensor]:
    """The values of the tensors, which are restored at the end: ``p.data`` may be replaced."""
    values = [p.data for p in params]
    undo(_restore_values, params, values)
    return values


def _restore_values(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.data = value
