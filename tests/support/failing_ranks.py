"""Three ranks, one of which fails: what the others raise, and after how many seconds.

``python failing_ranks.py case ...`` prints one JSON list per case: for each rank [message, seconds
after the failure], or null for a rank that did not report.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from multiprocessing import get_context

import torch
import torch.distributed as dist
from torch import nn

import fasthessian as fh
from fasthessian.distributed import Ranks

SCRIPT = __file__
WAIT = 40  # seconds for one case
START, TIMEOUT = 5.0, 3.0  # time limits
CASES = {  # the rank that fails, how, and whether rank 0 holds the store
    "killed": (2, "kill", False),
    "killed_with_the_store": (0, "kill", True),
    "hung": (1, "hang", True),
    "raised_between_sums": (1, "raise", True),
    "raised_in_a_product": (1, "product", False),
    "absent_at_the_start": (1, "absent", False),
}


def _fail(how):
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how in ("hang", "absent"):
        time.sleep(WAIT)
    raise ZeroDivisionError("the plot cannot be drawn")


def _rank(rank, case, store, pipe):
    """Sixteen steps of Lanczos; at the third one a rank fails."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failing, how, _ = CASES[case]
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=3, timeout=timedelta(seconds=60)
    )
    group = Ranks(dist.group.WORLD, start_timeout=START, timeout=TIMEOUT)
    torch.manual_seed(0)
    model, criterion = nn.Linear(30, 2), nn.CrossEntropyLoss()
    batch = torch.randn(8, 30), torch.randint(2, (8,))
    began = [time.monotonic()]

    def progress(made, total):
        if made == 3:
            began[0] = time.monotonic()
            os.environ["THREE"] = "made"
            if rank == failing and how != "product":
                _fail(how)

    def loss(outputs, targets):
        if rank == failing and how == "product" and "THREE" in os.environ:
            _fail(how)
        return criterion(outputs, targets)

    try:
        if how == "absent" and rank == failing:
            _fail(how)
        H = fh.Hessian(model, loss, [batch], group=group, engine="recompute")
        fh.density(H, steps=16, probes=1, progress=progress)
        message = "no error"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - began[0]
    fine = all(p.grad is None for p in model.parameters()) and dist.group.WORLD.size() == 3
    pipe.send([message, seconds, fine])


def run(case):
    """What each rank reports."""
    context = get_context("fork")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.close()
        store = f"tcp://127.0.0.1:{port}" if CASES[case][2] else f"file://{folder}/store"
        pipes, processes, found = [], [], []
        for rank in range(3):
            here, there = context.Pipe()
            process = context.Process(target=_rank, args=(rank, case, store, there))
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        rank, how, _ = CASES[case]
        lost = rank if how in ("kill", "hang", "absent") else None
        for rank, pipe in enumerate(pipes):
            found.append(pipe.recv() if rank != lost and pipe.poll(WAIT) else None)
        for process in processes:
            process.kill()
    return found


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(run(name)), flush=True)
