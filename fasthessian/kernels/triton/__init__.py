"""The kernel contract in Triton: the backend, and kernels on rows, on vectors and on logits."""
