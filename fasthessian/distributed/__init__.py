"""The ranks of a process group: sums, shards and failures; the only room with torch.distributed."""
