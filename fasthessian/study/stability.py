"""The edge of stability: how sharp the loss becomes under descent with a constant rate."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasthessian.algorithms.eigsh import eigsh
from fasthessian.errors import InputError
from fasthessian.operators.hessian import Hessian
from fasthessian.results.record import Record, write_whole
from fasthessian.study.data import ImageData
from fasthessian.study.figures.style import files, grid, legend, panel, scale
from fasthessian.study.sheets import Figure

WIDTH = 200  # of both hidden layers, as in the paper
TOLERANCE = 1e-2  # relative residual of an eigenvector; the eigenvalue has about its square
SAMPLES = 256  # batches whose mean is a batch sharpness
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # of Okabe and Ito (2008)

OnMeasured = Callable[[int, int], None]  # called with (steps made, steps in all)


@dataclasses.dataclass(frozen=True)
class Descent:
    """One descent of the figure: a constant rate, and how many steps it takes.

    Attributes:
        rate: learning rate eta.
        batch: images per step; None: all, which is gradient descent.
        steps: number of steps.
        every: steps between two measurements.
    """

    rate: float
    batch: int | None
    steps: int
    every: int


# The sharpness of the initial weights is 84 on CIFAR-10, and gradient descent diverges at 2 / 20.
DESCENTS = (
    Descent(2 / 30, None, 400, 20),
    Descent(2 / 40, None, 400, 20),
    Descent(2 / 60, None, 400, 20),
    Descent(2 / 30, 32, 12000, 600),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Stability(Record):
    """What was measured along one descent. ``steps[i]`` steps precede measurement i."""

    rate: float  # learning rate
    batch: int  # images per step
    images: int
    steps: Annotated[Tensor, "m", ">= 0", "ascending"]
    losses: Annotated[Tensor, "m"]  # of all images
    sharpness: Annotated[Tensor, "m"]  # largest eigenvalue of the Hessian of all images
    batch_sharpness: Annotated[Tensor, "m"]
    seconds: float

    @property
    def threshold(self) -> float:
        """2 / rate: gradient descent diverges on a quadratic that is sharper."""
        return 2 / self.rate


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
    progress: OnMeasured | None = None,
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
        progress: called after each measurement with (steps made, steps in all).

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
    for step in range(descent.steps + 1):
        if step % descent.every == 0:
            loss = A.loss()
            if not math.isfinite(loss):
                raise InputError(
                    f"descent diverged at rate={descent.rate:g} within {step} steps; "
                    "use a smaller rate"
                )
            sharpness = float(eigsh(A, 1, "LA", tol=TOLERANCE).values[0])
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
    data: ImageData,
    folder: str | os.PathLike[str],
    descents: Sequence[Descent] = DESCENTS,
    *,
    width: int = WIDTH,
    seed: int = 0,
    progress: OnMeasured | None = None,
) -> list[Stability]:
    """All descents of the figure, each from the same initial weights.

    Every descent has its own file in ``folder``, named by its settings; one whose file is there is
    read and not made again. Torch's global generator does not change.

    Args:
        data: images, of which all training images are used, and their labels.
        folder: where the files are; it is made if it is missing.
        descents: which ones.
        width: of the hidden layers.
        seed: of the weights and of the batches.
        progress: called after each measurement with (steps made, steps in all).

    Raises:
        ValueError: see ``descend``; or a file is damaged.
        OSError: the folder cannot be written.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    x, y = data.train_x, F.one_hot(data.train_y, data.classes).to(data.train_x.dtype)
    in_all, before, found = sum(descent.steps for descent in descents), 0, []
    for descent in descents:
        batch = len(y) if descent.batch is None else descent.batch
        path = place / (
            f"lr{descent.rate:g}-batch{batch}of{len(y)}-width{width}"
            f"-steps{descent.steps}by{descent.every}-seed{seed}.json"
        )
        if not path.exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = network(data, width)

            def counted(made: int, _: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + made, in_all)

            made = descend(model, x, y, descent, seed=seed, progress=counted)
            write_whole(path, json.dumps(made.to_json()).encode())
        before += descent.steps
        try:
            found.append(Stability.from_json(json.loads(path.read_bytes())))
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}); delete it, to make it again") from error
    return found


def draw(records: Sequence[Stability]) -> Figure:
    """The figure: sharpness and loss of the full-batch descents, and both sharpnesses of SGD.

    Args:
        records: what ``follow`` returns.

    Raises:
        ImportError: matplotlib is missing.
    """
    whole = [record for record in records if record.batch == record.images]
    parts = [record for record in records if record.batch < record.images]
    fig, ((left, middle, right),) = grid(1, 3, height=3.0)
    for colour, record in zip(COLOURS, whole, strict=False):
        label = f"rate 2 / {record.threshold:.3g}"
        left.axhline(record.threshold, color=colour, lw=1.0, ls="--")
        left.plot(record.steps, record.sharpness, color=colour, lw=1.3)
        middle.plot(record.steps, record.losses, color=colour, lw=1.3, label=label)
    for colour, record in zip(COLOURS, parts, strict=False):
        label = f"rate 2 / {record.threshold:.3g}, batches of {record.batch}"
        right.axhline(record.threshold, color=colour, lw=1.0, ls="--")
        right.plot(record.steps, record.sharpness, color=colour, lw=1.0, ls=":")
        right.plot(record.steps, record.batch_sharpness, color=colour, lw=1.3, label=label)
    panel(left, "Gradient descent: sharpness", "step", "largest eigenvalue")
    panel(middle, "Gradient descent: training loss", "step", "half the squared error")
    panel(right, "SGD: batch sharpness (sharpness dotted)", "step", "curvature")
    scale(middle, [float(loss) for record in whole for loss in record.losses])
    for ax in (left, right):
        ax.set_ylim(bottom=0)
    legend(fig, [*middle.get_lines(), *(x for x in right.get_lines() if x.get_label()[0] != "_")])
    png, svg = files(fig)
    return Figure(
        "stability",
        "edge-of-stability",
        "Edge of stability",
        "A network of two hidden layers with tanh, mean squared error, one-hot targets, a constant "
        f"rate and no momentum, on {records[0].images:,} images. Dashed: 2 / rate. Gradient "
        "descent settles where the sharpness is near it, and the loss falls (Cohen et al. 2021). "
        "Under SGD it is the curvature of a batch along its own gradient that grows towards it "
        "(Andreyev and Beneventano 2024).",
        png,
        svg,
    )
