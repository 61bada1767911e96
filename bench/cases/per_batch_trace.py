"""The trace with a random vector for every batch: bias, coverage, variance.

    python -m bench.cases.per_batch_trace [--seeds 200]
    python -m bench.cases.per_batch_trace --cifar FOLDER [--weights FILE]

Prints two Markdown tables on three small networks, trained on digits, with 40 batches. First, what
``fh.trace(..., sampling="per-batch")`` finds in one pass over the data, over many seeds, and its
variance relative to that of one sample with the same vector for all batches, which costs as much.
Second, ways to get the interval from one pass, over 1000 seeds, by the dense matrix of each batch:
coverage, and mean width over 3.92 standard deviations of the estimate. With ``--cifar`` it prints
instead the interval of a ResNet-20 from one pass over all training images, by the number of images
that share a vector. The weights are those of a checkpoint of ``fasthessian study``.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fasthessian as fh
from fasthessian.krylov.intervals import student_t
from fasthessian.study import data, weights
from fasthessian.study.networks import Network
from fasthessian.study.sgd import train

F64 = torch.float64
BATCHES, WAY_SEEDS = 40, 1000
BATCH, SHARING = 128, (2, 4, 8, 16, 128)  # images per batch, and per random vector
Batches = list[tuple[Tensor, Tensor]]


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 10)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 6, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(24, 10),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    # how it is made, channels of its images, epochs, images per batch
    "perceptron, tanh": (perceptron, 1, 5, 32),
    "convolutions, ReLU": (convolutions, 1, 5, 32),
    "ResNet-8, width 1": (lambda: Network(8).make(10, width=1), 3, 10, 16),
}


def trained(name: str) -> tuple[nn.Module, Batches]:
    """The network in float64, and its batches."""
    make, channels, epochs, size = NETWORKS[name]
    images = data.digits(size=8, channels=channels)
    torch.manual_seed(0)
    model = make()
    train(model, images.train_x, images.train_y, epochs=epochs, batch_size=32)
    x, y = images.train_x[: size * BATCHES].double(), images.train_y[: size * BATCHES]
    return model.double(), list(zip(x.split(size), y.split(size), strict=True))


def hessian(model: nn.Module, batches: Batches) -> fh.Hessian:
    return fh.Hessian(model, nn.CrossEntropyLoss(), batches)


def dense(model: nn.Module, batches: Batches) -> Tensor:
    """The matrix of each batch (N, n, n), divided by the number of batches."""
    found = []
    for batch in batches:
        A = hessian(model, [batch])
        found.append(A @ torch.eye(A.n, dtype=F64) / len(batches))
    return torch.stack(found)


def norms(M: Tensor) -> Tensor:
    """The square of the Frobenius norm without the diagonal, of each matrix."""
    return M.square().sum((-2, -1)) - M.diagonal(dim1=-2, dim2=-1).square().sum(-1)


def runs(A: fh.Hessian, parts: Tensor, seeds: int) -> str:
    """Columns of the first table, for one pass per seed."""
    H = parts.sum(0)
    truth, whole = float(H.trace()), 2 * float(norms(H))
    values, covered = [], 0
    for seed in range(seeds):
        found = fh.trace(A, sampling="per-batch", method="hutchinson", rtol=0.99, seed=seed)
        assert found.matvecs == 1
        values.append(found.value)
        covered += found.interval[0] <= truth <= found.interval[1]
    mean, std = sum(values) / seeds, float(torch.tensor(values).std())
    return (
        f"{A.n} | {truth:.4g} | {(mean - truth) / std * math.sqrt(seeds):+.2f} | "
        f"{covered / seeds:.1%} | {std / truth:.1%} | {math.sqrt(whole) / truth:.1%} | "
        f"{whole / std**2:.1f} | {whole / (2 * float(norms(parts).sum())):.1f}"
    )


def ways(parts: Tensor) -> dict[str, str]:
    """Coverage and width of the interval from one pass, by the way to get it."""
    N, n, S = len(parts), parts.shape[1], WAY_SEEDS
    generator = torch.Generator().manual_seed(1)

    def forms(b: int) -> Tensor:
        """The vectors z = v * (H v) for a vector v of each seed, (n, S)."""
        v = torch.randint(2, (n, S), generator=generator).mul_(2).sub_(1).to(F64)
        return v * (parts[b] @ v)

    x, x2, q, half = (torch.empty(N, S, dtype=F64) for _ in range(4))
    total = torch.zeros(n, S, dtype=F64)
    for b in range(N):
        z, other = forms(b), forms(b)
        x[b], x2[b], q[b] = z.sum(0), other.sum(0), z.square().sum(0)
        half[b] = (z - other).square().sum(0) / 2
        total += z
    centred = (q.sum(0) - total.square().sum(0) / N) * N / (N - 1)
    freedom = 3 * q.sum(0).square() / q.square().sum(0)
    once, twice, fixed = x.sum(0), (x + x2).sum(0) / 2, torch.full((S,), float(N - 1))

    def row(value: Tensor, variance: Tensor, freedom: Tensor) -> str:
        quantiles = torch.tensor([student_t(0.95, int(df)) for df in freedom], dtype=F64)
        width = quantiles * variance.clamp(min=0).sqrt()
        covered = float(((value - parts.sum(0).trace()).abs() <= width).double().mean())
        return f"{covered:.1%}, {float(width.mean() / (1.96 * value.std())):.2f}"

    return {
        "as in fh.trace: squared norms of z, centred": row(once, 2 * centred, freedom),
        "squared norms of z": row(once, 2 * q.sum(0), freedom),
        "sample variance of v'Hv over the batches": row(once, N * x.var(0), fixed),
        "two vectors per batch, at twice the cost": row(twice, half.sum(0), 2 * freedom),
    }


def tables(seeds: int) -> None:
    print(
        "| network | parameters | trace | mean - trace, in standard errors | coverage at 95 % | "
        "standard deviation | that of one sample with the same vector for all batches | "
        "variance: how many times smaller | the same by the dense matrices |"
    )
    print("|---" * 9 + "|")
    found = {}
    for name in NETWORKS:
        model, batches = trained(name)
        parts = dense(model, batches)
        print(f"| {name} | {runs(hessian(model, batches), parts, seeds)} |", flush=True)
        for count in (16, BATCHES):
            found[f"{name}, {count} batches"] = ways(parts[:count])
    rows = list(next(iter(found.values())))
    print("\n| problem | " + " | ".join(rows) + " |\n|---" + "|---" * len(rows) + "|")
    for name, columns in found.items():
        print(f"| {name} | " + " | ".join(columns.values()) + " |")


def resnet20(images: data.ImageData, file: str | None, width: int = 16) -> None:
    """The table of a ResNet-20 on all training images."""
    torch.manual_seed(0)
    model = Network(20).make(images.classes, width=width)
    if file:
        weights.load(file, model)
    batches = list(zip(images.train_x.split(BATCH), images.train_y.split(BATCH), strict=True))
    named = Path(file).name if file else "weights before training"
    print(
        f"{len(images.train_y)} images in batches of {BATCH}, {named}\n\n"
        "| images per vector | trace | half the interval at 95 % | passes | seconds |\n"
        "|---:|---:|---:|---:|---:|"
    )
    for size in SHARING:
        criterion = nn.CrossEntropyLoss()
        A = fh.Hessian(model, criterion, batches, mode="eval", microbatch=size, engine="recompute")
        began = time.perf_counter()
        with warnings.catch_warnings():  # one pass, whatever its interval
            warnings.simplefilter("ignore", fh.ConvergenceWarning)
            found = fh.trace(A, sampling="per-batch", max_matvecs=1)
        seconds = time.perf_counter() - began
        half = (found.interval[1] - found.interval[0]) / 2 / found.value
        print(
            f"| {size} | {found.value:.4g} | {half:.1%} | {found.matvecs} | {seconds:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--cifar", help="folder of CIFAR-10: the ResNet-20 instead of the tables")
    parser.add_argument("--weights", help="file of the ResNet-20, such as epoch-020.safetensors")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cifar:
        resnet20(data.cifar(options.cifar), options.weights)
    else:
        tables(options.seeds)


if __name__ == "__main__":
    main()
