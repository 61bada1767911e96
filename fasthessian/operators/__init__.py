"""Symmetric, matrix-free operators: any callable, and the Hessian of a loss."""
