"""All layer blocks of a ResNet-20 together, compared with the full matrix: products, densities."""

import pytest
import torch

import fasthessian as fh
from bench.cases import problems
from bench.harness.timing import median, rounds
from bench.peers import curvlinops
from fasthessian.operators.base import multiply
from fasthessian.operators.request import Request

STEPS = 20
EXACT, NEAR = 1e-10, 1e-2  # of |Hv|; in float32 rounding flips some ReLUs


def layers(double=False):
    """H of a ResNet-20 without normalisation on a batch of 64, and its 22 layer blocks."""
    model, criterion, batch = problems.residual(20, 64, batch_norm=False)
    if double:
        model, batch = problems.doubled(model), tuple(map(problems.doubled, batch))
    A = fh.Hessian(model, criterion, batch, engine="retained")
    blocks = A.blocks("layer")
    assert len(blocks) == 22 and sum(block.n for block in blocks.values()) == A.n
    return A, blocks, (model, criterion, batch)


def requests(blocks):
    """One request per block: its product with a random vector."""
    torch.manual_seed(1)
    vectors = [torch.randn(1, block.n, dtype=block.dtype) for block in blocks.values()]
    pairs = zip(blocks.values(), vectors, strict=True)
    return [Request(block, V, torch.empty_like(V)) for block, V in pairs]


def check(A, blocks):
    """Compare each product with that of the full matrix and a vector that is zero elsewhere."""
    work = requests(blocks)
    multiply(work)
    for name, request in zip(blocks, work, strict=True):
        v = torch.zeros(A.n, dtype=A.dtype)
        inside = [key for key in A.layout.names if key.rpartition(".")[0] == name]
        for key, piece in request.operator.unflatten(request.V[0]).items():
            A.unflatten(v)[key].copy_(piece)
        Hv = A.unflatten(A @ v)
        expected = torch.cat([Hv[key].flatten() for key in inside])
        off = float((request.out[0] - expected).norm() / expected.norm())
        assert off < EXACT, (name, off)


@pytest.mark.filterwarnings("ignore")  # the peer's own
def test_products(row):
    check(*layers(double=True)[:2])
    A, blocks, problem = layers()
    work, v = requests(blocks), torch.randn(A.n)
    w = torch.cat([request.V[0] for request in work])

    def one_by_one():
        for request in work:
            multiply([request])

    # curvlinops has a block diagonal too, of consecutive parameters
    sizes = [len(block.layout.names) for block in blocks.values()]
    theirs = curvlinops.product(*problem, block_sizes=sizes)
    multiply(work)
    ours = torch.cat([request.out[0] for request in work])
    assert (theirs(w) - ours).norm() < NEAR * ours.norm()
    calls = {
        "whole": lambda: A @ v,
        "layers": lambda: multiply(work),
        "one by one": one_by_one,
    }
    middle = median(rounds(calls))
    what = "ResNet-20 without normalisation, 22 layers"
    row(f"{what}: joint products over the whole product",
        middle["layers"] / middle["whole"], target="<= 2")  # fmt: skip
    row("the same: layer by layer over jointly", middle["one by one"] / middle["layers"])
    few = median(rounds({"layers": calls["layers"], "curvlinops": lambda: theirs(w)}, 2))
    row("the same: curvlinops' block diagonal over jointly", few["curvlinops"] / few["layers"])


def test_densities(row):
    A, blocks, _ = layers()
    found = fh.density(blocks, steps=STEPS)
    assert set(found) == set(blocks)
    for name in [*blocks][::7]:
        alone = fh.density(blocks[name], steps=STEPS)
        scale = float(alone.nodes.abs().max())
        for end in (torch.max, torch.min):
            assert abs(end(found[name].nodes) - end(alone.nodes)) < NEAR * scale, name
    middle = median(
        rounds(
            {
                "whole": lambda: fh.density(A, steps=STEPS),
                "layers": lambda: fh.density(blocks, steps=STEPS),
            },
            3,
        )
    )
    row(f"ESD, {STEPS} steps: 22 layers over the whole matrix", middle["layers"] / middle["whole"])
