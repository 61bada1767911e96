"""Models that are divided over ranks in ways that have no exact products."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from fasthessian.errors import UnsupportedError


def refuse_divided(model: Any) -> None:
    """Raise RuntimeError for FSDP1 and for stages of a pipeline.

    Both are recognised only if their modules of torch are imported, which is slow.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if isinstance(module, fsdp.FullyShardedDataParallel):
                raise UnsupportedError(
                    f"{f'module {name!r} of model' if name else 'model'} is a "
                    f"FullyShardedDataParallel, which autograd cannot differentiate twice; divide "
                    f"the model by torch.distributed.fsdp.fully_shard(model) instead"
                )
    for place, kind in (
        ("pipelining.stage", "_PipelineStageBase"),
        ("pipelining.schedules", "_PipelineSchedule"),
        ("pipelining", "Pipe"),
    ):
        pipeline = sys.modules.get(f"torch.distributed.{place}")
        if pipeline is not None and isinstance(model, getattr(pipeline, kind, ())):
            raise UnsupportedError(
                f"model is a {type(model).__name__} of a pipeline, but each rank needs the whole "
                f"model; pass the torch.nn.Module that was split"
            )
