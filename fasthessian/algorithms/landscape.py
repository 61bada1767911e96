"""The loss along one or two directions in parameter space."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasthessian.arguments import ProgressCallback, integer, positive
from fasthessian.checkpoints.call import Call
from fasthessian.checkpoints.state import State
from fasthessian.errors import InputError, InputTypeError
from fasthessian.krylov.checkpointed import keeper
from fasthessian.krylov.lockstep import Guard, leaving
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.torch_state.scopes import restored
from fasthessian.results.records import Landscape


@restored
def landscape(
    A: SymmetricOperator,
    directions: Tensor,
    span: float = 1.0,
    points: int = 21,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
    progress: ProgressCallback | None = None,
) -> Landscape:
    r"""``L(theta + alpha d0 + beta d1)`` on a grid, the loss that A is the Hessian of.

    Usually along the top eigenvectors, as in Yao et al. 2020 (PyHessian). The parameters are
    restored to the bit, also after an exception.

    Args:
        A: an operator that knows its loss: ``fh.Hessian``.
        directions: (n,), (1, n) or (2, n), of the operator's dtype. They are used as given: for
            unit vectors alpha is a distance in parameter space.
        span: the grid runs from -span to span.
        points: per direction, at least 2; with an odd number theta itself is among them.
        checkpoint: a folder in which the losses are saved every minute or so and can be resumed
            from after the call was killed, see `resume`.
        time_limit: seconds after which the losses are saved and the call is left, see `resume`.
        progress: callback, called with (losses made, losses in all) after each loss.

    Returns:
        Landscape: alphas (points,), betas (points,) or (0,), losses (points,) or
        (points, points), all float64.

    Raises:
        TypeError: A has no loss.
        ValueError: directions do not fit A, or span or points is out of range.

    Example:
        >>> import torch, fasthessian as fh
        >>> x = torch.zeros(2, requires_grad=True)
        >>> A = fh.Hessian.from_closure(lambda: (x**2).sum(), [x])
        >>> fh.landscape(A, torch.tensor([1.0, 0.0]), points=3).losses
        tensor([1., 0., 1.], dtype=torch.float64)
    """
    call = Call.of("landscape", locals(), inputs=("directions",))
    loss = _loss_of(A)
    points, span = integer("points", points, 2), positive("span", span)
    if not isinstance(directions, Tensor):
        raise InputTypeError(f"directions must be a tensor, got {type(directions).__name__}")
    directions = A.gather(directions.detach())
    rows = directions.reshape(-1, directions.shape[-1] if directions.dim() else 1)
    if directions.dim() not in (1, 2) or rows.shape[0] not in (1, 2) or rows.shape[1] != A.n:
        raise InputError(
            f"directions must have shape ({A.n},), (1, {A.n}) or (2, {A.n}), "
            f"got {tuple(directions.shape)}"
        )
    if rows.dtype != A.dtype or rows.device != A.device:
        raise InputError(
            f"directions must be {A.dtype} on {A.device}, got {rows.dtype} on {rows.device}"
        )
    alphas = torch.linspace(-span, span, points, dtype=torch.float64, device="cpu")
    betas = alphas.clone() if len(rows) == 2 else alphas[:0].clone()
    steps = [(a,) for a in alphas] if len(rows) == 1 else torch.cartesian_prod(alphas, betas)
    counter = _Counter()
    with (
        leaving([A]),
        Guard([A], call) as guard,
        keeper(call, {"": A}, {"": counter}, "losses") as kept,
    ):
        if kept.ended:
            return kept.ended[""][0]  # type: ignore[no-any-return]
        states = kept.runs[""]
        losses = states.add(
            "losses", _Losses(torch.zeros(len(steps), dtype=torch.float64, device="cpu"))
        ).losses
        while states.made < len(steps):
            kept.boundary(1)
            i = states.made
            # no matrix product: the centre must be exactly theta
            offset = sum(float(x) * row for x, row in zip(steps[i], rows, strict=True))
            losses[i] = loss(offset)
            counter.matvecs += 1
            guard.check()
            if progress is not None:
                progress(i + 1, len(losses))
        found = Landscape(
            alphas=alphas,
            betas=betas,
            losses=losses if len(rows) == 1 else losses.reshape(points, points),
        )
        kept.end("", found, [])
        kept.finish()
    return found


@dataclasses.dataclass
class _Losses(State):
    losses: Tensor  # (points,) or (points^2,), those made and zeros


class _Counter:
    matvecs = 0  # losses that this process made


def _loss_of(A: Any) -> Callable[[Any], float]:
    loss = getattr(A, "loss", None)
    if not isinstance(A, SymmetricOperator) or loss is None:
        raise InputTypeError(
            f"A must know its loss, got {type(A).__name__}; "
            "make one with fh.Hessian(model, criterion, data)"
        )
    return loss  # type: ignore[no-any-return]
