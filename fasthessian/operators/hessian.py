"""The Hessian of a model's loss, or of any scalar closure, as a symmetric operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from fasthessian.operators import parameters
from fasthessian.operators.curvature import Curvature
from fasthessian.operators.loss.closure_loss import ClosureLoss
from fasthessian.operators.loss.model_loss import Part
from fasthessian.operators.products import layer_factors as layers
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
from fasthessian.operators.torch_state.lock import exclusive


class Hessian(Curvature):
    """H = d^2 L / d theta^2 of the loss L(theta) over ``data``, known by its products.

    H v = d(g'v)/d theta, g = dL/d theta (Pearlmutter 1994, Fast exact multiplication by the
    Hessian), by double backward. L is the mean over the terms of the loss (or their sum, when the
    criterion sums), however the data are cut into batches.

    Args:
        model: a ``torch.nn.Module``. It is left as it was: parameters, buffers, ``.grad``,
            ``training`` flags and random states, also after an exception.
        criterion: a loss of ``(model, batch)`` -> scalar, told by its first parameter: that is
            called model, net, network, module or m, or annotated as a module. Or of
            ``(outputs, targets)``, as torch's are; with a mapping or an object as the batch, of
            ``(outputs, batch)``. None when the model returns the loss. A model or a loss of (model,
            batch) may return it alone, as ``.loss`` or ``["loss"]``, as the only scalar of a tuple,
            or as a dictionary of nothing but losses, whose sum is taken.
        data: a batch, a list of batches, or a re-iterable such as a DataLoader, which must yield
            the same samples at every pass (their order is free). A loss of (model, batch) takes any
            batch. A criterion takes ``(inputs, targets)``, a tuple of more (the last are the
            targets), a mapping, or an object with ``.to``. The model is called as its ``forward``
            takes them: ``inputs`` in a tuple or list as several arguments, or else as one; a
            mapping by keywords, or else as one; an object as one. A list of tensors is one batch,
            as loaders yield them, or several where a loss of (model, batch) does not take it.
        params: None for all that require gradients, or an iterable of names or parameters. Complex
            ones count as 2n real numbers, those of ``torch.view_as_real``, as ``layout`` says.
        engine: ``"retained"`` keeps the first-order graphs; ``"recompute"`` builds them at each
            product; ``"auto"`` is retained for what fits ``memory_budget`` and recompute for the
            rest. ``"forward"`` differentiates the gradient in forward mode, ``"difference"`` takes
            central differences of gradients, good to about 1e-4 in float32, for losses without
            second derivatives and without kinks: useless for ReLU networks.
        precision: None makes products in the parameters' dtype; ``"bf16"`` under autocast,
            ``"tf32"`` on the tensor cores of a GPU. Both err by 1e-3 to 1e-1: ``engine`` tells by
            how much in a product of the first batch.
        weights: ``"auto"`` counts the terms of each batch: by the options of torch's own criteria;
            for other losses by what each batch's loss is divided by in its graph, or by numbers of
            entries of the batch, tested on the gradients of the halves of up to three batches.
            ``engine`` says where that is not exact; what no weights fit is refused. Or the number
            of terms per batch, as a sequence or as a callable of a batch.
        group: None.
        mode: ``"eval"``, or ``"train"``: dropout masks are then fixed, drawn once per batch.
        memory_budget: bytes for kept graphs; None is half of the free memory.
        microbatch: samples at most that are in memory at a time: batches are cut, which changes
            nothing unless the model or the criterion couples samples (refused).
        weight_decay: adds ``weight_decay / 2 |theta|^2`` to the loss, as optimisers do.

    Attributes:
        n, dtype, device, matvecs: as of ``SymmetricOperator``.
        layout: names, shapes and places of the parameters in a flat vector.
        engine: how products are made, and why.

    Custom autograd functions are compared with central differences of their backward, at the
    construction. Where that makes no graph, and double backward is wrong without an error, their
    second derivative is made by such differences: ``engine`` names them and their error. What
    cannot be replaced is refused.

    Parameters in bfloat16 or float16 have float32 vectors. DataParallel, DistributedDataParallel
    and compiled models are unwrapped. Parameters that the loss does not use, or uses linearly, have
    zero rows; ``engine`` names those that no gradient reaches. Hooks on gradients do not act in
    products. Modules of the model that are not torch's get the flag of training where in eval mode
    alone they detach a part of the same loss.

    Changes after construction are followed, by whatever way they are written: parameters, buffers,
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
        chosen = parameters.of_closure(params)
        options = Options(engine, memory_budget=memory_budget, weight_decay=weight_decay)
        self._prepare(ClosureLoss(closure, chosen), chosen, options)
        self._watch.ignore_own_changes(trusted=False)  # versions do not show all writes
        if self._watch.written:
            warnings.warn(
                f"closure writes into {min(self._watch.written)} each time it is called, which is "
                f"not put back after products: let it write into a copy (.clone()), or call the "
                f"module that owns it",
                stacklevel=4,
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
                return gradient(self._value(part), [params[i] for i in places])

            return Difference(slope, params, part.weight)
        return DoubleBackward(self._value(part), params, part.weight)

    def _layers(
        self, model: nn.Module, part: Part, params: list[Tensor], room: float
    ) -> Layers | None:
        return layers.build(
            model,
            params,
            lambda: self._evaluated(part),
            lambda z, loss: second_derivative(loss, z),
            room,
            through=True,
        )
