"""One spectrum on several ranks, each with its own share of the data: the numbers of one process.

Run: torchrun --nproc-per-node 2 examples/data_parallel.py
Or with all of the data in one process: python examples/data_parallel.py
"""

import torch
import torch.distributed as dist
from torch import nn

import fasthessian as fh
import fasthessian.distributed

# with torchrun, the process group: NCCL and the GPU of this rank, or gloo; else None
group = fasthessian.distributed.init(deterministic=True)
rank, ranks = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

torch.manual_seed(0)  # the same model on every rank
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3)).to(device)
x, y = torch.randn(300, 8), torch.randint(3, (300,))
share = (x[rank::ranks].to(device), y[rank::ranks].to(device))  # shares may differ in size

H = fh.Hessian(model, nn.CrossEntropyLoss(), share, group=group)  # one sum per product
found = fh.spectrum(H, (3, 1), steps=40)  # the same result on every rank

if rank == 0:
    print("largest ", ", ".join(f"{value:.4f}" for value in found.top.values.tolist()))
    print("smallest", f"{found.bottom.values.item():.4f}")
    print("trace   ", f"{found.trace.value:.3f} +- {found.trace.stderr:.3f}")
if group:
    dist.barrier()  # no rank ends while another one is at work
    dist.destroy_process_group()
