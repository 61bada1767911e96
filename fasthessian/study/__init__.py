"""The experiments: the paper's networks, the data they are trained on, and built-in problems."""
