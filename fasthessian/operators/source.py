"""The loss and the parameters that define a curvature matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fasthessian.distributed.fsdp import Shards, sharded_modules
from fasthessian.operators import parameters
from fasthessian.operators.loss.closure_loss import ClosureLoss
from fasthessian.operators.loss.model_loss import ModelLoss
from fasthessian.operators.loss.protocol import Loss
from fasthessian.operators.products.options import Options
from fasthessian.operators.torch_state.gathered import WHOLE, Gathered


class Source(NamedTuple):
    """A loss and its parameters."""

    loss: Loss
    params: dict[str, Tensor]
    note: str = ""  # text for ``engine``


def divided(model: Any) -> Gathered:
    """The full parameters of a model that ``fully_shard`` divided over ranks."""
    while hasattr(model, "_orig_mod"):  # torch.compile
        model = model._orig_mod
    return Gathered(Shards(model)) if sharded_modules(model) else WHOLE


def of_model(
    model: Any,
    criterion: Any,
    data: Any,
    params: Iterable[str] | Iterable[Tensor] | None,
    weights: str | Sequence[float] | Callable[[Any], float],
    options: Options,
    ordered: bool = False,
    scaled: bool = False,
) -> Source:
    """The loss of a model over data; see ``Hessian``.

    If ``ordered``, the matrix depends on the order of the data. If ``scaled``, the matrix of one
    batch depends on whether the loss is a sum or a mean.
    """
    model, wrapper = parameters.unwrapped(model, options.ranks)
    chosen = parameters.of_model(model, params, wrapper, options.gathered)
    like = next(iter(chosen.values()))
    loss = ModelLoss(
        model, criterion, data, weights, options.mode, like, options.microbatch, ordered, scaled,
        options.ranks, options.gathered,
    )  # fmt: skip
    return Source(loss, chosen, f"; {wrapper} unwrapped" if wrapper else "")


def of_closure(
    closure: Callable[[], Tensor],
    params: Iterable[Tensor] | Mapping[str, Tensor],
    terms: float = 1.0,
) -> Source:
    """The loss that a closure returns; see ``Hessian.from_closure``."""
    chosen = parameters.of_closure(params)
    return Source(ClosureLoss(closure, chosen, terms), chosen)
