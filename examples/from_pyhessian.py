"""A script for PyHessian, with its import changed and nothing else.

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
print("eigenvalues:", [round(value, 4) for value in values])
print("parts of a vector:", [tuple(part.shape) for part in vectors[0]])

print("trace:", round(float(np.mean(comp.trace(maxIter=2000, tol=0.05))), 3))

nodes, weights = comp.density(iter=30, n_v=2)
print("density: nodes from", round(min(nodes[0]), 3), "to", round(max(nodes[0]), 3))
