"""The curvature of a network at one checkpoint: what a study measures, and the loss landscape."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasthessian.algorithms.density import density
from fasthessian.algorithms.eigsh import eigsh
from fasthessian.algorithms.landscape import landscape
from fasthessian.algorithms.trace import trace
from fasthessian.arguments import ProgressCallback
from fasthessian.errors import ConvergenceWarning
from fasthessian.operators.hessian import Hessian
from fasthessian.results.records import Estimate, Landscape
from fasthessian.study.data import ImageData, subset
from fasthessian.study.networks import Run
from fasthessian.study.recipes import Recipe
from fasthessian.study.records import Measurement
from fasthessian.study.resnet import STAGES

# The stages of the paper (blocks of equal activation resolution), and what is before and after.
GROUPS = {
    "stem": r"^stem",
    **{f"stage{stage}": rf"^stage{stage}\." for stage in STAGES},
    "head": r"^head\.",
}
TOLERANCE = 1e-3  # relative residual of the eigenvalues
VECTORS = 32  # random vectors of each trace: with 32 batches one pass, at most
# Where batches can be split, a pass has about so many random vectors, each for at least so many
# images. On ResNet-20 and all images that narrows the interval from 14 % to 5 % of the trace.
PASS_VECTORS, SHARED = 512, 4
SEARCH = 60  # products that a search for eigenvalues takes, with the check for missing ones
# Work per image, in thirds of a gradient: of a loss, a gradient, a product, and a pass for traces.
LOSS, GRADIENT, PRODUCT, TRACES = 1, 3, 7, 15

Batches = list[tuple[Tensor, Tensor]]


def measure(
    run: Run,
    epoch: int,
    mode: str,
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    start: Tensor | None = None,
    progress: ProgressCallback | None = None,
) -> tuple[Measurement, Tensor]:
    """Loss, trace, eigenvalues and density of the Hessian at a checkpoint.

    Loss, accuracy, gradient and traces are those of ``recipe.images`` training images, eigenvalues
    and density those of ``recipe.spectrum_images`` of them. All networks see the same images in the
    same batches. The cross-entropy is without weight decay, as in the paper. The random vectors are
    drawn from the seed of the run, so that they differ where the runs of a network do.

    Args:
        run: the training, which also gives the seed of the random vectors.
        epoch: finished epochs at the checkpoint.
        mode: "eval": batch normalisation with the running statistics; "train": with those of each
            batch of ``recipe.analysis_batch`` images.
        model: the network at that epoch; it is left as it is.
        data: whose training images are used.
        recipe: the numbers of images, eigenvalues and steps.
        start: (j, n) approximate eigenvectors, such as those of the checkpoint before.
        progress: callback, called with (work done, work expected) during the measurement.

    Returns:
        The record, and the eigenvectors (recipe.top, n) of its eigenvalues.

    Raises:
        ValueError: the recipe asks for more images than there are, or the loss is not finite.

    Example:
        >>> import torch
        >>> from fasthessian.study.analysis import GROUPS
        >>> list(GROUPS)
        ['stem', 'stage1', 'stage2', 'stage3', 'head']
    """
    began = time.perf_counter()
    every = batches(data, recipe.images, recipe, model)
    some = batches(data, recipe.spectrum_images, recipe, model)
    images, spectrum_images = (sum(len(y) for _, y in each) for each in (every, some))
    microbatch = shared(images, mode, recipe)
    per_pass = sum(math.ceil(len(y) / (microbatch or len(y))) for _, y in every)
    passes = math.ceil(VECTORS / per_pass)
    work = Work(
        progress,
        loss=images * LOSS,
        gradient=images * GRADIENT,
        traces=images * passes * TRACES,
        eigenvalues=spectrum_images * SEARCH * PRODUCT,
        density=spectrum_images * recipe.steps * PRODUCT,
    )
    loss, accuracy = predicted(model, every, mode)
    work.end("loss")
    A = Hessian(
        model, nn.CrossEntropyLoss(), every, mode=mode, engine="recompute", microbatch=microbatch
    )
    gradient_norm = float(A.gradient().norm())
    work.end("gradient")
    with warnings.catch_warnings():  # the record holds the intervals and residuals
        warnings.simplefilter("ignore", ConvergenceWarning)
        parts = trace(
            A.blocks(GROUPS),
            sampling="per-batch" if per_pass > 1 else "whole",
            rtol=recipe.trace_rtol,
            max_matvecs=passes,
            seed=run.seed,
            progress=work.of("traces", passes * per_pass * len(GROUPS)),
        )
        work.end("traces")
        B = Hessian(model, nn.CrossEntropyLoss(), some, mode=mode)
        pairs = eigsh(
            B, recipe.top, "LA", tol=TOLERANCE, seed=run.seed,
            start=None if start is None else start.to(B.device),
            progress=work.of("eigenvalues", SEARCH),
        )  # fmt: skip
        work.end("eigenvalues")
        shape = density(
            B,
            steps=recipe.steps,
            seed=run.seed,
            progress=work.of("density", recipe.steps),
        )
    work.end("density")
    whole, interval = of_sum(parts.values())
    found = Measurement(
        depth=run.network.depth,
        variant=run.network.variant,
        seed=run.seed,
        lr=run.lr,
        epoch=epoch,
        mode=mode,
        images=images,
        spectrum_images=spectrum_images,
        loss=loss,
        accuracy=accuracy,
        weight_norm=float(A.theta().norm()),
        gradient_norm=gradient_norm,
        top=pairs.values,
        residuals=pairs.residuals,
        converged=pairs.converged,
        trace=whole,
        trace_interval=interval,
        stages=tuple(parts),
        stage_sizes=_column(part.n for part in A.blocks(GROUPS).values()),
        stage_traces=_column(part.value for part in parts.values()),
        stage_low=_column(part.interval[0] for part in parts.values()),
        stage_high=_column(part.interval[1] for part in parts.values()),
        nodes=shape.nodes[0],
        weights=shape.weights[0],
        sigma=shape.sigma,
        matvecs=pairs.matvecs + shape.matvecs,
        passes=float(max(part.matvecs for part in parts.values())),
        seconds=time.perf_counter() - began,
    )
    return found, pairs.vectors


def surface(
    model: nn.Module,
    mode: str,
    data: ImageData,
    recipe: Recipe,
    vectors: Tensor,
    progress: ProgressCallback | None = None,
) -> Landscape:
    """The loss of ``recipe.spectrum_images`` along the first two eigenvectors.

    The span is the recipe's for all networks and epochs, so that their landscapes can be compared.

    Args:
        model: the network.
        mode: "eval" or "train", as of `measure`.
        data: whose training images are used.
        recipe: the numbers of images and points, and the span.
        vectors: (k, n) unit eigenvectors, as `measure` returns them.
        progress: callback, called with (losses made, losses in all) after each loss.
    """
    some = batches(data, recipe.spectrum_images, recipe, model)
    A = Hessian(model, nn.CrossEntropyLoss(), some, mode=mode)
    return landscape(A, vectors[:2].to(A.device), recipe.span, recipe.points, progress=progress)


def batches(data: ImageData, images: int | None, recipe: Recipe, model: nn.Module) -> Batches:
    """So many of the images that the recipe trains on, the same for all networks.

    A smaller number of images is a part of a larger one; None stands for all. They have the dtype
    and the device of the model.
    """
    like = next(model.parameters())
    samples = recipe.train_images if images is None else images
    parts = subset(data.train_x, data.train_y, samples, recipe.analysis_batch)
    return [(x.to(like), y.to(like.device)) for x, y in parts]


@torch.no_grad()
def predicted(model: nn.Module, data: Batches, mode: str) -> tuple[float, float]:
    """The loss and the accuracy over batches."""
    model = copy.deepcopy(model).train(mode == "train")  # running statistics may change
    loss, right, count = 0.0, 0, 0
    for x, y in data:
        logits = model(x)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        right += int((logits.argmax(1) == y).sum())
        count += len(y)
    return loss / count, right / count


def shared(images: int, mode: str, recipe: Recipe) -> int | None:
    """How many images have one random vector in a pass for the traces; None for whole batches.

    With the statistics of batches the terms of the loss are whole batches.

    Example:
        >>> from fasthessian.study.recipes import RECIPES
        >>> shared(4660, "eval", RECIPES["laptop"]), shared(4660, "train", RECIPES["laptop"])
        (9, None)
    """
    if mode == "train":
        return None
    return min(recipe.analysis_batch, max(SHARED, images // PASS_VECTORS))


def of_sum(parts: Iterable[Estimate]) -> tuple[float, tuple[float, float]]:
    """The sum of estimates with independent errors, and its interval at their confidence.

    The trace of a matrix is the sum of those of its diagonal blocks. To sample the blocks apart
    takes less work than a vector for the whole matrix beside them, and the elements between the
    blocks add nothing to the variance.

    Example:
        >>> import torch
        >>> part = Estimate(5.0, 1.5, (2.0, 8.0), 0.95, torch.zeros(1), 1, True)
        >>> of_sum([part, part])[0]
        10.0
    """
    found = list(parts)
    value = sum(part.value for part in found)
    half = math.hypot(*((part.interval[1] - part.interval[0]) / 2 for part in found))
    return value, (value - half, value + half)


class Work:
    """The progress of all parts of a measurement, in units of work; it never goes back."""

    def __init__(self, progress: ProgressCallback | None, **shares: int) -> None:
        """With the work that each part is expected to be."""
        self._progress, self._shares = progress, shares
        self._ended = self._done = 0

    def of(self, part: str, expected: int) -> ProgressCallback:
        """The callback of a part, called with its products made, and all of them if known."""

        def callback(made: int, total: int | None) -> None:
            if total is None:  # a search, which can take more than is expected
                total = made + expected // 2
            self._report(self._ended + self._shares[part] * made // total)

        return callback

    def end(self, part: str) -> None:
        """The part has ended."""
        self._ended += self._shares[part]
        self._report(self._ended)

    def _report(self, done: int) -> None:
        self._done = max(self._done, done)
        if self._progress is not None:
            self._progress(self._done, sum(self._shares.values()))


def _column(numbers: Iterable[float]) -> Tensor:
    return torch.tensor([float(x) for x in numbers], dtype=torch.float64, device="cpu")
