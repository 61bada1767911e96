"""Spectrum of your own matrix, given by its products: the Hessian as Adam preconditions it.

Adam divides the step by D, its running scale of the gradients. Near a minimum it is stable where
the largest eigenvalue of D^(-1/2) H D^(-1/2) is below 38 / (step size), with the default betas
(Cohen et al. 2022, Adaptive gradient methods at the edge of stability).

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

STEPS, RATE = 300, 1e-3
optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
for _ in range(STEPS):
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()

H = fh.Hessian(model, criterion, (x, y))
scales = [optimizer.state[p]["exp_avg_sq"] for p in model.parameters()]
scale = H.flatten(scales) / (1 - 0.999**STEPS)  # one vector; Adam's bias correction
D = scale.sqrt() + 1e-8


def matvec(v):
    """D^(-1/2) H D^(-1/2) v for v (n,)."""
    return (H @ (v / D.sqrt())) / D.sqrt()


P = fh.SymmetricOperator(matvec, H.n, dtype=H.dtype)
for name, A in (("Hessian", H), ("preconditioned", P)):
    ends = fh.eigsh(A, 2, "BE")
    high, low = ends.values.tolist()
    print(f"{name:15s} from {low:10.4g} to {high:10.4g}  ({ends.matvecs} products)")
print(f"Adam is stable below {38 / RATE:.4g}")
