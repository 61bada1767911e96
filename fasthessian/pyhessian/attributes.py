"""The loss of a ``hessian`` object: its gradients and products, kept between calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fasthessian.distributed.ranks import Group, ranks_of
from fasthessian.errors import InputError, UnsupportedError
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.hessian import Hessian
from fasthessian.operators.loss.batches import leaves
from fasthessian.operators.loss.sources import CHANGED
from fasthessian.operators.torch_state.lock import process_lock
from fasthessian.operators.torch_state.snapshot import Snapshot
from fasthessian.pyhessian.arguments import Number, explained, one_pass
from fasthessian.pyhessian.products import gradients, operator, same, surroundings, without_graph
from fasthessian.pyhessian.utils import hessian_vector_product
from fasthessian.vectors import Layout

Result = TypeVar("Result")


class Attributes:
    """The attributes of PyHessian's class, which can be assigned, and the operator made of them."""

    model: Any
    criterion: Any
    data: Any
    full_dataset: bool
    device: str
    inputs: Any
    targets: Any
    params: list[Tensor]

    _initialised = False
    _group: Group = None
    _held: tuple[tuple[Any, ...], Hessian] | None = None
    _pass: tuple[Any, list[Any]] | None = None  # a loader that changes, and one pass over it
    _gradients: tuple[list[Tensor], Snapshot] | None = None  # with the point they belong to
    _built: tuple[Tensor, ...] = ()  # gradients made here, to distinguish them from assigned ones
    _shown = False  # whether the caller has the list of gradients

    @property
    def gradsH(self) -> list[Tensor]:
        """Gradients of all trainable parameters, or the tensors that were assigned.

        With ``data`` they have the graph that `hessian_vector_product` differentiates; it is built
        again after the parameters change. With ``dataloader`` they are the mean gradient, without a
        graph. With ``group`` they are the gradient over the data of all ranks.
        """
        params = self._trainable()
        held = self._gradients
        if held is None or (self._made_here() and not held[1].matches(self._point())):
            with explained():
                grads = self._differentiated(params)
            held = self._keep(params, grads)
        self._shown = True
        return held[0]

    @gradsH.setter
    def gradsH(self, grads: Sequence[Tensor]) -> None:
        self._gradients = list(grads), Snapshot(self._point())

    def _differentiated(self, params: list[Tensor], curved: bool = True) -> Sequence[Tensor | None]:
        """The gradients of the loss; with ``data``, they have their graph."""
        if not self.full_dataset and self._group is None:
            return gradients(self.model, self.criterion, self._batches(), params, curved)

        def mean() -> list[Tensor]:
            A = self._hessian(params)
            return A.layout.views(A.gradient())

        found = self._settled(mean)
        return found if self._group is None else without_graph(found, params)

    def _keep(
        self, params: list[Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], Snapshot]:
        """Keep gradients made here, with zeros for those that are missing."""
        pairs = zip(params, grads, strict=True)
        self._built = tuple(torch.zeros_like(p) if g is None else g for p, g in pairs)
        self._gradients, self._shown = (list(self._built), Snapshot(self._point())), False
        return self._gradients

    def dataloader_hv_product(self, v: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Return ``v'Hv`` and ``Hv`` over all of the data, for ``v`` shaped like ``params``."""
        self._clear()

        def product() -> tuple[float, list[Tensor]]:
            A = self._hessian(self.params)
            flat = A.flatten(list(v))
            Hv = A @ flat
            return Number(flat.double() @ Hv.double()), A.layout.views(Hv)

        with explained():
            return self._settled(product)

    def _clear(self) -> None:
        """Clear the gradients of the model, as PyHessian does before each product."""
        model = getattr(self, "model", None)
        if isinstance(model, nn.Module):
            model.zero_grad()

    def _run(self, algorithm: Callable[[SymmetricOperator], Result]) -> tuple[Result, Layout]:
        """The result of an algorithm on the current operator, and the layout of its vectors."""
        self._clear()

        def found() -> tuple[Result, Layout]:
            A, layout = self._operator()
            return algorithm(A), layout

        with explained():
            return self._settled(found)

    def _settled(self, work: Callable[[], Result]) -> Result:
        """The result of ``work``; if the loader proves to change, one pass of it is kept first.

        If it changes on one rank, ``work`` raises an error that says so on all.

        Raises:
            RuntimeError: products have already been made from batches of an earlier pass.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                here = any(str(e).startswith(CHANGED) for e in (error, error.__cause__))
                if not (here or (self._group is not None and CHANGED in str(error))):
                    raise
                if self._held is not None and self._held[1].matvecs:
                    raise UnsupportedError(
                        "dataloader yields other batches than at the products before; "
                        "pass dataloader=list(dataloader)"
                    ) from None
            self._keep_pass(here)

    def _keep_pass(self, here: bool) -> None:
        """Keep one pass over the loader if it changes ``here``; it may also be on another rank."""
        if self._group is None:
            self._pass = self.data, one_pass(self.data)
            return
        self._held = None  # all ranks build the operator again
        ranks = ranks_of(self._group)
        batches = ranks.together(lambda: one_pass(self.data, ranks) if here else None)
        if batches is not None:
            self._pass = self.data, batches

    def _operator(self) -> tuple[SymmetricOperator, Layout]:
        """The current operator on flat vectors, and their layout."""
        if getattr(self, "full_dataset", True):
            method = getattr(self.dataloader_hv_product, "__func__", None)
            if method is not Attributes.dataloader_hv_product:
                return operator(self._overridden, self.params)
        elif not (self._made_here() and same(self.params, self._trainable())):
            if self._group is None:
                return operator(self._by_gradients, self.params)
            if not self._made_here():
                raise InputError(
                    "gradsH must not be assigned with group, since each rank has the graph of its "
                    "share of the data alone; assign params, which is enough"
                )
        if self._made_here() and not self._shown:
            self._gradients, self._built = None, ()  # the operator has its own graphs
        A = self._hessian(self.params)
        return A, A.layout

    def _trainable(self) -> list[Tensor]:
        """The current trainable parameters; ``params`` if a subclass has no model."""
        model = getattr(self, "model", None)
        tensors = model.parameters() if isinstance(model, nn.Module) else self.params
        return [p for p in tensors if p.requires_grad]

    def _point(self) -> dict[Hashable, Tensor]:
        """The tensors that gradients depend on: trainable parameters, and data in memory."""
        held = [getattr(self, name, None) for name in ("inputs", "targets", "data")]
        return dict(enumerate([*self._trainable(), *leaves(held)]))

    def _hessian(self, params: Sequence[Tensor]) -> Hessian:
        """The Hessian of the loss over ``params``, kept for the next call."""
        batch = (self.data,) if self.full_dataset else (self.inputs, self.targets)
        if self.full_dataset and isinstance(self.data, (tuple, list)):
            batch = tuple(self.data)  # a list may have grown
        mode = "eval" if self._initialised or not self.model.training else "train"
        key = (self.model, self.criterion, mode, self._pass, *batch, *params)
        if self._held is None or not same(self._held[0], key):
            A = Hessian(
                self.model, self.criterion, self._batches(), params=params, mode=mode,
                group=self._group,
            )  # fmt: skip
            self._held = key, A
        return self._held[1]

    def _batches(self) -> Any:
        """The data in the form that ``Hessian`` accepts."""
        if self._pass is not None and self._pass[0] is self.data:
            return self._pass[1]
        if self.full_dataset:  # there a tuple is one batch
            return list(self.data) if isinstance(self.data, tuple) else self.data
        if isinstance(self.data, Mapping):
            return self.inputs
        return (*self.inputs, self.targets) if len(self.data) > 2 else (self.inputs, self.targets)

    def _made_here(self) -> bool:
        """Whether ``gradsH`` still holds the gradients that this class made."""
        return self._gradients is None or same(self._gradients[0], self._built)

    def _by_gradients(self, v: list[Tensor]) -> Sequence[Tensor]:
        """The product from ``gradsH`` and ``params`` as the user assigned them."""
        grads = self.gradsH
        if self._gradients is not None and not self._gradients[1].matches(self._point()):
            raise InputError(
                "gradsH was assigned before the parameters or the data changed and belongs to "
                "their old values; make a new hessian object"
            )
        if self._made_here():  # only params was assigned
            of = {id(p): g for p, g in zip(self._trainable(), grads, strict=True)}
            if not all(id(p) in of for p in self.params):
                raise InputError("params holds a tensor that is no parameter; assign gradsH too")
            grads = [of[id(p)] for p in self.params]
        return hessian_vector_product(grads, self.params, v)

    def _overridden(self, v: list[Tensor]) -> Sequence[Tensor | None]:
        """The product of a subclass, in the surroundings that PyHessian gives it."""
        model = getattr(self, "model", None)
        with process_lock(), surroundings(model, self.params, force_eval=self._initialised):
            return self.dataloader_hv_product(v)[1]
