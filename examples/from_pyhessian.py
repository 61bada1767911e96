"""A script for PyHessian in which only the import has changed.

Run: python examples/from_pyhessian.py
"""

import numpy as np
import torch
from torch import nn

from fasthessian import hessian  # was: from pyhessian import hessian

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
criterion = nn.CrossEntropyLoss()
inputs, targets = torch.randn(128, 8), torch.randint(3, (128,))

comp = hessian(model, criterion, data=(inputs, targets), cuda=False)

values, vectors = comp.eigenvalues(top_n=3)
print("top eigenvalues:", ", ".join(f"{value:.4f}" for value in values))
print("shapes of an eigenvector:", [tuple(part.shape) for part in vectors[0]])

print(f"trace: {np.mean(comp.trace(maxIter=2000, tol=0.05)):.3f}")

nodes, weights = comp.density(iter=30, n_v=2)
print(f"density: nodes from {min(nodes[0]):.3f} to {max(nodes[0]):.3f}")
