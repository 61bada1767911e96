"""Peak memory of a spectral density (100 steps, 20 million parameters) for each basis, on a CPU."""

import json
import sys

import torch

import fasthessian as fh
from bench.harness.processes import fresh, peak

STEPS, WIDTH, LAYERS = 100, 2600, 3


def run(basis):
    """Compute one density in this process; print its peak memory, time and nodes as JSON."""
    import time

    torch.manual_seed(0)
    layers = [
        module for _ in range(LAYERS) for module in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())
    ]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 10))
    data = torch.randn(16, WIDTH), torch.randint(10, (16,))
    A = fh.Hessian(model, torch.nn.CrossEntropyLoss(), data)
    A @ torch.ones(A.n)  # the graph, and what a product needs, are in both peaks
    start = time.perf_counter()
    before = peak()
    found = fh.density(A, steps=STEPS, basis=basis)
    seconds = time.perf_counter() - start
    ends = float(found.nodes.min()), float(found.nodes.max())
    mass = [float(found.weights[found.nodes < x * ends[1]].sum()) for x in (0.01, 0.1, 0.5)]
    print(json.dumps({"n": A.n, "before": before, "peak": peak(), "s": seconds, "ends": ends,
                      "mass": mass}))  # fmt: skip


def test_memory(row, benchmark):
    full, compressed = (fresh(__name__, basis) for basis in ("full", "compressed"))
    assert full["n"] == compressed["n"] > 20_000_000
    for key, bound in (("ends", 2e-3), ("mass", 5e-3)):
        for a, b in zip(full[key], compressed[key], strict=True):
            assert abs(a - b) < bound * max(1.0, abs(a)), (key, full, compressed)
    for name, found in (("float32", full), ("float16", compressed)):
        row(f"ESD, {STEPS} steps, {full['n']:,} parameters: peak RSS, {name} basis",
            found["peak"] / 2**20, "GiB", before=found["before"])  # fmt: skip
    row("the same: peak RSS, float32 over float16", full["peak"] / compressed["peak"])
    grown = [found["peak"] - found["before"] for found in (full, compressed)]
    row("the same: growth of RSS during the run, float32 over float16", grown[0] / grown[1])
    row("the same: time, float32 over float16", full["s"] / compressed["s"])
    benchmark.pedantic(lambda: None, rounds=1)


if __name__ == "__main__":
    run(sys.argv[1])
