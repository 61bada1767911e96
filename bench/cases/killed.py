"""Runs that are killed at random moments and resumed: the bits of a run that was not.

``python -m bench.cases.killed`` kills one rank of one or two by SIGKILL, once or twice per run, and
resumes on as many ranks; then it resumes on another number of ranks. Each product is slowed down so
that the kill falls into the run, and the state is saved before every product.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SLOW = 0.05  # seconds that a product takes more
CALLS = ("eigsh", "eigsh sharded", "spectrum sharded", "density", "trace", "density none sharded")


def run(name, rank, size, store, folder):
    """One rank: begin the call or resume it, and print its numbers."""
    import torch
    import torch.distributed as dist
    from torch import nn

    import fasthessian as fh
    from fasthessian.checkpoints import keeper

    keeper.INTERVAL, keeper.SHARE = 0.0, 1e9  # save before every product
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)).double()
    x, y = torch.randn(48, 8).double(), torch.randint(6, (48,))
    group = None
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        group = dist.group.WORLD
    forward = model.forward

    def slow(inputs):
        time.sleep(SLOW)
        return forward(inputs)

    model.forward = slow
    mine = (x[rank::size], y[rank::size])
    A = fh.Hessian(model, nn.CrossEntropyLoss(), mine, group=group, engine="recompute")
    split = {"sharded": True} if size > 1 and "sharded" in name else {}
    print("begun", flush=True)
    if any(Path(folder).glob("index-*.json")):
        found = fh.resume(folder, A)
    elif name.startswith("eigsh"):
        found = fh.eigsh(A, 4, tol=1e-9, ncv=12, checkpoint=folder, **split)
    elif name.startswith("spectrum"):
        found = fh.spectrum(A, 2, steps=15, probes=2, rtol=0.3, checkpoint=folder, **split)
    elif name.startswith("density"):
        basis = "none" if "none" in name else "full"
        found = fh.density(A, steps=15, probes=2, basis=basis, checkpoint=folder, **split)
    else:
        found = fh.trace(A, method="hutchinson", rtol=0.3, checkpoint=folder)
    parts = {"eigsh": lambda: found.values, "density": lambda: found.nodes,
             "trace": lambda: found.samples, "spectrum": lambda: found.top.values}  # fmt: skip
    numbers = parts[name.split()[0]]().flatten().tolist()
    print(json.dumps({"numbers": numbers, "matvecs": found.matvecs}))


def started(name, size, folder):
    """The processes of a job."""
    store = Path(tempfile.mkdtemp()) / "store"
    command = [sys.executable, "-m", "bench.cases.killed", "--run", name, str(size), str(store)]
    return [
        subprocess.Popen(
            [*command, str(folder), str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]  # fmt: skip


def finished(job):
    """What rank 0 of a job printed at its end."""
    texts = [process.communicate(timeout=300) for process in job]
    assert not any(process.returncode for process in job), texts
    return json.loads(texts[0][0].splitlines()[-1])


def killed(job, after):
    """Kill a random rank ``after`` seconds into the run; the seconds until all others ended.

    None if the job ended before.
    """
    for process in job:
        process.stdout.readline()
    time.sleep(after)
    victim = random.choice(job)
    if victim.poll() is not None:
        return None
    victim.send_signal(signal.SIGKILL)
    start = time.monotonic()
    for process in job:
        process.communicate(timeout=60)
    return time.monotonic() - start


def trial(name, size, folder, expected, most):
    """Kill a job once or twice and resume it; kills, longest end, whether the bits are equal."""
    ends = []
    for _ in range(random.choice((1, 2))):
        end = killed(started(name, size, folder), random.uniform(0, most))
        if end is not None:
            ends.append(end)
    return ends, finished(started(name, size, folder)) == expected


def main():
    if sys.argv[1:2] == ["--run"]:
        name, size, store, folder, rank = sys.argv[2:]
        run(name, int(rank), int(size), store, folder)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20, help="for each number of ranks")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    print("| ranks | runs | kills | same bits | longest end of the other rank |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    results = {}
    for size in options.ranks:
        kills, same, longest = 0, 0, 0.0
        for i in range(options.trials):
            name = CALLS[i % len(CALLS)]
            with tempfile.TemporaryDirectory() as place:
                if (name, size) not in results:
                    start = time.monotonic()
                    whole = finished(started(name, size, Path(place) / "whole.fh"))
                    results[name, size] = whole, time.monotonic() - start
                whole, seconds = results[name, size]
                ends, equal = trial(name, size, Path(place) / "run.fh", whole, seconds / 2)
                kills, same, longest = kills + len(ends), same + equal, max([longest, *ends])
        end = f"{longest:.1f} s" if size > 1 else ""
        print(f"| {size} | {options.trials} | {kills} | {same} | {end} |", flush=True)
    print("\n| begun on | resumed on | call | largest relative difference |")
    print("| ---: | ---: | --- | ---: |")
    for before, after in ((2, 1), (1, 2), (4, 2)):
        for name in ("eigsh sharded", "density"):
            with tempfile.TemporaryDirectory() as place:
                whole = finished(started(name, 1, Path(place) / "whole.fh"))["numbers"]
                folder = Path(place) / "run.fh"
                assert killed(started(name, before, folder), 1.0) is not None
                found = finished(started(name, after, folder))["numbers"]
            distance = max(abs(a - b) for a, b in zip(found, whole, strict=True))
            scale = max(map(abs, whole))
            print(f"| {before} | {after} | {name} | {distance / scale:.1e} |", flush=True)


if __name__ == "__main__":
    main()
