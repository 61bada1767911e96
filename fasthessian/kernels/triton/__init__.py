"""The kernel contract in Triton."""
