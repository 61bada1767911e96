"""The spectrum of a model on all ranks of a job; a run that was stopped goes on where it was.

Run: torchrun --nproc-per-node 2 examples/slurm/spectrum.py --small
With Slurm on two nodes: sbatch examples/slurm/two_nodes.sbatch

`fasthessian plan --help` tells before how much memory and time the run will take.
"""

import argparse
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import fasthessian as fh
from fasthessian.study.resnet import resnet

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--small", action="store_true", help="a network that takes seconds on a CPU")
parser.add_argument("--checkpoint", default="run.fh", help="folder that all ranks can write to")
parser.add_argument("--out", default="spectrum.npz", help="file for the result")


def problem(rank, ranks, device, small):
    """The model, its loss and this rank's share of the data: replace it by your own.

    Every rank makes the same model. The shares may differ in size: ranks are weighted by their
    numbers of samples.
    """
    torch.manual_seed(0)  # the same on every rank
    if small:
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        x, y = torch.randn(90, 8), torch.randint(3, (90,))
    else:
        model = resnet(depth=20)
        x, y = torch.randn(4096, 3, 32, 32), torch.randint(10, (4096,))
    x, y = x[rank::ranks].to(device), y[rank::ranks].to(device)
    return model.to(device), nn.CrossEntropyLoss(), list(zip(x.split(64), y.split(64), strict=True))


def main():
    """Compute the spectrum, or go on with it; rank 0 prints and writes."""
    args = parser.parse_args()
    local = int(os.environ["LOCAL_RANK"])  # set by torchrun
    device = torch.device("cpu")
    if torch.cuda.is_available() and not args.small:
        device = torch.device("cuda", local)  # one GPU per rank
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if local == 0 and "SLURM_JOB_ID" in os.environ:  # two_nodes.sbatch signals this process
        Path(f"{args.checkpoint}.{socket.gethostname()}.pid").write_text(str(os.getpid()))

    model, criterion, batches = problem(rank, ranks, device, args.small)
    H = fh.Hessian(model, criterion, batches, group=dist.group.WORLD)

    found = Path(args.checkpoint).is_dir()
    dist.barrier()  # all ranks have looked before the first one makes the folder
    if found:
        result = fh.resume(args.checkpoint, H)
    else:
        result = fh.spectrum(H, (3, 1), steps=40, checkpoint=args.checkpoint)
    # a run that is stopped by a signal saves, and leaves here with exit code 0

    if rank == 0:
        low, high = result.trace.interval
        print(f"{H.n} parameters, {ranks} ranks, {result.matvecs} products; {H.engine}")
        print("largest ", ", ".join(f"{x:.4g}" for x in result.top.values.tolist()))
        print("smallest", f"{result.bottom.values.item():.4g}")
        print("trace   ", f"{low:.4g} to {high:.4g} at 95 %")
        result.save(args.out, overwrite=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
