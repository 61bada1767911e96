"""The Hessian of a model's loss, or of any scalar closure, as a symmetric operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian.operators.curvature import Curvature
from fasthessian.operators.examination import outside_of_package
from fasthessian.operators.loss.model_loss import Part
from fasthessian.operators.products import layer_factors as layers
from fasthessian.operators.products.differences import distances
from fasthessian.operators.products.engines import (
    Difference,
    DoubleBackward,
    Forward,
    Graph,
    gradient,
)
from fasthessian.operators.products.layer_factors import Layers
from fasthessian.operators.products.linearised import second_derivative
from fasthessian.operators.products.options import Options
from fasthessian.operators.request import Request
from fasthessian.operators.source import of_closure, of_model
from fasthessian.operators.torch_state.lock import exclusive


class Hessian(Curvature):
    """H = d^2 L / d theta^2 of the loss L(theta) over ``data``, known by its products.

    H v = d(g'v)/d theta, g = dL/d theta (Pearlmutter 1994, Fast exact multiplication by the
    Hessian), by double backward. L is the mean over the terms of the loss (or their sum, when the
    criterion sums), however the data are cut into batches.

    Args:
        model: a ``torch.nn.Module``. It is left as it was: parameters, buffers, ``.grad``,
            ``training`` flags and random states, also after an exception.
        criterion: a function of ``(outputs, targets)``, as torch's are; of ``(outputs, batch)``
            where the batch is a mapping or an object; or of ``(model, batch)``, recognised by its
            first parameter, which is called model, net, network, module or m, or is annotated as a
            module. None when the model returns the loss. A model or a function of (model, batch)
            may return the loss itself, as ``.loss`` or ``["loss"]``, as the only scalar of a tuple,
            or as a dictionary that holds only losses, which are added.
        data: a batch, a list of batches, or a re-iterable such as a DataLoader, which must yield
            the same samples at every pass, in any order. A criterion of (model, batch) takes any
            batch. Other criteria take ``(inputs, targets)``, a longer tuple whose last item is the
            targets, a mapping, or an object with ``.to``. The model is called as its ``forward``
            takes them: ``inputs`` in a tuple or list as several arguments, or else as one; a
            mapping by keywords, or else as one; an object as one. A list of tensors is one batch,
            as loaders yield them, or several where a criterion of (model, batch) does not take it.
        params: None for all that require gradients, or an iterable of names or parameters. A
            complex parameter of n numbers counts as the 2n real ones of ``torch.view_as_real``.
        engine: ``"retained"`` keeps the first-order graphs; ``"recompute"`` builds them at each
            product; ``"auto"`` retains what fits ``memory_budget`` and recomputes the rest.
            ``"forward"`` differentiates the gradient in forward mode. ``"difference"`` takes
            central differences of gradients, with an error of about 1e-4 in float32: for losses
            without second derivatives and without kinks, so not for ReLU networks.
        precision: None makes products in the parameters' dtype; ``"bf16"`` under autocast,
            ``"tf32"`` on the tensor cores of a GPU. Both have relative errors of 1e-3 to 1e-1;
            ``engine`` gives that of a product of the first batch.
        weights: ``"auto"`` counts the terms of each batch: by the options of torch's own criteria;
            for other losses by the divisor that the graph of each batch's loss shows, or by numbers
            of entries of the batch, tested on the gradients of the halves of up to three batches.
            ``engine`` says where that is not exact; a loss that no weights fit is refused. Or the
            number of terms per batch, as a sequence or as a callable of a batch.
        group: None.
        mode: ``"eval"``, or ``"train"``: dropout masks are then fixed, drawn once per batch.
        memory_budget: bytes for kept graphs; None is half of the free memory.
        microbatch: the largest number of samples in memory at a time: larger batches are cut. A
            model or a criterion that couples the samples of a batch is refused.
        weight_decay: adds ``weight_decay / 2 |theta|^2`` to the loss, as optimisers do.

    Attributes:
        n, dtype, device, matvecs: as of ``SymmetricOperator``.
        layout: names, shapes and places of the parameters in a flat vector.
        engine: how products are made, and why.

    Custom autograd functions are compared with central differences of their backward when the
    operator is built. If a backward makes no graph, double backward is wrong without an error: then
    the second derivative is made by such differences, and ``engine`` names the function and the
    error. What cannot be replaced is refused.

    Parameters in bfloat16 or float16 have float32 vectors. DataParallel, DistributedDataParallel
    and compiled models are unwrapped. Parameters that the loss does not use, or uses linearly, have
    zero rows; ``engine`` names those that no gradient reaches. Hooks on gradients do not act in
    products. If modules that are not torch's detach a part of the loss in eval mode but not in
    training mode, and the loss is the same, they are set to training mode.

    Changes after construction are followed, however they are made: parameters, buffers,
    data in memory and the list of batches, attributes of the model and the criterion and of objects
    that they hold, variables and globals that ``forward`` and the criterion read. Not seen are
    objects inside objects inside a module, containers of the model with more than 1,000 entries,
    and what the loss itself changes at each evaluation. A change during a run of an algorithm is
    refused: RuntimeError says what changed.

    Products, gradients and losses of operators in several threads take turns. Meanwhile the model's
    modes and buffers, and torch's global random states and switches, are those of the product:
    other threads should neither call the model nor draw random numbers from these states.

    Raises:
        ValueError: no trainable parameters; a loss that is not a scalar, not finite, or does not
            depend on the parameters; empty data; mixed dtypes; an unknown option.
        TypeError: data or batches of no known form; parameters that are no real floats.
        RuntimeError: the loader yields other samples than at the first pass; the loss differs
            between two evaluations; it cannot be differentiated twice, or its second derivative
            is wrong.
        MemoryError: a product does not fit; the message names the option that would help.

    Warns:
        UserWarning: the gradient of the first batch is not the derivative of its loss, which
            detaches a part of itself. H is then the derivative of the gradient.

    Example:
        >>> import torch, fasthessian as fh
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> x, y = torch.eye(3), torch.zeros(3, 1)
        >>> H = fh.Hessian(model, torch.nn.MSELoss(), (x, y))
        >>> H @ torch.tensor([3.0, 0.0, 0.0])
        tensor([2., 0., 0.])
    """

    _exact = True

    @exclusive
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
        group: None = None,
        mode: str = "eval",
        memory_budget: int | None = None,
        microbatch: int | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        options = Options(engine, precision, mode, memory_budget, microbatch, weight_decay, group)
        source = of_model(model, criterion, data, params, weights, options)
        super().__init__(source, options)

    @classmethod
    @exclusive
    def from_closure(
        cls,
        closure: Callable[[], Tensor],
        params: Iterable[Tensor] | Mapping[str, Tensor],
        *,
        engine: str = "auto",
        memory_budget: int | None = None,
        weight_decay: float = 0.0,
    ) -> Hessian:
        """The Hessian of ``closure()``, a scalar loss, with respect to the tensors ``params``.

        For losses that are no criterion over batches: physics-informed networks, penalties,
        reinforcement learning. The closure may differentiate inside. Its random numbers from
        torch, NumPy or Python are the same at each call. Changes of ``params`` are followed, and
        those of variables and globals that the closure reads, as far as two objects deep; what lies
        deeper only with ``engine="recompute"``.

        Modules that the closure calls keep their buffers, as the statistics of batch normalisation,
        and tensors their ``.grad``.

        Raises:
            RuntimeError: two calls at the same parameters give different losses; or the closure
                frees its graph, as that of an optimizer does by ``backward()``.

        Warns:
            UserWarning: the closure writes into a tensor that is no buffer of a module it calls.

        Example:
            >>> import torch, fasthessian as fh
            >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
            >>> H = fh.Hessian.from_closure(lambda: w.pow(3).sum(), [w])
            >>> H @ torch.ones(2)
            tensor([ 6., 12.])
        """
        self = cls.__new__(cls)
        options = Options(engine, memory_budget=memory_budget, weight_decay=weight_decay)
        Curvature.__init__(self, of_closure(closure, params), options)
        detector = self._kept.detector
        detector.ignore_own_changes(trusted=False)  # versions do not show all writes
        if detector.written:
            warnings.warn(
                f"closure writes into {min(detector.written)} each time it is called, which is "
                f"not put back after products: let it write into a copy (.clone()), or call the "
                f"module that owns it",
                stacklevel=outside_of_package(),
            )
        return self

    def _graph(self, part: Part, params: list[Tensor]) -> Graph:
        if self._options.engine == "forward":
            names = self.layout.names

            def loss(places: Sequence[int], values: Sequence[Tensor]) -> Tensor:
                named = {names[i]: value for i, value in zip(places, values, strict=True)}
                return self._loss.evaluate(part, named)[1]

            return Forward(loss, params, part.weight)
        if self._options.engine == "difference":

            def slope(places: Sequence[int]) -> Sequence[Tensor]:
                return gradient(self._evaluation.value(part), [params[i] for i in places])

            return Difference(slope, params, part.weight)
        return DoubleBackward(self._evaluation.value(part), params, part.weight)

    def _distances(self, part: Part, v: Tensor) -> tuple[float, float]:
        evaluation = self._evaluation
        evaluation.mask_(v[0])
        with evaluation.conditions() as params:
            out = torch.zeros_like(v)
            graph = self._new_graph(part._replace(weight=1.0), params)
            graph.products([Request(self, v, out)], first=True, keep=False)

            def slope(h: float) -> Tensor:
                with evaluation.moved(params, h * v[0]):
                    return self.flatten(gradient(evaluation.value(part), params))

            return distances(slope, float(self.theta().norm() or 1.0) / float(v.norm()), out[0])

    def _layers(
        self, model: nn.Module, part: Part, params: list[Tensor], room: float
    ) -> Layers | None:
        return layers.build(
            model,
            params,
            lambda: self._evaluation.outputs_and_value(part),
            lambda z, loss: second_derivative(loss, z),
            room,
            through=True,
        )
