"""The class ``hessian`` of PyHessian over fasthessian's operators and algorithms."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian.algorithms.arguments import ConvergenceWarning, integer
from fasthessian.algorithms.density import density
from fasthessian.algorithms.eigsh import eigsh
from fasthessian.algorithms.trace import trace
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.batches import leaves, to_device
from fasthessian.operators.hessian import Hessian
from fasthessian.operators.snapshot import Snapshot
from fasthessian.operators.state import turn
from fasthessian.pyhessian.arguments import check_source, device_name, quiet, split_batch, tolerance
from fasthessian.pyhessian.products import gradients, operator, same, surroundings
from fasthessian.pyhessian.utils import hessian_vector_product
from fasthessian.vectors import Layout


class hessian:
    """Eigenvalues, trace and spectral density of a loss, with PyHessian's calls and return types.

    The model is analysed in eval mode, unless a subclass skips this ``__init__``: then in the mode
    it is in. Mode, ``.grad``, buffers and random state are left as they were; the random vectors
    follow ``torch.manual_seed`` and differ from call to call.

    Args:
        model: the module; its trainable parameters become ``params``.
        criterion: ``criterion(outputs, targets)``; None where the model returns its own loss.
        data: one batch ``(inputs, targets)``, also a mapping or a tuple with several inputs.
        dataloader: instead of ``data``, batches that can be read again and again.
        cuda: kept for old scripts. The device is the parameters'; true without CUDA warns once.

    Attributes:
        model, criterion, data, inputs, targets: as given, on the device.
        full_dataset: whether ``dataloader`` was given.
        device: the parameters' device, a string.
        params: the parameters; assign ``params`` and ``gradsH`` to analyse a part of them.

    Subclasses may override `dataloader_hv_product`; with ``full_dataset`` true every product goes
    through it. Random numbers drawn in there are the same at each product, so that H is one matrix.

    Raises:
        ValueError: not exactly one of ``data`` and ``dataloader``, or nothing to train.
        TypeError: ``dataloader`` can be read only once.

    Example:
        >>> data = (torch.randn(8, 3), torch.randn(8, 1))
        >>> h = hessian(nn.Linear(3, 1), nn.MSELoss(), data=data, cuda=False)
        >>> values, vectors = h.eigenvalues(top_n=2)
        >>> len(values), [v.shape for v in vectors[0]]
        (2, [torch.Size([1, 3]), torch.Size([1])])
    """

    model: Any
    criterion: Any
    data: Any
    full_dataset: bool
    device: str
    inputs: Any
    targets: Any
    params: list[Tensor]

    _initialised = False
    _calls = 0
    _held: tuple[tuple[Any, ...], Hessian] | None = None
    _gradients: tuple[list[Tensor], Snapshot] | None = None  # and the point they belong to
    _built: tuple[Tensor, ...] = ()  # the gradients made here, to tell them from assigned ones

    def __init__(
        self,
        model: nn.Module,
        criterion: Any,
        data: Any = None,
        dataloader: Iterable[Any] | None = None,
        cuda: Any = True,
    ) -> None:
        check_source(data, dataloader)
        self.model, self.criterion = model, criterion
        self.params = self._trainable()
        if not self.params:
            raise ValueError("model has no trainable parameters; set requires_grad on some")
        self.device = device_name(self.params[0].device, wanted=bool(cuda))
        self.full_dataset = data is None
        self._initialised = True
        if data is None:
            self.data = dataloader
            return
        self.data = data
        self.inputs, self.targets = split_batch(to_device(data, self.params[0].device))

    @property
    def gradsH(self) -> list[Tensor]:
        """Gradient tensors for all trainable parameters, or what was assigned.

        With ``data`` they carry the graph that `hessian_vector_product` differentiates; it is
        built at the first use and again after the parameters changed. With ``dataloader`` they
        are the plain mean gradient.
        """
        params = self._trainable()
        held = self._gradients
        if held is None or (self._made_here() and not held[1].matches(self._point())):
            if self.full_dataset:
                A = self._hessian(params)
                grads = A.layout.views(A.gradient())
            else:
                grads = gradients(self.model, self.criterion, self._batches(), params)
            held = self._gradients = grads, Snapshot(self._point())
            self._built = tuple(grads)
        return held[0]

    @gradsH.setter
    def gradsH(self, grads: Sequence[Tensor]) -> None:
        self._gradients = list(grads), Snapshot(self._point())

    def dataloader_hv_product(self, v: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Return ``v'Hv`` and ``Hv`` over all of the data, for ``v`` shaped like ``params``."""
        A = self._hessian(self.params)
        flat = A.flatten(list(v))
        Hv = A @ flat
        return float(flat.double() @ Hv.double()), A.layout.views(Hv)

    def eigenvalues(
        self, maxIter: int = 100, tol: float = 1e-3, top_n: int = 1
    ) -> tuple[list[float], list[list[Tensor]]]:
        """Return the eigenvalues of largest magnitude and their eigenvectors.

        Args:
            maxIter: bound on the products per eigenvalue; all share ``maxIter * top_n``.
            tol: accepted residual ``||Hv - lambda v||`` relative to ``|lambda|``.
            top_n: how many; all of them where ``H`` has fewer.

        Returns:
            The values by descending magnitude, and for each a list of tensors shaped like
            ``params``, of unit norm over the whole list.
        """
        maxIter, top_n = integer("maxIter", maxIter, 1), integer("top_n", top_n, 1)
        A, layout = self._operator()
        with quiet():
            pairs = eigsh(
                A,
                min(top_n, A.n),
                "LM",
                tol=tolerance(tol),
                max_matvecs=maxIter * top_n,
                seed=self._seed(),
            )
        if not pairs.converged and tol > 0:
            warnings.warn(
                f"eigenvalues: {pairs.matvecs} products did not reach tol={tol:g} for all "
                f"{top_n}; the largest residual is {float(pairs.residuals.max()):.2g}, "
                "raise maxIter or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        # floats that keep their precision where a script makes a tensor of them
        values: list[float] = list(pairs.values.numpy())
        return values, [layout.views(row) for row in pairs.vectors]

    def trace(self, maxIter: int = 100, tol: float = 1e-3) -> list[float]:
        """Return samples ``v'Hv`` for random signs ``v``; their mean estimates the trace.

        Sampling stops once the half-width of the mean's 95 % confidence interval is at most
        ``tol`` times the mean, or after ``maxIter`` samples, with a warning. A ``tol`` of 0 asks
        for ``maxIter`` samples.
        """
        maxIter = integer("maxIter", maxIter, 1)
        A, _ = self._operator()
        with quiet():
            estimate = trace(
                A,
                method="hutchinson",
                rtol=min(tolerance(tol), 0.999),
                max_matvecs=max(maxIter, 2),  # an interval needs two samples
                seed=self._seed(),
            )
        if not estimate.converged and 0 < tol < 1:
            low, high = estimate.interval
            warnings.warn(
                f"trace: {maxIter} samples leave the 95 % interval [{low:.4g}, {high:.4g}], "
                f"wider than tol={tol:g} allows; raise maxIter or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        samples: list[float] = estimate.samples.tolist()
        return samples[:maxIter]

    def density(self, iter: int = 100, n_v: int = 1) -> tuple[list[list[float]], list[list[float]]]:
        """Return nodes and weights of the spectral density by stochastic Lanczos quadrature.

        Args:
            iter: Lanczos steps of a run.
            n_v: runs, each from a vector of random signs.

        Returns:
            Two lists of ``n_v`` lists of ``iter`` numbers. The weights of a run sum to 1; where
            H has fewer distinct eigenvalues than steps, the last node repeats with weight 0.
        """
        steps, probes = integer("iter", iter, 1), integer("n_v", n_v, 1)
        A, _ = self._operator()
        result = density(A, steps=steps, probes=probes, seed=self._seed())
        return result.nodes.tolist(), result.weights.tolist()

    def _operator(self) -> tuple[SymmetricOperator, Layout]:
        """The product that applies, over flat vectors, and the layout of those."""
        if getattr(self, "full_dataset", True):
            method = getattr(self.dataloader_hv_product, "__func__", None)
            if method is not hessian.dataloader_hv_product:
                return operator(self._overridden, self.params)
        elif not (self._made_here() and same(self.params, self._trainable())):
            return operator(self._by_gradients, self.params)
        A = self._hessian(self.params)
        return A, A.layout

    def _trainable(self) -> list[Tensor]:
        """The trainable parameters of the model now; ``params`` where a subclass has no model."""
        model = getattr(self, "model", None)
        tensors = model.parameters() if isinstance(model, nn.Module) else self.params
        return [p for p in tensors if p.requires_grad]

    def _point(self) -> dict[Hashable, Tensor]:
        """The tensors that gradients depend on: trainable parameters, and data in memory."""
        held = [getattr(self, name, None) for name in ("inputs", "targets", "data")]
        return dict(enumerate([*self._trainable(), *leaves(held)]))

    def _hessian(self, params: Sequence[Tensor]) -> Hessian:
        """The operator of the data's loss over ``params``, kept for the next call."""
        batch = (self.data,) if self.full_dataset else (self.inputs, self.targets)
        if self.full_dataset and isinstance(self.data, (tuple, list)):
            batch = tuple(self.data)  # a list may have grown
        mode = "eval" if self._initialised or not self.model.training else "train"
        key = (self.model, self.criterion, mode, *batch, *params)
        if self._held is None or not same(self._held[0], key):
            A = Hessian(self.model, self.criterion, self._batches(), params=params, mode=mode)
            self._held = key, A
        return self._held[1]

    def _batches(self) -> Any:
        """The data in the form that the operator knows."""
        if self.full_dataset:  # there a tuple is one batch
            return list(self.data) if isinstance(self.data, tuple) else self.data
        if isinstance(self.data, Mapping):
            return self.inputs
        return (*self.inputs, self.targets) if len(self.data) > 2 else (self.inputs, self.targets)

    def _made_here(self) -> bool:
        """Whether ``gradsH`` is still what this class builds by itself."""
        return self._gradients is None or same(self._gradients[0], self._built)

    def _by_gradients(self, v: list[Tensor]) -> Sequence[Tensor]:
        """The product by ``gradsH`` and ``params`` as the user set them."""
        grads = self.gradsH
        if self._gradients is not None and not self._gradients[1].matches(self._point()):
            raise ValueError(
                "gradsH was assigned before the parameters or the data changed and belongs to "
                "their old values; make a new hessian object"
            )
        if self._made_here():  # only params was assigned
            of = {id(p): g for p, g in zip(self._trainable(), grads, strict=True)}
            if not all(id(p) in of for p in self.params):
                raise ValueError("params holds a tensor that is no parameter; assign gradsH too")
            grads = [of[id(p)] for p in self.params]
        return hessian_vector_product(grads, self.params, v)

    def _overridden(self, v: list[Tensor]) -> Sequence[Tensor | None]:
        """The product of a subclass, in the surroundings that PyHessian gave it."""
        model = getattr(self, "model", None)
        with turn(), surroundings(model, self.params, force_eval=self._initialised):
            return self.dataloader_hv_product(v)[1]

    def _seed(self) -> int:
        """A seed that follows torch's random state without using it up, new at each call."""
        self._calls += 1
        state = torch.get_rng_state().numpy().tobytes() + self._calls.to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(state, digest_size=7).digest(), "little")
