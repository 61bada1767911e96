"""How often `eigsh` misses an eigenvalue, and its cost: ``python -m bench.cases.missing [seeds]``.

Prints two Markdown tables. The first is over spectra with multiple eigenvalues, or with neighbours
closer than tol: how often eigsh reports convergence and a value is wrong, how often it does not
converge, and its number of products. The second, over spectra without multiple eigenvalues,
compares the products of eigsh with those of SciPy's ARPACK at the same tol. ARPACK does not search
for missing eigenvalues.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from itertools import product

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as arpack
from torch import Tensor

import fasthessian as fh

F64 = torch.float64
TOL = 1e-3
MOST = 20_000  # products per run
ENDS = ("LM", "LA", "SA", "BE")


def values(*parts: Tensor | list[float]) -> Tensor:
    return torch.cat([torch.as_tensor(part, dtype=F64) for part in parts])


def random(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=F64)


def with_copies(m: int) -> dict[str, Tensor]:
    """Spectra with eigenvalues of multiplicity m."""
    top, bottom = [9.0, 7, 5, 4, 3, 2.5, 2, 1.5], [-8.0, -6, -3.5, -2.2, -1.9]
    bulk = torch.linspace(-1, 1, 400)
    small = torch.linspace(0.01, 0.8, 300)
    return {
        "all outliers": values(values(top, bottom).repeat_interleave(m), bulk),
        "one per side": values(top, bottom, [5.0] * (m - 1), [-8.0] * (m - 1), bulk),
        "PSD, null space": values(
            values([10.0, 6, 3, 1]).repeat_interleave(m), small, torch.zeros(200)
        ),
        "every value": (random(60, seed=1) ** 3).repeat_interleave(m),
    }


def close(gap: float) -> Tensor:
    """Outliers in pairs; the relative distance within a pair is ``gap``."""
    outliers = values([9.0, 7, 5, 4, 3, -8, -6, -3.5])
    return values(outliers, outliers * (1 - gap), torch.linspace(-1, 1, 400))


def plain() -> dict[str, Tensor]:
    """Spectra without multiple eigenvalues."""
    n = 5000
    a, b = [100.0, 60, 40, 30, 20, 12, 8, 5, 3, 2, 1.5, -3], [9.0, 7, 5, 4, 3, 2.5, -8, -6, -3.5]
    c = [1.0, 1.01, 1.02, 1.03, 2, 2.02, 2.04, 3, 3.03, 3.06, 5, 5.05]
    return {
        "outliers": values(random(n - len(a), seed=0) * 0.5 - 0.05, a),
        "clustered": values(c, torch.linspace(0, 0.9, n - len(c))),
        "both signs": values(b, [-2.2], torch.linspace(-1, 1, n - len(b) - 1)),
    }


def operator(d: Tensor) -> fh.SymmetricOperator:
    return fh.SymmetricOperator(lambda v: d * v, len(d), dtype=F64, check=False)


def wanted(d: Tensor, k: int, which: str) -> Tensor:
    if which == "LM":
        return d.abs().sort(descending=True).values[:k]
    s = d.sort(descending=True).values
    if which == "SA":
        return s.flip(0)[:k]
    low = k // 2 if which == "BE" else 0
    return torch.cat([s[: k - low], s[len(s) - low :]])


def row(name: str, d: Tensor, k: int, seeds: int) -> tuple[int, int]:
    """Print one line of the first table; return the number of runs and of wrong ones."""
    wrong = silent = 0
    made = []
    for which, seed in product(ENDS, range(seeds)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fh.ConvergenceWarning)
            found = fh.eigsh(operator(d), k, which, tol=TOL, seed=seed)
        made.append(found.matvecs)
        got = found.values.abs() if which == "LM" else found.values
        right = torch.allclose(got, wanted(d, k, which), rtol=2 * TOL, atol=1e-5)
        silent += not found.converged
        wrong += found.converged and not right
    print(
        f"| {name} | {len(d)} | {k} | {wrong} of {len(made)} | {silent} "
        f"| {statistics.median(made):.0f} | {max(made)} |",
        flush=True,
    )
    return len(made), wrong


def multiplicities(seeds: int) -> None:
    print("| spectrum | n | k | converged and wrong | not converged | median products | most |")
    print("|---|---|---|---|---|---|---|")
    cases = [
        (f"{name}, x{m}", d, k)
        for m in (2, 3, 5, 10)
        for name, d in with_copies(m).items()
        for k in (1, 4, 10)
    ]
    for gap, k in product((1e-4, 5e-4, 9e-4, 2e-3), (1, 3, 6)):
        cases.append((f"pairs, gap {gap:g}", close(gap), k))
    counts = [row(*case, seeds) for case in cases]
    runs, wrong = (sum(column) for column in zip(*counts, strict=True))
    print(f"\nconverged and wrong: {wrong} of {runs} runs over {'/'.join(ENDS)}\n")


def made_by_arpack(d: Tensor, k: int, which: str, seed: int) -> int:
    count = 0

    def matvec(x: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return d.numpy() * x.ravel()

    start = np.random.default_rng(seed).standard_normal(len(d))
    A = LinearOperator((len(d), len(d)), matvec=matvec, dtype=float)
    arpack(A, k, which=which, tol=TOL, v0=start)
    return count


def products(seeds: int) -> None:
    print("| spectrum | which | k | ARPACK | eigsh | ratio |")
    print("|---|---|---|---|---|---|")
    for (name, d), k, which in product(plain().items(), (1, 5, 10), ENDS):
        if which == "BE" and k == 1:
            continue
        theirs = statistics.mean(made_by_arpack(d, k, which, seed) for seed in range(seeds))
        runs = [
            fh.eigsh(operator(d), k, which, tol=TOL, seed=seed, max_matvecs=MOST)
            for seed in range(seeds)
        ]
        if not all(run.converged for run in runs):
            print(f"| {name} | {which} | {k} | {theirs:.1f} | not converged in {MOST} | |")
            continue
        ours = statistics.mean(run.matvecs for run in runs)
        print(f"| {name} | {which} | {k} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    multiplicities(count)
    products(count)
