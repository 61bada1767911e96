"""The curvature of cross-entropy at the logits: time and memory of one product, on a CPU.

M u = scale (p u - p (p'u)), p = softmax(z): 2,048 tokens, 50,000 classes, float32. The lower bound
of the time is that of reading z and u and writing u, which is timed in the same rounds.
"""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from bench.harness.processes import fresh, peak
from bench.harness.timing import median, rounds
from bench.peers import curvlinops, eigenthings
from fasthessian import kernels

# imported now, so that no contestant's memory holds the import of a library
curvlinops.package()
eigenthings.preload()
TOKENS, CLASSES = 2048, 50_000
BYTES = 4 * TOKENS * CLASSES
SLICE = slice(1000, 1016)  # the tokens that are checked in float64


def problem():
    torch.manual_seed(0)
    Z, U = (torch.empty(TOKENS, CLASSES).normal_(0, std) for std in (3, 1))
    return Z, U, torch.randint(CLASSES, (TOKENS,))


def ours(Z, U, y):
    """Our kernel, which writes the result over U."""
    apply_ = kernels.select("cpu").softmax_curvature_
    scale = torch.full((TOKENS, 1), 1 / TOKENS, dtype=torch.float64)

    def product():
        apply_(U.unsqueeze(-1), Z.unsqueeze(-1), scale)
        return U

    return product


def formula(Z, U, y):
    """The formula in plain torch, without the scale."""

    def product():
        p = Z.softmax(-1)
        return p * U - p * (p * U).sum(-1, keepdim=True)

    return product


def double_backward(Z, U, y):
    """The graph of the gradient is kept, so only the second backward pass is timed."""
    z = Z.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(F.cross_entropy(z, y), z, create_graph=True)
    return lambda: torch.autograd.grad(slopes, z, U, retain_graph=True)[0]


CONTESTANTS = {
    "ours": ours,
    "formula in torch": formula,
    "double backward": double_backward,
    "hessian-eigenthings": eigenthings.logit_curvature,
    "curvlinops": curvlinops.logit_curvature,
}


@pytest.fixture(scope="module")
def logits():
    return problem()


@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_time(logits, row):
    Z, U, y = logits
    fresh_U = U.clone()
    calls = {name: make(Z, U, y) for name, make in CONTESTANTS.items()}
    reference, errors = exact(Z, fresh_U), {}
    for name, call in calls.items():
        U.copy_(fresh_U)
        found = call()[SLICE].double() / (TOKENS if name == "formula in torch" else 1)
        errors[name] = float((found - reference).norm() / reference.norm())
    assert errors["ours"] <= 2 * errors["formula in torch"] + 1e-7, errors
    assert max(errors.values()) < 1e-4, errors
    calls["roof"] = lambda: U.add_(Z)  # reads both, writes one
    middle = median(rounds(calls, 5, lambda: U.copy_(fresh_U)))
    what = f"softmax curvature, {TOKENS:,} x {CLASSES:,}:"
    row(f"{what} ours", 1e3 * middle["ours"], "ms", error=errors["ours"])
    for name in [*CONTESTANTS][1:]:
        row(f"{what} {name} over ours", middle[name] / middle["ours"], error=errors[name])
    row(f"{what} ours over reading z and u and writing u", middle["ours"] / middle["roof"])
    row(f"{what} speed of the latter", 3 * BYTES / middle["roof"] / 1e9, "GB/s")


def test_memory(row):
    for name in CONTESTANTS:
        found = fresh(__name__, name)
        what = f"softmax curvature: growth of peak memory over the logits, {name}"
        row(what, (found["peak"] - found["before"]) * 1024 / BYTES, before=found["before"])


def exact(Z, U):
    """M u of the checked tokens in float64."""
    p, u = Z[SLICE].double().softmax(-1), U[SLICE].double()
    return p * (u - (p * u).sum(-1, keepdim=True)) / TOKENS


def run(name):
    """Compute one product in this process; print the peak memory before and after as JSON."""
    Z, U, y = problem()
    before = peak()
    CONTESTANTS[name](Z, U, y)()
    print(json.dumps({"before": before, "peak": peak()}))


if __name__ == "__main__":
    run(sys.argv[1])
