"""Fisher matrices: outer products of gradients, at the targets of the data or at drawn targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian.distributed.ranks import Group
from fasthessian.errors import InputError, InputTypeError
from fasthessian.operators.jmj import JMJ, Scores
from fasthessian.operators.loss.batches import samples
from fasthessian.operators.loss.criteria import is_torch_loss
from fasthessian.operators.loss.likelihood import class_per_sample, class_weighted, sampled_scores
from fasthessian.operators.loss.part import Part
from fasthessian.operators.products.linearised import Middle
from fasthessian.operators.products.options import Options
from fasthessian.operators.source import divided, of_model


class EmpiricalFisher(JMJ):
    """F = mean of g_i g_i' over the terms i of the loss, where g_i is the gradient of term i.

    F is the uncentred covariance of the gradients (Kunstner, Hennig, Balles 2019, Limitations of
    the empirical Fisher approximation). It is positive semidefinite for every criterion. It is a
    sum instead of a mean if the criterion sums. The terms of a cross-entropy are its targets: each
    valid token of a sequence, with its class weight. The terms of other criteria are the samples;
    such a criterion must be a mean or a sum over the first dimension of the outputs.

    The arguments, defaults, attributes and errors are those of ``Hessian``. In addition, the model
    must return one tensor, or an output with ``.logits``.

    Raises:
        TypeError: the output is not a tensor.
        ValueError: the first dimension of the outputs is not the number of samples.

    Example:
        >>> import torch, fasthessian as fh
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> F = fh.EmpiricalFisher(model, torch.nn.MSELoss(), (x, y))
        >>> F @ torch.tensor([1.0, 0.0])
        tensor([2., 0.])
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Any] | None,
        data: Any,
        *,
        params: Iterable[str] | Iterable[Tensor] | None = None,
        engine: str = "auto",
        precision: str | None = None,
        weights: str | Sequence[float] | Callable[[Any], float] = "auto",
        group: Group = None,
        mode: str = "eval",
        memory_budget: int | None = None,
        microbatch: int | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        options = Options(
            engine, precision, mode, memory_budget, microbatch, weight_decay, group, divided(model)
        )
        super().__init__(
            lambda: of_model(model, criterion, data, params, weights, options, scaled=True),
            options,
        )

    def _middle(self, part: Part, z: Tensor, loss: Tensor) -> Middle | None:
        (slopes,) = torch.autograd.grad(
            loss, z, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        criterion, terms = self._loss.criterion, self._loss.terms
        found = self._categorical(part, z, loss)
        if found is None and not is_torch_loss(criterion):
            found = class_weighted(criterion, part.batch, z, slopes)
        if found is not None:
            # total s_r / weight_r is the gradient of the single term r
            factor = torch.where(found.weights > 0, found.total / found.weights, 0.0)
            return Scores(slopes[None], (found.axis,), factor.to(z.dtype).unsqueeze(found.axis))
        count = samples(part.batch)
        if z.dim() == 0 or z.shape[0] != count:
            raise InputError(
                f"the outputs must have one row a sample for EmpiricalFisher ({count} here), got "
                f"shape {tuple(z.shape)}; put the batch first"
            )
        mean = 1.0 if terms.summed else float(count)
        if not terms.summed and class_per_sample(part.batch) and not self._loss.terms_vary:
            mean = self._loss.terms_of(part, loss)
        elif terms.uneven:
            raise InputError(
                "criterion must be a mean or a sum over the samples for EmpiricalFisher, but some "
                "have more terms than others here; use its sum, of which each sample has its own"
            )
        return Scores(slopes[None], tuple(range(1, z.dim())), mean)


class Fisher(JMJ):
    """The Fisher matrix of the model's predictions, with targets drawn from these predictions.

    F = E g g' over the inputs and over targets y ~ p(y | outputs), with g = -d log p / d theta. The
    expectation is estimated by Monte Carlo. F is positive semidefinite, and its mean over seeds is
    the Gauss-Newton matrix (Martens 2020, New insights and perspectives on the natural gradient
    method). Every product draws the same targets, so all products have the same matrix.

    The arguments, defaults, attributes and errors are those of ``Hessian``. In addition:

    Args:
        samples: the number of targets drawn for each term of the loss, at least 1.
        seed: the seed of the draws. The same seed gives the same matrix for any batching of the
            data.

    Raises:
        TypeError: the criterion is not supported. Supported are torch's cross-entropy, mean squared
            error and binary cross-entropy with logits (modules and functions, without label
            smoothing; only cross-entropy may have weights), and the loss that a Hugging Face model
            computes from labels.
        ValueError: samples or seed is out of range.

    Example:
        >>> import torch, fasthessian as fh
        >>> model = torch.nn.Linear(2, 3)
        >>> F = fh.Fisher(model, torch.nn.CrossEntropyLoss(), (torch.eye(2), torch.tensor([0, 1])))
        >>> bool((F @ torch.ones(F.n)).sum() >= 0)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Any] | None,
        data: Any,
        *,
        samples: int = 1,
        seed: int = 0,
        params: Iterable[str] | Iterable[Tensor] | None = None,
        engine: str = "auto",
        precision: str | None = None,
        weights: str | Sequence[float] | Callable[[Any], float] = "auto",
        group: Group = None,
        mode: str = "eval",
        memory_budget: int | None = None,
        microbatch: int | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value, least in (("samples", samples, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
        self._samples, self._seed = samples, seed
        self._own = {"samples": samples, "seed": seed}
        options = Options(
            engine, precision, mode, memory_budget, microbatch, weight_decay, group, divided(model)
        )
        # the draws of a sample depend on its position in the data
        super().__init__(
            lambda: of_model(model, criterion, data, params, weights, options, ordered=True),
            options,
        )

    def _middle(self, part: Part, z: Tensor, loss: Tensor) -> Middle | None:
        criterion = self._loss.criterion
        found = self._categorical(part, z, loss)
        found = found if found is not None and found.exact else None
        drawn = [
            sampled_scores(found, criterion, part, z, self._seed, draw)
            for draw in range(self._samples)
        ]
        if drawn[0] is None:
            name = getattr(criterion, "__name__", type(criterion).__name__)
            name = "the model's own loss" if criterion is None else name
            raise InputTypeError(
                f"criterion must be cross-entropy with class indices, mean squared error or binary "
                f"cross-entropy with logits for Fisher, as torch has them, got {name}; GaussNewton "
                f"takes any convex one"
            )
        scores = torch.stack([each[0] for each in drawn if each is not None])
        return Scores(scores, drawn[0][1], 1.0 / self._samples)
