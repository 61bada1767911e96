"""What probability model a criterion stands for, and how it weighs the terms of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthessian import kernels
from fasthessian.errors import InputError
from fasthessian.operators.loss.batches import Batch, is_sequence, leaves, samples
from fasthessian.operators.loss.batches import targets as given_targets
from fasthessian.operators.loss.criteria import IGNORED, option, plain, terms
from fasthessian.operators.loss.model_loss import Part

MSE = F.mse_loss  # inside a product another stands there
STREAM = 1 << 44  # numbers between two draws of a stream
WIDENED = 1 << 22  # probabilities widened to float64 at a time: 32 MiB


class Categorical(NamedTuple):
    """Cross-entropy: the loss is ``sum_r weights_r (-log softmax(z_r)[targets_r]) / total``.

    ``axis`` is the dimension of z that holds the classes, r runs over the others.
    """

    axis: int
    targets: Tensor  # z's shape without ``axis``; anything where the weight is 0
    weights: Tensor  # float64, z's shape without ``axis``
    total: float
    exact: bool = True  # it is torch's own or a model's, without label smoothing

    def scale(self) -> Tensor:
        """Weight of each term in the loss, float64."""
        return self.weights / self.total


def categorical(criterion: Any, part: Part, z: Tensor) -> Categorical | None:
    """How cross-entropy with class indices reads the outputs z; None if the loss is another.

    Known are torch's own and classes derived from it, and log-likelihood of classes; ``candidates``
    are for other losses.

    Raises:
        ValueError: class weights together with label smoothing, whose terms have no one weight.
    """
    targets = _targets(part.batch)
    if targets is None or targets.dtype != torch.int64 or z.dim() != max(targets.dim(), 1) + 1:
        return None
    kind = plain(criterion)
    derived = isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss))
    if not is_sequence(part.batch) or not (derived or kind in (F.cross_entropy, F.nll_loss)):
        return None
    if targets.shape != (*z.shape[:1], *z.shape[2:]):
        return None
    by_class, smoothing = (option(criterion, name) for name in ("weight", "label_smoothing"))
    if by_class is not None and smoothing:
        raise InputError(
            "criterion must have class weights or label smoothing, not both: its terms would have "
            "no weights of their own"
        )
    ignored = option(criterion, "ignore_index", IGNORED)
    targets, count = targets.to(z.device), terms(criterion, part.batch)
    found = _weighed(1, targets, ignored, by_class, count)
    exact = kind in (nn.CrossEntropyLoss, F.cross_entropy) and not smoothing
    return found._replace(exact=exact)


def _weighed(
    axis: int, targets: Tensor, ignored: int, by_class: Tensor | None, count: float
) -> Categorical:
    valid = targets != ignored
    targets = torch.where(valid, targets, 0)
    weights = valid.double()
    if by_class is not None:
        weights = weights * by_class.detach().to(targets.device).double()[targets]
    return Categorical(axis, targets, weights, count)


def candidates(criterion: Any, batch: Batch, z: Tensor) -> Iterator[Categorical]:
    """Cross-entropies of z that a model's own loss or a function may be; see ``matches_slopes``.

    By every tensor of indices that fits z, at its places or, as in language models, at those of the
    next ones; negative indices are ignored; as a mean or a sum.
    """
    entries: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else ()
    if not isinstance(batch, Mapping):
        entries = reversed(batch) if is_sequence(batch) else leaves(batch)
    for targets in entries:
        if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.dim() < 1:
            continue
        for axis in sorted({1, z.dim() - 1}, reverse=True):
            shape = (*z.shape[:axis], *z.shape[axis + 1 :])
            if targets.shape != shape or not -1 < int(targets.max()) < z.shape[axis]:
                continue
            held = [targets.to(z.device)]
            if targets.dim() > 1 and axis == z.dim() - 1:
                held.append(F.pad(held[0][:, 1:], (0, 1), value=IGNORED))
            for each in held:
                index = torch.where(each < 0, IGNORED, each)
                found = _weighed(axis, index, IGNORED, None, float((each >= 0).sum()))
                for total in (found.total, 1.0):
                    yield found._replace(total=total, exact=criterion is None)


def _targets(batch: Batch) -> Tensor | None:
    found = given_targets(batch)
    return found if isinstance(found, Tensor) else None


def class_per_sample(batch: Batch) -> bool:
    """Whether the targets are indices, one for each sample."""
    targets = _targets(batch)
    whole = targets is not None and not targets.is_floating_point()
    return whole and targets is not None and targets.numel() == samples(batch)


def _residuals(found: Categorical, z: Tensor) -> Tensor:
    """The probabilities less the target's 1."""
    own = z.detach().softmax(found.axis)
    index = found.targets.unsqueeze(found.axis)
    return own.scatter_add_(found.axis, index, torch.full_like(index, -1, dtype=own.dtype))


def matches_slopes(found: Categorical, z: Tensor, slopes: Tensor) -> bool:
    """Whether the slopes dL/dz are those of the cross-entropy, as looked at in each term."""
    own = _residuals(found, z)
    own.mul_(found.scale().to(own.dtype).unsqueeze(found.axis))
    size = float(slopes.double().norm())
    return float((own - slopes).double().norm()) <= 1e-3 * size if size else not own.any()


def class_weighted(criterion: Any, batch: Batch, z: Tensor, slopes: Tensor) -> Categorical | None:
    """A cross-entropy of z that is a mean with class weights, as the slopes dL/dz show them."""
    for way in candidates(criterion, batch, z):
        own = _residuals(way, z).double()
        scale = (own * slopes).sum(way.axis) / own.square().sum(way.axis)
        scale = scale.nan_to_num().where(way.weights > 0, 0.0)
        gap = float((own * scale.unsqueeze(way.axis) - slopes).norm())
        classes = way.targets[way.weights > 0]
        by_class = scale.new_zeros(z.shape[way.axis])
        by_class[classes] = scale[way.weights > 0]
        alike = torch.allclose(by_class[way.targets] * way.weights, scale, rtol=1e-3)
        whole = abs(float(scale.sum()) - 1) <= 1e-3
        if alike and whole and gap <= 1e-3 * float(slopes.double().norm()):
            return way._replace(weights=scale.clamp(min=0), total=1.0, exact=False)
    return None


class Softmax:
    """M u of the cross-entropy, ``scale (diag p - p p') u`` a term, in place and in one kernel."""

    def __init__(self, found: Categorical, z: Tensor) -> None:
        self._z = z.detach().contiguous()
        axis = found.axis
        self._shape = math.prod(z.shape[:axis]), z.shape[axis], math.prod(z.shape[axis + 1 :])
        self._scale = found.scale().reshape(self._shape[0], self._shape[2])

    def __call__(self, u: Tensor) -> Tensor:
        """M u, written into u where it is contiguous."""
        u = u.contiguous()
        kernels.select(u.device).softmax_curvature_(
            u.view(self._shape), self._z.view(self._shape), self._scale
        )
        return u


def sampled_scores(
    found: Categorical | None, criterion: Any, part: Part, z: Tensor, seed: int, draw: int
) -> tuple[Tensor, tuple[int, ...]] | None:
    """The slope of one term's loss at a target drawn from the model, times the root of its weight.

    Draw number ``draw`` of a sample is read from the seed's stream of normals at a place of its
    own, so that the targets do not depend on how the samples are batched.

    Returns:
        Scores in z's shape and the dimensions of one term; None for a criterion that is not known
        to be a negative log-likelihood. E[s s'] is the Hessian of the criterion.
    """
    z = z.detach()

    def normals(shape: Sequence[int]) -> Tensor:
        out = torch.empty(math.prod(shape), dtype=torch.float64, device=z.device)
        each = out.numel() // max(samples(part.batch), 1)
        kernels.select(z.device).normal_(out, seed, draw * STREAM + part.first * each)
        return out.view(*shape)

    if found is not None:
        p = z.softmax(found.axis).movedim(found.axis, -1)
        drawn = _drawn(p.reshape(-1, p.shape[-1]), normals(p.shape[:-1]).reshape(-1))
        index = drawn.view(*p.shape[:-1], 1)
        s = p.scatter_add(-1, index, torch.full_like(index, -1, dtype=p.dtype))
        s = s * found.scale().sqrt().to(p.dtype).unsqueeze(-1)
        return s.movedim(-1, found.axis), (found.axis,)
    reduction = option(criterion, "reduction")
    dims = tuple(range(1, z.dim()))
    targets = _targets(part.batch)
    if reduction not in ("mean", "sum") or targets is None or not is_sequence(part.batch):
        return None
    root = 1.0 if reduction == "sum" else math.sqrt(1 / max(z.numel(), 1))
    if plain(criterion) in (nn.MSELoss, MSE):
        if reduction == "sum":  # targets may be broadcast against the outputs
            root = math.sqrt((z - targets.to(z.device)).numel() / z.numel())
        return math.sqrt(2) * root * normals(z.shape).to(z.dtype), dims
    weighted = any(option(criterion, name) is not None for name in ("weight", "pos_weight"))
    binary = plain(criterion) in (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits)
    if binary and not weighted:
        p = z.sigmoid()
        targets = torch.special.ndtr(normals(z.shape)) < p
        return root * (p - targets.to(p.dtype)), dims
    return None


def _drawn(p: Tensor, normal: Tensor) -> Tensor:
    """An index for each row of p (r, c), by where the normal's probability falls in its sums."""
    uniform = torch.special.ndtr(normal)
    found = []
    height = max(1, WIDENED // p.shape[1])
    for rows, u in zip(torch.split(p, height), torch.split(uniform, height), strict=True):
        sums = rows.double().cumsum(1)
        found.append(torch.searchsorted(sums, (u * sums[:, -1]).unsqueeze(1)).squeeze(1))
    return torch.cat(found).clamp(max=p.shape[1] - 1)
