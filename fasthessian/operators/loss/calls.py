"""How a model and its criterion are called on a batch, and where the loss is in the result.

There are three ways to give a loss:

* ``criterion(outputs, targets)``, as torch's losses are. The model gets the rest of the batch.
* ``criterion(model, batch)``: such a function calls the model itself (``takes_model``).
* None: the model returns the loss.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fasthessian.errors import InputError, InputTypeError
from fasthessian.operators.loss.batches import Batch, described, is_sequence, leaves
from fasthessian.operators.loss.criteria import is_torch_loss
from fasthessian.operators.torch_state.module_state import own_parameters
from fasthessian.operators.torch_state.scopes import UndoLog, restore_dict, scope

MODEL = ("model", "net", "network", "module", "m")  # parameter names that ask for the model
ANY = (
    "or pass as criterion a function of (model, batch), as lambda model, batch: "
    "loss(model(batch[0]), batch[1])"
)
Values = Mapping[str, Tensor]  # by name: what replaces parameters of the model
Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional arguments and keywords
TORCH = os.path.dirname(torch.__file__) + os.sep


def takes_model(criterion: Any) -> bool:
    """Whether this is a loss of (model, batch).

    It is if its first parameter is called model, net, network, module or m, or is annotated as a
    module, and if another parameter follows.
    """
    if criterion is None or is_torch_loss(criterion):
        return False
    try:
        signature = inspect.signature(
            criterion.forward if isinstance(criterion, nn.Module) else criterion
        )
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [each for each in signature.parameters.values() if each.kind in kinds]
    if len(positional) < 2:
        return False
    annotation = positional[0].annotation
    if isinstance(annotation, str):  # from __future__ import annotations
        typed = annotation.rpartition(".")[2] == "Module"
    else:
        typed = isinstance(annotation, type) and issubclass(annotation, nn.Module)
    return typed or positional[0].name in MODEL


def call(
    model: nn.Module, criterion: Any, batch: Batch, values: Values | None = None
) -> tuple[Any, Any]:
    """The outputs of the model, and what the criterion returns; without one the outputs again."""
    args, named = arguments(model, criterion, batch)
    if values is None:
        outputs = model(*args, **named)
    else:
        with own_parameters([model]):
            outputs = functional_call(model, dict(values), args, named)
    if criterion is None:
        return outputs, outputs
    if is_torch_loss(criterion) and not isinstance(outputs, Tensor):
        return outputs, criterion(logits(outputs), _targets(batch))
    return outputs, criterion(outputs, _targets(batch))


def call_with_model(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Any],
    batch: Batch,
    values: Values | None = None,
) -> tuple[Any, Any]:
    """The last outputs of the model inside a loss(model, batch), and what that returns."""
    found: list[Any] = []
    with _recorded_outputs(model, found):
        if values is None:
            value = loss(model, batch)
        else:
            inside = {f"model.{name}": tensor for name, tensor in values.items()}
            with own_parameters([model]):
                value = functional_call(_LossModule(model, loss), inside, (batch,))
    return (found[-1] if found else None), value


@scope
def _recorded_outputs(undo: UndoLog, model: nn.Module, found: list[Any]) -> None:
    """Append the outputs of the model to ``found`` whenever it is called."""
    undo(restore_dict, model._forward_hooks, dict(model._forward_hooks))
    model.register_forward_hook(lambda module, inputs, outputs: found.append(outputs))


class _LossModule(nn.Module):
    """A loss(model, batch) as a module, so that ``functional_call`` can replace parameters."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Batch], Any]) -> None:
        super().__init__()
        self.model = model
        self._loss = functools.partial(loss)  # so that a loss module is not a submodule

    def forward(self, batch: Batch) -> Any:
        """The loss."""
        return self._loss(self.model, batch)


def arguments(model: nn.Module, criterion: Any, batch: Batch) -> Call:
    """The arguments of the model: the first form of the batch that its ``forward`` accepts.

    Raises:
        TypeError: it accepts none.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # compiled code has none
        signature = None
    forms = _forms(criterion, batch, set(signature.parameters) if signature else set())
    if signature is None:
        return forms[0]
    first = ""
    for args, named in forms:
        try:
            signature.bind(*args, **named)
        except TypeError as error:
            first = first or str(error)
        else:
            return args, named
    rule = ""
    if criterion is None:
        rule = "; criterion is None, so the model gets the whole batch"
    elif is_sequence(batch):
        rule = "; the last entry is the targets"
    raise InputTypeError(
        f"data does not fit the model and criterion: {type(model).__name__}.forward and a batch "
        f"{described(batch)}: {first}{rule}; {ANY}"
    )


def _forms(criterion: Any, batch: Batch, names: set[str]) -> list[Call]:
    """The calls that a batch may stand for, the most likely first.

    ``names`` are the names of the parameters of ``forward``.
    """
    if isinstance(batch, Mapping):
        named: Call = (), dict(batch)
        return [named] if names & set(batch) else [named, ((batch,), {})]
    if not is_sequence(batch):
        return [((batch,), {})]
    if criterion is None:
        return [(tuple(batch), {})]
    inputs = tuple(batch[:-1])
    forms: list[Call] = [(inputs, {})]
    one = inputs[0] if len(inputs) == 1 else None
    if isinstance(one, (tuple, list)) and is_sequence(one) and not hasattr(one, "_fields"):
        forms.insert(0, (tuple(one), {}))
    elif isinstance(one, Mapping) and names >= set(one):
        forms.insert(0, ((), dict(one)))
    return forms


def logits(outputs: Any) -> Any:
    """The entry or attribute ``logits`` of the outputs, if there is one; else the outputs."""
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    return getattr(outputs, "logits", outputs)


def loss_of(returned: Any, from_criterion: bool) -> tuple[Any, list[str]]:
    """The loss in what a criterion of outputs, a model or a loss of (model, batch) returned.

    That is a tensor itself, or an attribute or entry ``loss``. Unless it comes ``from_criterion``,
    also the only scalar of a tuple, or the sum over a dictionary of nothing but losses, whose names
    are returned too. None if there is no loss.
    """
    if isinstance(returned, Tensor):
        return returned, []
    loss = getattr(returned, "loss", None)
    if loss is None and isinstance(returned, Mapping):
        loss = returned.get("loss")
    if loss is not None or from_criterion:
        return returned if loss is None else loss, []
    if isinstance(returned, Mapping):
        losses = {str(name): x for name, x in returned.items() if "loss" in str(name)}
        has_total = len(losses) > 1 and any("total" in name for name in losses)
        only_losses = len(losses) == len(returned) and all(map(_is_scalar, losses.values()))
        if losses and only_losses and not has_total:
            return sum(losses.values()), [*losses]
    elif isinstance(returned, (tuple, list)):
        scalars = [each for each in returned if _is_scalar(each)]
        if len(scalars) == 1:
            return scalars[0], []
    return None, []


def without_loss(returned: Any, takes_model: bool) -> str:
    """The message if a model or a loss of (model, batch) returned no loss."""
    kind = type(returned).__name__
    if takes_model:
        return f"criterion(model, batch) returned {kind} without a loss; return the scalar alone"
    return (
        f"criterion is None, but the model returned {kind} without a loss; pass a criterion, or "
        f"labels in data, or mode='train' if it returns losses in training only; or a function "
        f"of both, as lambda model, batch: sum(model(*batch).values())"
    )


def scalar(loss: Any, origin: str) -> Tensor:
    """The loss as a 0-dimensional tensor.

    Raises:
        TypeError: not a real floating-point tensor.
        ValueError: more than one number.
    """
    if not isinstance(loss, Tensor):
        way = ""
        if isinstance(loss, (Mapping, tuple, list)):
            way = "; return the loss alone, or the sum of its entries"
        elif loss is None:
            way = "; a model that returns its loss where it gets the targets needs criterion=None"
        raise InputTypeError(f"{origin} must return a tensor, got {type(loss).__name__}{way}")
    if not loss.is_floating_point():
        raise InputTypeError(f"{origin} must return a real floating-point loss, got {loss.dtype}")
    if loss.numel() != 1:
        way = "use reduction='mean' or 'sum'"
        if origin == "model":
            way = "pass a criterion, or mode='train' if it returns its loss in training only"
        raise InputError(
            f"{origin} must return a scalar loss, got shape {tuple(loss.shape)}; {way}"
        )
    return loss.reshape(())


def explanation(error: Exception, batch: Batch, dtype: torch.dtype) -> Exception | None:
    """An error that explains an error of the first evaluation; None if the user's code raised it.

    The user's code raised it if the innermost function is not one of torch's.
    """
    words = (str(error).splitlines() or [""])[0]
    others = {t.dtype for t in leaves(batch) if t.is_floating_point()} - {dtype}
    if isinstance(error, RuntimeError) and "type" in words and others:
        return InputTypeError(
            f"data holds {', '.join(map(str, others))} but the parameters are {dtype}; "
            f"convert one of them ({words})"
        )
    if isinstance(error, TypeError) and words == "'Tensor' object is not callable":
        return InputTypeError(
            "criterion calls its first argument, which is a tensor of outputs here; if it is a "
            "loss of (model, batch), name its first parameter model: lambda model, batch: ..."
        )
    if not raised_in(error).startswith(TORCH):
        return None
    kind = InputTypeError if isinstance(error, (TypeError, AttributeError)) else InputError
    return kind(
        f"data does not fit the model and criterion: {words}; a batch is {described(batch)}; {ANY}"
    )


def raised_in(error: BaseException) -> str:
    """The file of the function that raised the error."""
    entry = error.__traceback__
    while entry is not None and entry.tb_next is not None:
        entry = entry.tb_next
    return "" if entry is None else entry.tb_frame.f_code.co_filename


def _targets(batch: Batch) -> Any:
    """What a criterion gets besides the outputs: the targets, or a batch that is no sequence."""
    return batch[-1] if is_sequence(batch) else batch


def _is_scalar(item: Any) -> bool:
    return isinstance(item, Tensor) and item.is_floating_point() and item.dim() == 0
