"""The spectrum of a small classifier before and after training.

Run: python examples/first_spectrum.py
"""

import torch
from torch import nn
from torch.nn import functional as F

import fasthessian as fh


def loss(model, batch):
    """A loss is any scalar function of a model and a batch."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def report(model, batch):
    """Print the eigenvalues and the trace that one Krylov run finds."""
    H = fh.Hessian(model, loss, batch)  # H @ v is a Hessian-vector product
    spectrum = fh.spectrum(H, (3, 1), steps=40)  # both ends, trace and density in one run
    low, high = spectrum.trace.interval
    print("  largest    ", ", ".join(f"{x:.3g}" for x in spectrum.top.values.tolist()))
    print("  smallest   ", f"{spectrum.bottom.values.item():.3g}")
    print("  trace      ", f"{low:.4g} to {high:.4g} at 95 %")
    print("  cost       ", spectrum.matvecs, "Hessian-vector products")
    return spectrum


torch.manual_seed(0)
centres = torch.randn(3, 8)
y = torch.randint(3, (300,))
x = centres[y] + torch.randn(300, 8)
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))

print("before training")
report(model, (x, y))

optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for _ in range(200):
    optimizer.zero_grad()
    loss(model, (x, y)).backward()
    optimizer.step()

print(f"after training, loss {loss(model, (x, y)).item():.3f}")
after = report(model, (x, y))
# after.plot().figure.savefig("spectrum.png")  # needs matplotlib
