"""Bits for each layer by the trace of its Hessian block, as in HAWQ-V2.

A layer whose loss curves steeply gets more bits: what quantisation adds to the loss is about
half of the block's mean eigenvalue times the squared error of the weights (Dong et al. 2020,
HAWQ-V2: Hessian aware trace-weighted quantization of neural networks, section 3).

Run: python examples/layer_traces.py
"""

import torch
from torch import nn

import fasthessian as fh

BITS = (2, 3, 4, 6, 8)
BUDGET = 4.0  # bits a weight, on average


def error(w, bits):
    """Squared error of rounding to 2^bits levels between the extremes."""
    step = (w.max() - w.min()) / (2**bits - 1)
    return float(((w / step).round() * step - w).square().sum())


torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
)
data = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))

H = fh.Hessian(model, nn.CrossEntropyLoss(), data)
weights = dict(model.named_parameters())
layers = H.blocks(lambda name: name if name.endswith("weight") else None)  # biases stay as they are
traces = fh.trace(layers, rtol=0.1)  # all layers together, in one pass over the data a round

chosen = dict.fromkeys(layers, 0)  # places in BITS
total = sum(layer.n for layer in layers.values())


def added(name, bits):
    """What rounding the layer adds to the loss, to second order."""
    return traces[name].value / layers[name].n * error(weights[name].detach(), bits) / 2


def used(more=None):
    """Bits a weight, if the layer ``more`` had its next bits, too."""
    bits = {name: BITS[i + (name == more)] for name, i in chosen.items()}
    return sum(layers[name].n * b for name, b in bits.items()) / total


def gain(name):
    """Loss saved by the next bits of a layer, for each bit of memory."""
    now, more = (BITS[chosen[name] + i] for i in (0, 1))
    return (added(name, now) - added(name, more)) / (layers[name].n * (more - now))


# as long as something fits, the layer that gains most gets its next bits
while fits := [n for n, i in chosen.items() if i + 1 < len(BITS) and used(n) <= BUDGET]:
    chosen[max(fits, key=gain)] += 1

for name, estimate in traces.items():
    low, high = estimate.interval
    print(f"{name:10s} trace {low:8.3g} to {high:8.3g} at 95 %: {BITS[chosen[name]]} bits")
print(f"{used():.2f} bits a weight, loss + {sum(added(n, BITS[i]) for n, i in chosen.items()):.2g}")
