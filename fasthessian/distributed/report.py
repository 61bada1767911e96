"""What ``doctor`` says about several ranks: what there is, and what would hinder a run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from fasthessian.distributed.launch import VARIABLES, several

LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")


def report() -> list[str]:
    """One line each: the backends, the process group, torchrun's variables, each hindrance."""
    found = [f"torch.distributed with {', '.join(_backends()) or 'no backend'}"]
    if dist.is_initialized():
        rank, size, backend = dist.get_rank(), dist.get_world_size(), dist.get_backend()
        found.append(f"process group: rank {rank} of {size}, backend {backend}")
    else:
        found.append("no process group is initialised; fasthessian.distributed.init() starts it")
    variables = [f"{k}={os.environ[k]}" for k in (*VARIABLES, *LOCAL) if k in os.environ]
    found.append(f"started by torchrun: {' '.join(variables) or 'no'}")
    found += [f"hindrance: {words}" for words in hindrances()]
    return found


def _backends() -> Iterator[str]:
    if dist.is_gloo_available():
        yield "gloo"
    if dist.is_nccl_available():
        yield f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}"  # type: ignore[no-untyped-call]
    if dist.is_mpi_available():
        yield "mpi"


def hindrances() -> Iterator[str]:
    """What would slow a run over several ranks down, stop it, or change its last bits."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpus:
        if not dist.is_nccl_available():
            yield "this build of torch has no NCCL: sums of CUDA tensors go through host memory"
        elif dist.is_initialized() and "nccl" not in str(dist.get_backend()):
            yield (
                f"the process group has backend {dist.get_backend()}: sums of CUDA tensors go "
                f"through host memory; leave the backend to fasthessian.distributed.init()"
            )
        elif os.environ.get("NCCL_NVLS_ENABLE") != "0":
            yield (
                "NCCL_NVLS_ENABLE is not 0: sums in NVLink switches may differ in their last bits "
                "between runs; fasthessian.distributed.init(deterministic=True) sets it"
            )
        if several() and ranks > gpus:
            yield f"{ranks} ranks share {gpus} GPUs: start --nproc-per-node {gpus}"
    cores, threads = _cores(), torch.get_num_threads()
    if ranks > 1 and ranks * threads > cores:
        yield (
            f"{ranks} ranks of {threads} threads share {cores} cores: export "
            f"OMP_NUM_THREADS={max(1, cores // ranks)}"
        )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
