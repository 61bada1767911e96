"""The edge of stability: how sharp the loss becomes under descent with a constant rate."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasthessian.algorithms.eigsh import eigsh
from fasthessian.arguments import ProgressCallback
from fasthessian.errors import InputError
from fasthessian.operators.hessian import Hessian
from fasthessian.operators.torch_state.random_state import seeded
from fasthessian.study.data import ImageData
from fasthessian.study.descents import Descent
from fasthessian.study.records import Stability

WIDTH = 200  # of both hidden layers, as in the paper
TOLERANCE = 1e-2  # relative residual of an eigenvector; the eigenvalue has about its square
SAMPLES = 256  # batches whose mean is a batch sharpness


def network(data: ImageData, width: int = WIDTH) -> nn.Sequential:
    """The network "fc-tanh" of Cohen et al. (2021): two hidden layers, tanh, all biases.

    Torch's global generator draws the weights.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(data.train_x[0].numel(), width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, data.classes),
    )


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance of outputs and targets, both (N, classes), mean over images."""
    return (outputs - targets).square().sum(1).mean() / 2


def batch_sharpness(model: nn.Module, x: Tensor, y: Tensor, batches: list[Tensor]) -> float:
    """The mean of g' H g / g' g over batches; g and H are those of the loss of one batch.

    Definition of Andreyev and Beneventano, "Edge of Stochastic Stability" (arXiv 2412.20553). With
    one batch of all images it is the curvature along the gradient.

    Args:
        model: maps (N, ...) to (N, classes).
        x: images (N, ...).
        y: targets (N, classes).
        batches: indices of the images of each batch.

    Example:
        >>> import torch
        >>> from fasthessian.study.stability import batch_sharpness
        >>> x, each = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), [torch.tensor([0]), torch.tensor([1])]
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> round(batch_sharpness(model, x, torch.zeros(2, 1), each), 3)
        2.5
    """
    params = list(model.parameters())
    total = 0.0
    for index in batches:
        loss = squared_error(model(x[index]), y[index])
        g = torch.cat(
            [part.flatten() for part in torch.autograd.grad(loss, params, create_graph=True)]
        )
        direction = g.detach()
        Hg = torch.autograd.grad(g @ direction, params)
        curved = torch.cat([part.flatten() for part in Hg]) @ direction
        total += float(curved / (direction @ direction))
    return total / len(batches)


def descend(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    descent: Descent,
    *,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Stability:
    """Train with a constant rate, without momentum, and measure the sharpness on the way.

    The loss is ``squared_error``. A generator of its own draws the batches, so torch's global
    generator does not change. The sharpness settles near 2 / rate (Cohen et al. 2021, "Gradient
    descent on neural networks typically occurs at the edge of stability", arXiv 2103.00065); with
    batches, it is their sharpness that grows towards 2 / rate (see ``batch_sharpness``).

    Args:
        model: maps (N, ...) to (N, classes); trained in place.
        x: images (N, ...).
        y: targets (N, classes).
        descent: rate, batch size, number of steps and of measurements.
        seed: of the order of the images, and of the batches that are measured.
        progress: called before each step and at the end with (steps made, steps in all).

    Raises:
        ValueError: a number of the descent is out of range, or the loss is no longer finite.

    Example:
        >>> import torch
        >>> from fasthessian.study.stability import Descent, descend
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> found = descend(model, x, torch.zeros(2, 1), Descent(0.1, None, 4, 2))
        >>> [round(float(value), 3) for value in found.sharpness], found.threshold
        ([2.0, 2.0, 2.0], 20.0)
    """
    count = len(y)
    batch = count if descent.batch is None else descent.batch
    for name, size, least, most in (
        ("batch", batch, 1, count),
        ("steps", descent.steps, 1, math.inf),
        ("every", descent.every, 1, descent.steps),
    ):
        if not least <= size <= most:
            raise InputError(f"{name}={size} is not in {least}..{most}")
    began = time.monotonic()
    A = Hessian(model, squared_error, (x, y))
    optimizer = torch.optim.SGD(model.parameters(), descent.rate)
    order = order_of(count, batch, torch.Generator().manual_seed(seed))
    drawn = torch.Generator().manual_seed(seed + 1)
    found: list[tuple[float, ...]] = []
    start = None
    for step in range(descent.steps + 1):
        if step % descent.every == 0:
            loss = A.loss()
            if not math.isfinite(loss):
                raise InputError(
                    f"descent diverged at rate={descent.rate:g} within {step} steps; "
                    "use a smaller rate"
                )
            pair = eigsh(A, 1, "LA", tol=TOLERANCE, start=start)
            sharpness, start = float(pair.values[0]), pair.vectors
            batches = sampled(count, batch, drawn)
            found.append((step, loss, sharpness, batch_sharpness(model, x, y, batches)))
        if progress is not None:
            progress(step, descent.steps)
        if step < descent.steps:
            index = next(order)
            optimizer.zero_grad(set_to_none=True)
            squared_error(model(x[index]), y[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    steps, losses, sharpnesses, of_batches = torch.tensor(found, dtype=torch.float64).T.unbind()
    seconds = time.monotonic() - began
    return Stability(descent.rate, batch, count, steps, losses, sharpnesses, of_batches, seconds)


def order_of(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of batch after batch: each epoch in a new order, a ragged last batch left out."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from torch.split(order[: count - count % batch], batch)


def sampled(count: int, batch: int, generator: torch.Generator) -> list[Tensor]:
    """SAMPLES batches of different images, or the one batch of all."""
    if batch == count:
        return [torch.arange(count)]
    return [torch.randperm(count, generator=generator)[:batch] for _ in range(SAMPLES)]


def follow(
    descent: Descent,
    data: ImageData,
    progress: ProgressCallback | None = None,
    *,
    width: int = WIDTH,
) -> Stability:
    """One descent of the figure on all training images; all start from the same weights.

    Torch's global generator does not change.

    Args:
        descent: which one.
        data: images and labels, on the device of the descent.
        progress: see ``descend``.
        width: of the hidden layers.

    Raises:
        ValueError: see ``descend``.
    """
    y = F.one_hot(data.train_y, data.classes).to(data.train_x.dtype)
    with seeded(0):
        model = network(data, width)
    return descend(model.to(y.device), data.train_x, y, descent, progress=progress)
