"""PyHessian's class ``hessian``, built on fasthessian's operators and algorithms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Variable

from fasthessian.algorithms.density import density
from fasthessian.algorithms.eigsh import eigsh
from fasthessian.algorithms.trace import trace
from fasthessian.arguments import integer
from fasthessian.distributed.ranks import Group, ranks_of
from fasthessian.errors import ConvergenceWarning, InputError
from fasthessian.operators.loss.batches import to_device
from fasthessian.operators.parameters import unwrapped
from fasthessian.pyhessian.arguments import (
    asks_cuda,
    check_model,
    check_source,
    device_name,
    explained,
    numbers,
    quiet,
    split_batch,
    tolerance,
)
from fasthessian.pyhessian.attributes import Attributes
from fasthessian.pyhessian.products import leave
from fasthessian.pyhessian.utils import (
    get_params_grad,
    group_add,
    group_product,
    hessian_vector_product,
    normalization,
    orthnormal,
)

# the names in PyHessian's module; scripts that import * use names of other modules from here
__all__ = [
    "Variable",
    "get_params_grad",
    "group_add",
    "group_product",
    "hessian",
    "hessian_vector_product",
    "math",
    "normalization",
    "np",
    "orthnormal",
    "torch",
]


class hessian(Attributes):
    """Eigenvalues, trace and spectral density of a loss, with PyHessian's calls and return types.

    As in PyHessian, the model is put into eval mode; a subclass that skips this ``__init__`` is
    analysed in the current mode of its model. With ``data``, the gradients and their graph replace
    what was in ``.grad``; `eigenvalues`, `trace`, `density` and `dataloader_hv_product` begin with
    ``model.zero_grad()``. A graph lives as long as this object or a ``.grad`` refers to it. Buffers
    do not change. Torch's global random state seeds the random vectors: they follow
    ``torch.manual_seed`` and differ between calls.

    Args:
        model: the module; its trainable parameters become ``params``.
        criterion: ``criterion(outputs, targets)``; None if the model returns its own loss.
        data: one batch ``(inputs, targets)``, also a mapping or a tuple with several inputs.
        dataloader: instead of ``data``, batches that can be read more than once. If a loader yields
            different batches at each pass (random augmentation, or shuffled with ``drop_last``),
            the batches of one pass are kept, with a warning.
        cuda, device: accepted for old scripts. The device is that of the parameters; asking for
            CUDA on a machine without CUDA warns once.
        group: the process group that the data are divided over, as in `fasthessian.Hessian`. Each
            rank passes its own share, ``dataloader=[]`` if it has none. All ranks get the
            results of one process with all data, and whole eigenvectors. They must make the same
            calls in the same order; reading ``gradsH`` is a call, too. It is then the gradient of
            the whole loss, whose derivative is refused: each rank has the graph of its share alone.

    Attributes:
        model, criterion, data, inputs, targets: as given, on the device.
        full_dataset: whether ``dataloader`` was given.
        device: the device of the parameters, a string.
        params: the parameters; assign ``params`` and ``gradsH`` to analyse a part of them.

    Subclasses may override `dataloader_hv_product`; if ``full_dataset`` is true, every product goes
    through it. Random numbers that it draws are the same at each product, so that H is one matrix.

    Raises:
        ValueError: not exactly one of ``data`` and ``dataloader`` is given, or no parameter is
            trainable.
        TypeError: ``dataloader`` can be read only once, or ``model`` is not a module.
        RuntimeError: the loader changes, and its batches do not fit into half of the free memory.
        MemoryError: the graph of the gradients of ``data`` does not fit.

    Errors that the model and the criterion raise on ``data`` are not changed.

    Example:
        >>> data = (torch.randn(8, 3), torch.randn(8, 1))
        >>> h = hessian(nn.Linear(3, 1), nn.MSELoss(), data=data, cuda=False)
        >>> values, vectors = h.eigenvalues(top_n=2)
        >>> len(values), [v.shape for v in vectors[0]]
        (2, [torch.Size([1, 3]), torch.Size([1])])
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any,
        data: Any = None,
        dataloader: Iterable[Any] | None = None,
        cuda: Any = True,
        *,
        device: Any = None,
        group: Group = None,
    ) -> None:
        check_model(model)
        check_source(data, dataloader)
        ranks = ranks_of(group)
        unwrapped(model, ranks)  # refuses DistributedDataParallel without group
        self._group = group
        self.model, self.criterion = model.eval(), criterion
        self.params = self._trainable()
        if not self.params:
            raise InputError("model has no trainable parameters; set requires_grad on some")
        self.device = device_name(self.params[0].device, wanted=asks_cuda(cuda, device))
        self.full_dataset = data is None
        self._initialised = True

        def take() -> list[float]:
            self.data = dataloader if data is None else data
            if data is not None:
                self.inputs, self.targets = split_batch(to_device(data, self.params[0].device))
            return [data is not None]

        given = ranks.exchanged(take, 1).any() if ranks else take()[0]
        if not given:  # on no rank
            return
        with explained():
            try:
                grads = self._differentiated(self.params)
                self._keep(self.params, grads)
            except (RuntimeError, ValueError) as error:
                try:  # second derivatives may be missing, which are not needed yet
                    grads = self._differentiated(self.params, curved=False)
                except RuntimeError:
                    raise error from None
        leave(self.params, grads)

    def eigenvalues(
        self, maxIter: int = 100, tol: float = 1e-3, top_n: int = 1
    ) -> tuple[list[float], list[list[Tensor]]]:
        """Return the eigenvalues of largest magnitude and their eigenvectors.

        Args:
            maxIter: products per eigenvalue at most; all share ``maxIter * top_n``.
            tol: accepted residual ``||Hv - lambda v||``, relative to ``|lambda|``.
            top_n: number of eigenvalues; all of them if ``H`` has fewer.

        Returns:
            The values by descending magnitude, and for each value a list of tensors shaped like
            ``params``, with unit norm over the whole list.
        """
        maxIter, top_n = integer("maxIter", maxIter, 1), integer("top_n", top_n, 1)
        rtol, seed = tolerance(tol), self._seed()
        most = maxIter * top_n
        with quiet():
            pairs, layout = self._run(
                lambda A: eigsh(
                    A, min(top_n, A.n), "LM", tol=rtol, max_matvecs=most, seed=seed, gather=True
                )
            )
        if not pairs.converged and tol > 0:
            warnings.warn(
                f"eigenvalues: {pairs.matvecs} products did not reach tol={tol:g} for all "
                f"{top_n}; the largest residual is {float(pairs.residuals.max()):.2g}, "
                "raise maxIter or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        return numbers(pairs.values), [layout.views(row) for row in pairs.vectors]

    def trace(self, maxIter: int = 100, tol: float = 1e-3) -> list[float]:
        """Return samples ``v'Hv`` for random signs ``v``; their mean estimates the trace.

        Sampling stops when the half-width of the 95 % confidence interval of the mean is at most
        ``tol`` times the mean, or after ``maxIter`` samples, with a warning. A ``tol`` of 0 asks
        for ``maxIter`` samples.
        """
        maxIter = integer("maxIter", maxIter, 1)
        rtol, seed = min(tolerance(tol), 0.999), self._seed()
        most = max(maxIter, 2)  # an interval needs two samples
        with quiet():
            estimate, _ = self._run(
                lambda A: trace(
                    A, method="hutchinson", sampling="whole", rtol=rtol, max_matvecs=most, seed=seed
                )
            )
        if not estimate.converged and 0 < tol < 1:
            low, high = estimate.interval
            warnings.warn(
                f"trace: {maxIter} samples leave the 95 % interval [{low:.4g}, {high:.4g}], "
                f"wider than tol={tol:g} allows; raise maxIter or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        samples: list[float] = numbers(estimate.samples)
        return samples[:maxIter]

    def density(self, iter: int = 100, n_v: int = 1) -> tuple[list[list[float]], list[list[float]]]:
        """Return nodes and weights of the spectral density by stochastic Lanczos quadrature.

        Args:
            iter: Lanczos steps per run.
            n_v: number of runs, each from a vector of random signs.

        Returns:
            Two lists of ``n_v`` lists of ``iter`` numbers. The weights of a run sum to 1. If H has
            fewer distinct eigenvalues than steps, the last node repeats with weight 0.
        """
        steps, probes = integer("iter", iter, 1), integer("n_v", n_v, 1)
        seed = self._seed()
        result, _ = self._run(lambda A: density(A, steps=steps, probes=probes, seed=seed))
        return numbers(result.nodes), numbers(result.weights)

    def _seed(self) -> int:
        """A seed drawn from torch's random state: that of the first rank."""
        own = int(torch.randint(1 << 56, (), device="cpu"))
        return own if self._group is None else int(ranks_of(self._group).objects(own)[0])
