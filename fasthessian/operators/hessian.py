"""The Hessian of a model's loss, or of a closure that returns a scalar, as an operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian.arguments import positive
from fasthessian.distributed.ranks import Group
from fasthessian.operators.curvature import Curvature
from fasthessian.operators.examination import outside_of_package
from fasthessian.operators.loss.part import Part
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
from fasthessian.operators.source import divided, of_closure, of_model


class Hessian(Curvature):
    """H = d^2 L / d theta^2 of the loss L(theta) over ``data``, defined by its products.

    H v = d(g'v)/d theta with g = dL/d theta (Pearlmutter 1994, Fast exact multiplication by the
    Hessian), by double backward. L is the mean over the terms of the loss (or their sum, if the
    criterion sums). It does not depend on how the data are divided into batches.

    Args:
        model: a ``torch.nn.Module``. Its parameters, buffers, ``.grad``, ``training`` flags and the
            random states are unchanged after a call, even after an exception.
        criterion: a function of ``(outputs, targets)``, like torch's criteria; of
            ``(outputs, batch)`` if the batch is a mapping or an object; or of ``(model, batch)``.
            The last form is recognised by its first parameter, which is called model, net, network,
            module or m, or is annotated as a module. None if the model returns the loss. A model or
            a function of (model, batch) may return the loss itself, as ``.loss`` or ``["loss"]``,
            as the only scalar of a tuple, or as a dictionary of losses, which are added.
        data: a batch, a list of batches, or a re-iterable such as a DataLoader. A re-iterable must
            yield the same samples at every pass, in any order. A criterion of (model, batch)
            accepts any batch. Other criteria need ``(inputs, targets)``, a longer tuple whose last
            item is the targets, a mapping, or an object with ``.to``. The signature of ``forward``
            decides how the model is called: ``inputs`` in a tuple or list become several arguments
            or one, a mapping becomes keyword arguments or one argument, an object is one argument.
            A list of tensors is one batch, as loaders yield it. It is a list of batches if a
            criterion of (model, batch) does not accept it as one.
        params: None for all parameters that require gradients, or an iterable of names or
            parameters. A complex parameter of n numbers counts as 2n real numbers, like
            ``torch.view_as_real``.
        engine: ``"retained"`` keeps the first-order graphs; ``"recompute"`` builds them at each
            product; ``"auto"`` retains the graphs that fit ``memory_budget`` and recomputes the
            others. ``"forward"`` differentiates the gradient in forward mode. ``"difference"``
            takes central differences of gradients, with an error of about 1e-4 in float32. It is
            for losses without second derivatives, but not for losses with kinks (ReLU). For a
            fully_shard model, ``"unshard"`` and ``"regather"`` are ``"auto"`` with one of the two
            routes below, which is otherwise chosen by memory.
        precision: None computes products in the parameters' dtype, ``"bf16"`` under autocast,
            ``"tf32"`` on the tensor cores of a GPU. The last two have relative errors of 1e-3 to
            1e-1; ``engine`` gives the error for the first batch.
        weights: the number of terms per batch, as a sequence or as a callable of a batch. By
            default, ``"auto"``, the terms are counted. For torch's own criteria their options
            decide. For other losses the divisor in the graph of each batch's loss decides, or the
            number of entries of the batch, which is tested on the gradients of the halves of up to
            three batches. ``engine`` says if the count is not exact. If no weights fit, the loss is
            refused.
        group: the ranks that the data are divided over, as a process group or a DeviceMesh of one
            dimension. Each rank has the same model and passes its own share of the data, which may
            be empty (``[]``). L is then the loss over the data of all ranks, and the ranks together
            make one sum per product. All ranks must make the same calls in the same order. What a
            ``DistributedSampler`` repeats to give all ranks the same number of samples counts once.
            A rank that fails ends the call on all ranks, a hung one after 100 s (300 s at the
            start); ``fasthessian.distributed.Ranks`` sets other limits. Ranks that differ in the
            model, its values, options or versions are refused. None: one process, all of the data;
            for a fully_shard model the ranks of its mesh, the only group that it accepts.
        mode: ``"eval"`` or ``"train"``. In training mode, dropout masks are drawn once per batch
            and then stay fixed.
        memory_budget: bytes for kept graphs, and for the full parameters of a fully_shard model;
            None means half of the free memory.
        microbatch: the largest number of samples in memory at a time; larger batches are cut. A
            model or a criterion that couples the samples of a batch is refused.
        weight_decay: adds ``weight_decay / 2 |theta|^2`` to the loss, as optimisers do.

    Attributes:
        n, dtype, device, matvecs: see ``SymmetricOperator``.
        layout: names, shapes and positions of the parameters in a flat vector.
        engine: how products are made, and why.

    When the operator is built, the backward of each custom autograd function is compared with
    central differences. If a backward makes no graph, double backward is wrong without an error.
    Its second derivative is then replaced by central differences, and ``engine`` names the function
    and the error. A function that cannot be replaced is refused.

    Vectors are float32 for parameters in bfloat16 or float16. DataParallel, DistributedDataParallel
    and compiled models are unwrapped. Parameters that the loss does not use, or uses linearly, have
    zero rows; ``engine`` names the parameters that no gradient reaches. Hooks on gradients do not
    act in products. If modules that are not torch's detach a part of the loss in eval mode but not
    in training mode, and the loss is the same in both, they are set to training mode.

    A model of ``torch.distributed.fsdp.fully_shard`` (FSDP2, also with replicas: HSDP) is analysed
    as it is. All vectors are full, in the order and the shapes of the parameters before sharding,
    and equal on all ranks. Its parameters are gathered for the length of a product, or of a run
    ("unshard"). If all of them do not fit ``memory_budget`` on some rank, each is gathered where it
    is read, and again where a derivative needs it ("regather"): slower, but few of them are full at
    a time. ``engine`` names the route. Products bypass FSDP's hooks, and the module trains on bit
    for bit. Under a ``MixedPrecisionPolicy`` the products are those of the function that the module
    computes, in ``param_dtype``; ``engine`` gives the relative error. Ranks must be processes, not
    threads. CPU offloading and tensor parallelism are refused.

    Products use the current state: parameters, buffers, data in memory and the list of batches,
    attributes of the model, of the criterion and of objects that they hold, and variables and
    globals that ``forward`` and the criterion read. Some changes are not detected: objects inside
    objects inside a module, containers of the model with more than 1,000 entries, and state that
    the loss itself changes at each evaluation. If something changes while an algorithm runs, a
    RuntimeError says what changed.

    Operators in several threads make products, gradients and losses one after another. During a
    product, the model's modes and buffers and torch's global random states and switches are
    temporarily changed: other threads should not call the model or draw random numbers then.

    Raises:
        ValueError: there are no trainable parameters; the loss is not a scalar, not finite, or does
            not depend on the parameters; the data are empty; dtypes are mixed; an option is
            unknown.
        TypeError: data or batches have no known form; a parameter has an unsupported dtype.
        RuntimeError: the loader yields other samples than at the first pass; the loss differs
            between two evaluations; it cannot be differentiated twice, or its second derivative
            is wrong.
        MemoryError: a product needs too much memory; the message names the option that helps.

    Warns:
        UserWarning: the gradient of the first batch is not the derivative of its loss, because the
            loss detaches a part of itself. H is then the derivative of the gradient.

    Example:
        >>> import torch, fasthessian as fh
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> x, y = torch.eye(3), torch.zeros(3, 1)
        >>> H = fh.Hessian(model, torch.nn.MSELoss(), (x, y))
        >>> H @ torch.tensor([3.0, 0.0, 0.0])
        tensor([2., 0., 0.])
    """

    _exact = True

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
            lambda: of_model(model, criterion, data, params, weights, options),
            options,
        )

    @classmethod
    def from_closure(
        cls,
        closure: Callable[[], Tensor],
        params: Iterable[Tensor] | Mapping[str, Tensor],
        *,
        engine: str = "auto",
        group: Group = None,
        terms: float = 1.0,
        memory_budget: int | None = None,
        weight_decay: float = 0.0,
    ) -> Hessian:
        """The Hessian of ``closure()``, a scalar loss, with respect to the tensors ``params``.

        For losses that are not a criterion over batches: physics-informed networks, penalties,
        reinforcement learning. The closure may differentiate inside. Its random numbers from
        torch, NumPy or Python are the same at each call. Products use the current ``params``, and
        the current variables and globals that the closure reads. Changes more than two objects deep
        are detected only with ``engine="recompute"``.

        With a ``group`` each rank has a closure of its own. The loss is the mean of theirs, in
        which each counts by its number of ``terms``.

        The buffers of modules that the closure calls (for example the statistics of batch
        normalisation) and the ``.grad`` of tensors are unchanged after a product.

        Raises:
            RuntimeError: two calls at the same parameters give different losses; or the closure
                frees its graph, for example because it calls ``backward()``.

        Warns:
            UserWarning: the closure writes into a tensor that is not a buffer of a module it calls.

        Example:
            >>> import torch, fasthessian as fh
            >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
            >>> H = fh.Hessian.from_closure(lambda: w.pow(3).sum(), [w])
            >>> H @ torch.ones(2)
            tensor([ 6., 12.])
        """
        self = cls.__new__(cls)
        options = Options(
            engine, memory_budget=memory_budget, weight_decay=weight_decay, group=group
        )
        terms = positive("terms", terms)
        Curvature.__init__(self, lambda: of_closure(closure, params, terms), options)
        detector = self._kept.detector
        detector.ignore_own_changes(by_version=False)  # versions do not show all writes
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
