"""The loss along one or two directions in parameter space."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from typing import Any

import torch
from torch import Tensor

from fasthessian.arguments import ProgressCallback, integer, positive
from fasthessian.checkpoints.call import Call
from fasthessian.checkpoints.state import State
from fasthessian.distributed.ranks import Ranks
from fasthessian.errors import InputError, InputTypeError
from fasthessian.krylov.checkpointed import keeper
from fasthessian.krylov.lockstep import Guard, leaving
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.matrix import with_loss
from fasthessian.operators.torch_state.scopes import restored
from fasthessian.results.records import Landscape, Trajectory

Range = tuple[float, float]
MARGIN = 0.15  # of the length of a trajectory along a direction, on both sides of it
MOST = 16  # points per pass over the data
ROOM = 256 << 20  # bytes for their offsets and the moved parameters
BRIEF = 1.0  # seconds: shorter passes take more points
CHEAPER = 0.8  # a point costs at most so much of what it did: larger passes pay


@restored
def landscape(
    A: SymmetricOperator,
    directions: Tensor | Trajectory,
    span: float | Range | tuple[Range, Range] | None = None,
    points: int = 21,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
    progress: ProgressCallback | None = None,
) -> Landscape:
    r"""``L(theta + alpha d0 + beta d1)`` on a grid, the loss that A is the Hessian of.

    Along the top eigenvectors, as in Yao et al. 2020 (PyHessian); along random directions of
    `filter_normalized`; on the plane of a `trajectory`; or along the line `toward` another model.
    The parameters are restored to the bit, also after an exception.

    One pass over the data evaluates up to 16 points, if their parameters take at most 256 MiB and
    passes are short or reading the data is a large part of them.

    Args:
        A: an operator that knows its loss: ``fh.Hessian``.
        directions: (n,), (1, n) or (2, n), of the operator's dtype, or a ``Trajectory``. They are
            used as given: for unit vectors alpha is a distance in parameter space.
        span: the grid runs from -span to span; for a pair (low, high) from low to high; two pairs
            are the ranges of alpha and beta. None: 1.0, and for a trajectory the ranges that hold
            all of it and theta.
        points: per direction, at least 2; with an odd number and a symmetric span theta itself is
            among them.
        checkpoint: a folder in which the losses are saved every minute or so and can be resumed
            from after the call was killed, see `resume`.
        time_limit: seconds after which the losses are saved and the call is left, see `resume`.
        progress: callback, called with (losses made, losses in all) after each pass.

    Returns:
        Landscape: alphas (points,), betas (points,) or (0,), losses (points,) or
        (points, points), trajectory (2, t) or (2, 0), all float64.

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
    matrix, points = with_loss(A), integer("points", points, 2)
    path = directions.coordinates.T.contiguous() if isinstance(directions, Trajectory) else None
    rows = _rows(A, directions.directions if isinstance(directions, Trajectory) else directions)
    ranges = _ranges(span, len(rows), path)
    axes = [torch.linspace(*ends, points, dtype=torch.float64, device="cpu") for ends in ranges]
    steps = torch.cartesian_prod(*axes).view(-1, len(rows)).tolist()
    most = max(1, min(MOST, ROOM // (2 * A.n * A.dtype.itemsize)))
    offsets = torch.empty(most, A.n, dtype=A.dtype, device=A.device)
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
        block = states.add("block", _Block())
        while states.made < len(steps):
            first = states.made
            chosen = steps[first : first + min(block.points, most)]
            kept.boundary(len(chosen))
            begun = time.monotonic()
            for offset, step in zip(offsets, chosen, strict=False):
                # no matrix product: the centre must be exactly theta
                offset.copy_(sum(x * row for x, row in zip(step, rows, strict=True)))
            losses[first : first + len(chosen)] = matrix.losses(offsets[: len(chosen)])
            counter.matvecs += len(chosen)
            guard.check()
            if progress is not None:
                progress(states.made, len(losses))
            block.adapt((time.monotonic() - begun) / len(chosen), most, A._matrix._ranks)
        found = Landscape(
            alphas=axes[0],
            betas=axes[1] if len(axes) == 2 else axes[0][:0].clone(),
            losses=losses.reshape([points] * len(axes)),
            **({} if path is None else {"trajectory": path}),
        )
        kept.end("", found, [])
        kept.finish()
    return found


@dataclasses.dataclass
class _Block(State):
    """How many points one pass over the data evaluates.

    More points share the cost of reading the data, but the call can be saved and stopped only
    between two passes. So the number is doubled while passes are brief, or while that makes a point
    cheaper.
    """

    points: int = 1  # of the next pass
    seconds: float = 0.0  # per point of the last pass; 0 before the first one

    def adapt(self, seconds: float, most: int, ranks: Ranks) -> None:
        """Choose the number for the next pass, by the seconds per point of this one."""
        brief = seconds * self.points < BRIEF
        larger = brief or not self.seconds or seconds < CHEAPER * self.seconds
        self.seconds = seconds
        if self.points < most and ranks.any([larger])[0]:
            self.points = min(2 * self.points, most)


@dataclasses.dataclass
class _Losses(State):
    losses: Tensor  # (points,) or (points^2,), those made and zeros


class _Counter:
    matvecs = 0  # losses that this process made


def _rows(A: SymmetricOperator, directions: Any) -> Tensor:
    """The directions (1, n) or (2, n)."""
    if not isinstance(directions, Tensor):
        raise InputTypeError(
            f"directions must be a tensor or a Trajectory, got {type(directions).__name__}"
        )
    directions = A.gather(directions.detach())
    rows: Tensor = directions.reshape(-1, directions.shape[-1] if directions.dim() else 1)
    if directions.dim() not in (1, 2) or rows.shape[0] not in (1, 2) or rows.shape[1] != A.n:
        raise InputError(
            f"directions must have shape ({A.n},), (1, {A.n}) or (2, {A.n}), "
            f"got {tuple(directions.shape)}"
        )
    if rows.dtype != A.dtype or rows.device != A.device:
        raise InputError(
            f"directions must be {A.dtype} on {A.device}, got {rows.dtype} on {rows.device}"
        )
    return rows


def _ranges(span: Any, count: int, path: Tensor | None) -> list[Range]:
    """The ends of the grid along each direction."""
    if span is None:
        if path is None:
            return [(-1.0, 1.0)] * count
        lows, highs = path.amin(1).clamp(max=0.0), path.amax(1).clamp(min=0.0)
        margins = MARGIN * (highs - lows)
        ends = torch.stack((lows - margins, highs + margins), 1).tolist()
        return [(low, high) for low, high in ends]
    if not isinstance(span, (tuple, list)):
        return [(-positive("span", span), positive("span", span))] * count
    pairs = list(span) if any(isinstance(x, (tuple, list)) for x in span) else [span] * count
    try:
        ranges = [(float(low), float(high)) for low, high in pairs]
    except (TypeError, ValueError):
        ranges = []
    if len(ranges) != count or not all(-math.inf < a < b < math.inf for a, b in ranges):
        each = "" if count == 1 else " or two of them, one for each direction"
        raise InputError(
            f"span must be a positive number, or a pair (low, high) with low < high{each}, "
            f"got {span!r}"
        )
    return ranges
