"""Spectrum of a matrix of your own, known by its products: a preconditioned Hessian.

What Adam sees is not H but D^(-1/2) H D^(-1/2) with D its running scale of the gradients, and the
step size it bears is bounded by the largest eigenvalue of that (Cohen et al. 2022, Adaptive
gradient methods at the edge of stability).

Run: python examples/own_operator.py
"""

import torch
from torch import nn

import fasthessian as fh

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
x = torch.randn(200, 10) * torch.logspace(-1, 1, 10)  # badly scaled inputs
y = x.sum(1, keepdim=True).sin()
criterion = nn.MSELoss()

optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for _ in range(300):
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()

H = fh.Hessian(model, criterion, (x, y))
scales = [optimizer.state[p]["exp_avg_sq"] for p in model.parameters()]
D = H.flatten(scales).sqrt() + 1e-8  # tensors in the order of the parameters become one vector


def matvec(v):
    """D^(-1/2) H D^(-1/2) v for v (n,)."""
    return (H @ (v / D.sqrt())) / D.sqrt()


P = fh.SymmetricOperator(matvec, H.n, dtype=H.dtype)
for name, A in (("Hessian", H), ("preconditioned", P)):
    ends = fh.eigsh(A, 2, "BE")
    high, low = ends.values.tolist()
    print(f"{name:15s} from {low:10.4g} to {high:10.4g}  ({ends.matvecs} products)")
