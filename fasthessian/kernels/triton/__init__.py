"""The kernel contract in Triton: the backend, and its kernels by what they read."""
