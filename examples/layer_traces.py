"""Mixed precision: choose the bits of each layer by the trace of its Hessian block, as in HAWQ-V2.

Rounding the weights of a layer adds to the loss about half the mean eigenvalue of its block times
the squared rounding error (Dong et al. 2020, HAWQ-V2: Hessian aware trace-weighted quantization of
neural networks, section 3). Layers with a large mean eigenvalue therefore need more bits.

Run: python examples/layer_traces.py
"""

import torch
from torch import nn

import fasthessian as fh

BITS = (2, 3, 4, 6, 8)
BUDGET = 4.0  # bits per weight, on average


def error(w, bits):
    """Squared error of rounding w to 2^bits levels between its extremes."""
    step = (w.max() - w.min()) / (2**bits - 1)
    return float(((w / step).round() * step - w).square().sum())


torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
)
data = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))

H = fh.Hessian(model, nn.CrossEntropyLoss(), data)
weights = dict(model.named_parameters())
layers = H.blocks(lambda name: name if name.endswith("weight") else None)  # biases are not rounded
traces = fh.trace(layers, rtol=0.1)  # all layers share each pass over the data

chosen = dict.fromkeys(layers, 0)  # index in BITS
total = sum(layer.n for layer in layers.values())


def added(name, bits):
    """The increase of the loss when the layer is rounded, to second order."""
    return traces[name].value / layers[name].n * error(weights[name].detach(), bits) / 2


def used(more=None):
    """Bits per weight, if the layer ``more`` moved to the next entry of BITS."""
    bits = {name: BITS[i + (name == more)] for name, i in chosen.items()}
    return sum(layers[name].n * b for name, b in bits.items()) / total


def gain(name):
    """Decrease of the loss per added bit, if the layer moved to the next entry of BITS."""
    now, more = (BITS[chosen[name] + i] for i in (0, 1))
    return (added(name, now) - added(name, more)) / (layers[name].n * (more - now))


# while the budget allows, move the layer that gains most
while fits := [n for n, i in chosen.items() if i + 1 < len(BITS) and used(n) <= BUDGET]:
    chosen[max(fits, key=gain)] += 1

for name, estimate in traces.items():
    low, high = estimate.interval
    print(f"{name:10s} trace {low:8.3g} to {high:8.3g} at 95 %: {BITS[chosen[name]]} bits")
increase = sum(added(name, BITS[i]) for name, i in chosen.items())
print(f"{used():.2f} bits per weight on average; the loss increases by about {increase:.2g}")
