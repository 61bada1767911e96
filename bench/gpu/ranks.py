"""Several ranks: the numbers of one process, the time of a step, weak and strong scaling.

On a machine with GPUs each rank has a GPU of its own and NCCL connects them; one rank exercises the
same calls. ``--device cpu`` connects processes of one thread each by gloo.

Strong scaling divides the same data over more ranks; weak scaling gives each rank as much as one
rank had. The step is one of Lanczos on an MLP: data parallel with whole vectors, and with vectors
that are split over the ranks. "group of one" compares a group with none, in turn.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

import fasthessian as fh
from bench.gpu.meter import Rows
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.sharding import sharded_operator

NEAR = {torch.float64: 1e-10, torch.float32: 1e-4}  # relative, against one process


def problem(width, samples, dtype, device, seed=0):
    """An MLP with about width^2 parameters, its criterion, and a batch."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
                          nn.Linear(width, 10))  # fmt: skip
    model = model.to(device, dtype)
    x, y = torch.randn(samples, 64, dtype=dtype), torch.randint(10, (samples,))
    return model, nn.CrossEntropyLoss(), (x.to(device), y.to(device))


def operator(width, samples, dtype, device, group):
    """The Hessian with the samples divided over the ranks of the group."""
    model, criterion, (x, y) = problem(width, samples, dtype, device)
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    return fh.Hessian(model, criterion, (x[rank::size], y[rank::size]), group=group)


def check(rows, device):
    """Products and eigenvalues of all ranks against one process, in both dtypes, twice."""
    for dtype, near in NEAR.items():
        A = operator(40, 96, dtype, device, dist.group.WORLD)
        whole = operator(40, 96, dtype, device, None)
        v = torch.ones(2, A.n, dtype=dtype, device=device)
        products, again, expected = A @ v, A @ v, whole @ v
        found = {"product": float((products - expected).norm() / expected.norm())}
        assert torch.equal(products, again), "two products differ in their bits"
        bases = ["full", "compressed"] + ["offload"] * (device.type == "cuda")
        for sharded in (False, True):
            for basis in bases:
                options = {"basis": basis, "which": "LA", "tol": 1e-2}
                values = fh.eigsh(whole, 4, **options).values
                options["sharded"] = sharded
                pair = [fh.eigsh(A, 4, **options).values for _ in range(2)]
                assert torch.equal(*pair), f"two runs differ in their bits: {options}"
                name = f"eigsh {basis}{', sharded' * sharded}"
                found[name] = float((pair[0] - values).abs().max() / values[0])
                limit = near if basis == "full" else 1e-3
                assert found[name] <= max(limit, 1e-6), (dtype, found)
        steps = {"steps": 12, "sigma": 0.1}
        a, b = fh.density(A, sharded=True, **steps), fh.density(whole, **steps)
        found["density"] = float((a.nodes - b.nodes).abs().max() / b.nodes.abs().max())
        assert found["product"] <= near and found["density"] <= max(10 * near, 1e-9), found
        rows.add(f"{dtype}: ranks against one process", **found)


def step_times(A, sharded, steps, repeats, device):
    """Median milliseconds of a step, after all graphs are built; all ranks together."""
    krylov = Lanczos(sharded_operator(A, sharded), 2 + steps * repeats, seed=0)
    times = []
    A._agree()
    with A._kept.run():
        for _ in range(2):
            krylov.step()
        for _ in range(repeats):
            synchronise(device)
            start = time.perf_counter()
            for _ in range(steps):
                krylov.step()
            synchronise(device)
            times.append(1e3 * (time.perf_counter() - start) / steps)
    krylov.close()
    return statistics.median(times)


def synchronise(device):
    """Wait for the device, and for all ranks."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if dist.is_initialized():
        dist.barrier()


def measure(rank, size, options, path, store):
    """One rank: the checks, then the times; the first rank writes the rows."""
    cuda = options.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # repeatable sums
    torch.set_num_threads(1)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    rows = Rows(path if rank == 0 else None)
    with contextlib.redirect_stdout(None):  # the parent prints
        check(rows, device)
        group = dist.group.WORLD
        for what, samples in (("strong", options.samples), ("weak", options.samples * size)):
            A = operator(options.width, samples, torch.float32, device, group)
            found = {"ranks": size, "n": A.n, "samples": samples}
            for sharded in (False, True):
                name = "sharded ms" if sharded else "whole vectors ms"
                found[name] = step_times(A, sharded, options.steps, options.repeats, device)
            rows.add(f"{what} scaling, a Lanczos step", **found)
        if size == 1:
            cost_of_a_group(rows, options, device)
    dist.destroy_process_group()


def cost_of_a_group(rows, options, device):
    """A group of one rank against none, in turn."""
    alone = operator(options.width, options.samples, torch.float32, device, None)
    group = operator(options.width, options.samples, torch.float32, device, dist.group.WORLD)
    ratios = {"whole": [], "sharded": []}
    for _ in range(3):
        base = step_times(alone, False, options.steps, options.repeats, device)
        for name, sharded in (("whole", False), ("sharded", True)):
            time_of = step_times(group, sharded, options.steps, options.repeats, device)
            ratios[name].append(time_of / base)
    rows.add(
        "group of one over none, a Lanczos step",
        **{name: statistics.median(found) for name, found in ratios.items()},
        goal="<= 1.03",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--ranks", type=int, nargs="*", help="default: 1, and the number of GPUs")
    parser.add_argument("--width", type=int, default=2000, help="of the MLP")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5, help="of Lanczos in one repetition")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--json", help="file for the rows")
    options = parser.parse_args()
    most = torch.cuda.device_count() if options.device == "cuda" else 2
    rows = Rows(options.json)
    for size in options.ranks or sorted({1, max(1, most)}):
        with tempfile.TemporaryDirectory() as folder, rows.section(f"{size} ranks"):
            path, store = Path(folder) / "rows.json", Path(folder) / "store"
            processes.spawn(measure, (size, options, path, store), nprocs=size)
            for row in Rows.read(path):
                rows.add(**row)
    sys.exit(rows.failed)


if __name__ == "__main__":
    main()
