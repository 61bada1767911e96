"""The ranks of a process group: sums, shards and failures; the only room with torch.distributed."""

from fasthessian.distributed.ranks import Ranks

__all__ = ["Ranks"]
