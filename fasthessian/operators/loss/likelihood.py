"""The probability model that a criterion belongs to, and the weights of its terms in a batch.

A Fisher matrix needs to know the distribution whose negative log-likelihood the loss is. For
torch's own criteria the options tell. A model's own loss, or a function, may be a cross-entropy
too: ``candidates`` lists what it may be, and ``matches_slopes`` compares the gradients.
"""

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
from fasthessian.operators.loss.criteria import (
    IGNORED,
    class_or_function,
    number_of_terms,
    option,
)
from fasthessian.operators.loss.part import Part

MSE = F.mse_loss  # torch's own: ``patches`` replaces the name during a product
DRAW = 1 << 44  # random numbers between the starts of two draws
CHUNK = 1 << 22  # probabilities converted to float64 at a time: 32 MiB


class Categorical(NamedTuple):
    """Cross-entropy: the loss is ``sum_r weights_r (-log softmax(z_r)[targets_r]) / total``.

    ``axis`` is the dimension of z that holds the classes; r runs over the other dimensions.
    """

    axis: int
    targets: Tensor  # the shape of z without ``axis``; arbitrary where the weight is 0
    weights: Tensor  # float64, the shape of z without ``axis``
    total: float
    exact: bool = True  # whether it is torch's own or a model's, without label smoothing

    def scale(self) -> Tensor:
        """The weight of each term in the loss, float64."""
        return self.weights / self.total


def categorical(criterion: Any, part: Part, z: Tensor) -> Categorical | None:
    """The cross-entropy with class indices that the criterion is; None if it is another loss.

    This knows torch's cross-entropy and negative log-likelihood, and classes derived from them. For
    other losses see ``candidates``.

    Raises:
        ValueError: class weights together with label smoothing: a term has no single weight.
    """
    targets = _targets(part.batch)
    if targets is None or targets.dtype != torch.int64 or z.dim() != max(targets.dim(), 1) + 1:
        return None
    kind = class_or_function(criterion)
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
    targets, count = targets.to(z.device), number_of_terms(criterion, part.batch)
    found = _categorical(1, targets, ignored, by_class, count)
    exact = kind in (nn.CrossEntropyLoss, F.cross_entropy) and not smoothing
    return found._replace(exact=exact)


def _categorical(
    axis: int, targets: Tensor, ignored: int, by_class: Tensor | None, total: float
) -> Categorical:
    valid = targets != ignored
    targets = torch.where(valid, targets, 0)
    weights = valid.double()
    if by_class is not None:
        weights = weights * by_class.detach().to(targets.device).double()[targets]
    return Categorical(axis, targets, weights, total)


def candidates(criterion: Any, batch: Batch, z: Tensor) -> Iterator[Categorical]:
    """The cross-entropies of z that a model's own loss, or a function, may be.

    The targets may be any tensor of indices in the batch that fits z. Each index may belong to the
    outputs at its own position or, as in language models, at the position before. Negative indices
    are ignored. The loss may be a mean or a sum.
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
            versions = [targets.to(z.device)]
            if targets.dim() > 1 and axis == z.dim() - 1:
                versions.append(F.pad(versions[0][:, 1:], (0, 1), value=IGNORED))
            for each in versions:
                index = torch.where(each < 0, IGNORED, each)
                found = _categorical(axis, index, IGNORED, None, float((each >= 0).sum()))
                for total in (found.total, 1.0):
                    yield found._replace(total=total, exact=criterion is None)


def _targets(batch: Batch) -> Tensor | None:
    found = given_targets(batch)
    return found if isinstance(found, Tensor) else None


def class_per_sample(batch: Batch) -> bool:
    """Whether the targets are indices, one per sample."""
    targets = _targets(batch)
    if targets is None or targets.is_floating_point():
        return False
    return targets.numel() == samples(batch)


def _residuals(found: Categorical, z: Tensor) -> Tensor:
    """The probabilities, minus 1 at the target: the gradient of one term in z."""
    p = z.detach().softmax(found.axis)
    index = found.targets.unsqueeze(found.axis)
    return p.scatter_add_(found.axis, index, torch.full_like(index, -1, dtype=p.dtype))


def matches_slopes(found: Categorical, z: Tensor, slopes: Tensor) -> bool:
    """Whether the slopes dL/dz are those of the cross-entropy."""
    expected = _residuals(found, z)
    expected.mul_(found.scale().to(expected.dtype).unsqueeze(found.axis))
    size = float(slopes.double().norm())
    if not size:
        return not expected.any()
    return float((expected - slopes).double().norm()) <= 1e-3 * size


def class_weighted(criterion: Any, batch: Batch, z: Tensor, slopes: Tensor) -> Categorical | None:
    """A cross-entropy of z that is a mean with class weights; None if the loss is not one.

    The slopes dL/dz tell: the scale of each term must be the same for all terms of a class, and
    the scales must sum to 1.
    """
    for found in candidates(criterion, batch, z):
        residuals = _residuals(found, z).double()
        scale = (residuals * slopes).sum(found.axis) / residuals.square().sum(found.axis)
        scale = scale.nan_to_num().where(found.weights > 0, 0.0)
        gap = float((residuals * scale.unsqueeze(found.axis) - slopes).norm())
        classes = found.targets[found.weights > 0]
        by_class = scale.new_zeros(z.shape[found.axis])
        by_class[classes] = scale[found.weights > 0]
        alike = torch.allclose(by_class[found.targets] * found.weights, scale, rtol=1e-3)
        is_mean = abs(float(scale.sum()) - 1) <= 1e-3
        if alike and is_mean and gap <= 1e-3 * float(slopes.double().norm()):
            return found._replace(weights=scale.clamp(min=0), total=1.0, exact=False)
    return None


class Softmax:
    """M u of the cross-entropy, ``scale (diag p - p p') u`` per term, by one kernel, in place."""

    def __init__(self, found: Categorical, z: Tensor) -> None:
        self._z = z.detach().contiguous()
        axis = found.axis
        self._shape = math.prod(z.shape[:axis]), z.shape[axis], math.prod(z.shape[axis + 1 :])
        self._scale = found.scale().reshape(self._shape[0], self._shape[2])

    def __call__(self, u: Tensor) -> Tensor:
        """M u; it overwrites u if u is contiguous."""
        u = u.contiguous()
        kernels.select(u.device).softmax_curvature_(
            u.view(self._shape), self._z.view(self._shape), self._scale
        )
        return u


def sampled_scores(
    found: Categorical | None, criterion: Any, part: Part, z: Tensor, seed: int, draw: int
) -> tuple[Tensor, tuple[int, ...]] | None:
    """Scores s: slopes of the loss at targets that are drawn from the model's own distribution.

    The score of a term is multiplied by the square root of the term's weight, so that E[s s'] is
    the Hessian of the criterion. The random numbers of a sample depend on its position in the data,
    on ``seed`` and on ``draw``, but not on how the samples are batched.

    Returns:
        Scores in the shape of z, and the dimensions of one term; None for a criterion that is not
        known to be a negative log-likelihood.
    """
    z = z.detach()

    def normals(shape: Sequence[int]) -> Tensor:
        out = torch.empty(math.prod(shape), dtype=torch.float64, device=z.device)
        each = out.numel() // max(samples(part.batch), 1)
        kernels.select(z.device).normal_(out, seed, draw * DRAW + part.first * each)
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
    if class_or_function(criterion) in (nn.MSELoss, MSE):
        if reduction == "sum":  # targets may be broadcast against the outputs
            root = math.sqrt((z - targets.to(z.device)).numel() / z.numel())
        return math.sqrt(2) * root * normals(z.shape).to(z.dtype), dims
    has_weights = any(option(criterion, name) is not None for name in ("weight", "pos_weight"))
    binary = class_or_function(criterion) in (
        nn.BCEWithLogitsLoss,
        F.binary_cross_entropy_with_logits,
    )
    if binary and not has_weights:
        p = z.sigmoid()
        targets = torch.special.ndtr(normals(z.shape)) < p
        return root * (p - targets.to(p.dtype)), dims
    return None


def _drawn(p: Tensor, normal: Tensor) -> Tensor:
    """One index per row of p (r, c), drawn with these probabilities.

    A standard normal number becomes a uniform one, which is looked up in the cumulative sums.
    """
    uniform = torch.special.ndtr(normal)
    found = []
    height = max(1, CHUNK // p.shape[1])
    for rows, u in zip(torch.split(p, height), torch.split(uniform, height), strict=True):
        sums = rows.double().cumsum(1)
        found.append(torch.searchsorted(sums, (u * sums[:, -1]).unsqueeze(1)).squeeze(1))
    return torch.cat(found).clamp(max=p.shape[1] - 1)
