"""How often intervals and bands hold the true value: ``python -m bench.cases.coverage [seeds]``.

Prints two Markdown tables. Trace: the share of seeds whose interval holds the trace, and the mean
number of products, for plain, deflated and `spectrum` estimates of several matrices. Density: the
share of grid points where the band holds the exact smoothed density, among those where it is high.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fasthessian as fh
from fasthessian.operators.request import Request

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rotated(values: Tensor, block: int | None = None) -> Tensor:
    """A matrix of these eigenvalues; each random eigenvector has ``block`` nonzero coordinates."""
    n = len(values)
    block = n if block is None else block
    parts = [torch.linalg.qr(normal(min(block, n - i), min(block, n - i), seed=i + 1))[0]
             for i in range(0, n, block)]  # fmt: skip
    Q = torch.block_diag(*parts)
    return (Q * values) @ Q.T


def joined(*parts: Tensor | list[float]) -> Tensor:
    return torch.cat([torch.as_tensor(part, dtype=F64) for part in parts])


def spectra(n: int = 400) -> dict[str, Tensor]:
    """The matrices of the trace table."""
    u = normal(n, seed=7)
    few = joined([0.8, 0.4, 0.4, 0.2, 0.1], torch.zeros(n - 5))
    grown = torch.diag(random(n, seed=8))
    return {
        "dense, 5 outliers": rotated(joined([90, 60, 40, 30, 20], 0.1 * normal(n - 5))),
        "low rank (10), PSD": rotated(joined(0.5 + random(10), torch.zeros(n - 10))),
        "ResNet: bulk, 10 outliers": rotated(
            joined([20, 12, 8, 6, 5, 4, 3, 2, 1.5, 1], 0.1 * normal(n - 10).abs() - 0.03)
        ),
        "power law, i^-1": rotated(torch.arange(1, n + 1, dtype=F64) ** -1),
        "power law on blocks of 8": rotated(torch.arange(1, n + 1, dtype=F64) ** -1, 8),
        "uniform": rotated(random(n)),
        "both signs, tr / std 0.4": rotated(joined(normal(n)) + 0.4),
        "diagonal + dense rank one": grown + 40 * torch.outer(u, u) / (u @ u),
        "diagonal + rank one on 5": grown + 40 * torch.outer(few, few) / (few @ few),
        "small, n = 40": rotated(normal(40) + 1),
        "small, n = 20, PSD": rotated(random(20) ** 2),
    }


class Dense(fh.SymmetricOperator):
    """A matrix that multiplies a block of vectors at once."""

    def __init__(self, M: Tensor) -> None:
        super().__init__(M.mv, len(M), dtype=M.dtype, check=False)
        self.M = M

    def _multiply(self, requests: Sequence[Request]) -> None:
        for request in requests:
            torch.mm(request.V, self.M, out=request.out)


Call = Callable[[fh.SymmetricOperator, int], fh.Estimate]


def covered(M: Tensor, seeds: int, call: Call) -> str:
    """Share of intervals that hold the trace, and mean number of products."""
    truth, hits, products = float(M.trace()), 0, 0
    for seed in range(seeds):
        found = call(Dense(M), seed)
        hits += found.interval[0] <= truth <= found.interval[1]
        products += found.matvecs
    return f"{hits / seeds:.1%}, {products / seeds:.0f}"


WAYS = {
    "Hutchinson, 5 %": dict(method="hutchinson"),
    "Hutchinson, 30 %": dict(method="hutchinson", rtol=0.3),
    "Hutchinson, 80 %": dict(method="hutchinson", rtol=0.8),
    "30 %, confidence 0.8": dict(method="hutchinson", rtol=0.3, confidence=0.8),
    "30 %, confidence 0.99": dict(method="hutchinson", rtol=0.3, confidence=0.99),
    "auto, 5 %": {},
}


def trace_table(seeds: int) -> None:
    names = [*WAYS, "deflated by 3, 30 %", "deflated by 3, 5 %", "spectrum(3), 5 %"]
    print("| spectrum | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for name, M in spectra().items():
        calls: list[Call] = [partial(sampled, o) for o in WAYS.values()]
        pairs = fh.eigsh(Dense(M), 3)
        for rtol in (0.3, 0.05):
            calls.append(partial(sampled, {"rtol": rtol, "deflate": pairs, "method": "hutchinson"}))
        calls.append(lambda A, seed: fh.spectrum(A, (3, 0), steps=20, seed=seed).trace)
        print(f"| {name} | " + " | ".join(covered(M, seeds, c) for c in calls) + " |", flush=True)


def sampled(options: dict[str, Any], A: fh.SymmetricOperator, seed: int) -> fh.Estimate:
    return fh.trace(A, seed=seed, **options)


def densities(n: int = 1500) -> dict[str, Tensor]:
    """The eigenvalues of the density table."""
    W = normal(n, n)
    return {
        "semicircle": torch.linalg.eigvalsh((W + W.T) / math.sqrt(2 * n)),
        "uniform": torch.linspace(-1, 1, n, dtype=F64),
        "ResNet: null space, bulk, outliers": joined(
            torch.zeros(n // 2), 0.3 * normal(n - n // 2 - 12), torch.linspace(3, 40, 12)
        ),
        "null space in a wide bulk": joined(torch.zeros(n // 2), normal(n - n // 2)),
        "two clusters": joined(0.05 * normal(n // 2), 1 + 0.1 * random(n - n // 2)),
        "five values": torch.tensor([-3.0, 0.0, 0.5, 4.0, 5.0], dtype=F64).repeat(n // 5),
        "both signs, power law": joined(
            torch.arange(1, n // 2 + 1) ** -0.7, -(torch.arange(1, n // 2 + 1) ** -0.7) / 2
        ),
        "exponential": -random(n).log(),
        "n = 200": normal(200),
        "n = 40": normal(40),
    }


CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("50 steps", {"steps": 50}), ("60 steps", {"steps": 60}), ("100 steps", {"steps": 100}),
    ("50 steps, 8 probes", {"steps": 50, "probes": 8}),
]  # fmt: skip
FINE = (0.01, 0.005, 0.001)  # sigma as a share of the range of the eigenvalues


def within(values: Tensor, seeds: int, options: dict[str, Any]) -> str:
    """Share of points within the band, upper edge over true value, sigma over range."""
    hits = total = 0
    ratios, widths = [], []
    for seed in range(seeds):
        n = len(values)
        # signs measure a diagonal matrix exactly, so it is rotated in blocks of 100
        A = Dense(
            rotated(values[torch.randperm(n, generator=torch.Generator().manual_seed(1))], 100)
        )
        D = fh.density(A, seed=seed, **options)
        z = (D.grid[:, None] - values) / D.sigma
        truth = torch.exp(-0.5 * z**2).mean(1) / (D.sigma * math.sqrt(2 * math.pi))
        high = truth > 0.2 * truth.max()
        hits += int(((D.lower <= truth) & (truth <= D.upper))[high].sum())
        total += int(high.sum())
        ratios.append(float((D.upper / truth)[high].median()))
        widths.append(D.sigma / float(values.max() - values.min()))
    return f"{hits / total:.1%}, {sum(ratios) / seeds:.2f}, {sum(widths) / seeds:.2%}"


def density_table(seeds: int) -> None:
    names = [name for name, _ in CHOICES] + [f"50 steps, sigma {share:.1%}" for share in FINE]
    print("| eigenvalues | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for name, values in densities().items():
        span = float(values.max() - values.min())
        options = [o for _, o in CHOICES] + [{"steps": 50, "sigma": x * span} for x in FINE]
        print(
            f"| {name} | " + " | ".join(within(values, seeds, o) for o in options) + " |",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    print("Trace: share of intervals that hold it, mean products\n")
    trace_table(seeds)
    print("\nDensity: share of points within the band, upper edge over truth, sigma over range\n")
    density_table(max(seeds // 50, 4))
