"""ResNet-20 on a CPU: density, top eigenvalues and a whole analysis, ours and PyHessian's."""

import copy
import dataclasses
import time

import pytest
import torch

import fasthessian as fh
from bench.harness.timing import median, rounds
from bench.peers import pyhessian
from fasthessian.app.problems import Settings, load

STEPS, TOP, FEW = 100, 10, 5


@pytest.fixture(scope="module")
def problem():
    """A ResNet-20 trained for one epoch on digits, and one batch of 64."""
    return load("resnet20", Settings(epochs=1, samples=64, batch_size=64))


def theirs(package, problem):
    """PyHessian's object for the only batch of a problem."""
    (batch,) = problem.data
    model = copy.deepcopy(problem.model)
    return package.hessian(model, problem.criterion, data=batch, cuda=False)


def ours(problem):
    return fh.Hessian(problem.model, problem.criterion, problem.data)


def test_density(problem, row, benchmark):
    with pyhessian.package() as package:
        values, _ = theirs(package, problem).density(iter=STEPS)
        found = fh.density(ours(problem), steps=STEPS)
        # the starting vectors differ: the outermost nodes agree, the weights need not
        for ours_end, their_end in (
            (float(found.nodes.max()), max(values[0])),
            (float(found.nodes.min()), min(values[0])),
        ):
            assert abs(ours_end / their_end - 1) < 1e-2
        A, loss = ours(problem), _gradient(problem)
        v = torch.randn(A.n)
        middle = median(
            rounds(
                {
                    "theirs": lambda: theirs(package, problem).density(iter=STEPS),
                    "ours": lambda: fh.density(ours(problem), steps=STEPS),
                    "gradient": lambda: [loss() for _ in range(10)],
                    "product": lambda: [A @ v for _ in range(10)],
                },
                3,
            )
        )
    row(
        f"ESD, {STEPS} steps, against PyHessian", middle["theirs"] / middle["ours"], target=">= 1.5"
    )
    row("product over gradient", middle["product"] / middle["gradient"], target="<= 2.0")
    share = 1 - STEPS / 10 * middle["product"] / middle["ours"]
    row("share of our ESD outside the products", share, "")
    benchmark.pedantic(lambda: A @ v, rounds=3)


def _gradient(problem):
    (batch,) = problem.data
    model = problem.model.eval()
    params = list(model.parameters())
    return lambda: torch.autograd.grad(problem.criterion(model(batch[0]), batch[1]), params)


def test_top_eigenvalues(problem, row, benchmark):
    A = ours(problem)
    reference = fh.eigsh(A, TOP, tol=1e-6)
    assert reference.converged
    start = time.perf_counter()
    found = fh.eigsh(ours(problem), TOP, tol=1e-3)
    our_time = time.perf_counter() - start
    error = (found.values / reference.values - 1).abs().max()
    assert found.converged and error < 1e-3
    with pyhessian.package() as package, pyhessian.counted() as product:
        start = time.perf_counter()
        values, _ = theirs(package, problem).eigenvalues(maxIter=500, tol=1e-3, top_n=TOP)
        their_time = time.perf_counter() - start
        their_products = product.call_count
    their_error = (torch.tensor(values).double() / reference.values - 1).abs().max()
    row(f"top {TOP} eigenvalues: our products", found.matvecs, "")
    row(f"top {TOP} eigenvalues: PyHessian's products", their_products, "")
    row("PyHessian's products over ours", their_products / found.matvecs, target=">= 5")
    row("PyHessian's time over ours", their_time / our_time)
    row("our largest relative error", float(error), "")
    row("PyHessian's largest relative error at its tol 1e-3", float(their_error), "")
    benchmark.pedantic(lambda: fh.eigsh(A, 1), rounds=1)


def test_whole_analysis(row, benchmark):
    """The analysis of ``make demo``: `spectrum`, four calls of ours, three calls of PyHessian."""
    problem, steps = load("resnet20", Settings()), 60
    A = ours(problem)
    start = time.perf_counter()
    found = fh.spectrum(A, (FEW, 2), steps=steps)
    our_time = time.perf_counter() - start
    top, bottom = fh.eigsh(A, FEW, "LA", tol=1e-6), fh.eigsh(A, 2, "SA", tol=1e-6)
    for mine, want in ((found.top, top), (found.bottom, bottom)):
        assert mine.converged and (mine.values / want.values - 1).abs().max() < 1e-3
    total = fh.trace(A, deflate=top, seed=1)
    halves = [(e.interval[1] - e.interval[0]) / 2 for e in (found.trace, total)]
    assert found.trace.converged and abs(found.trace.value - total.value) < 1.5 * sum(halves)
    apart = [fh.eigsh(A, FEW, "LA"), fh.eigsh(A, 2, "SA"), total, fh.density(A, steps=steps)]
    with pyhessian.package() as package, pyhessian.counted() as product:
        start = time.perf_counter()
        # one batch, since its loader mode builds the graph again for every product
        whole = tuple(map(torch.cat, zip(*problem.data, strict=True)))
        peer = theirs(package, dataclasses.replace(problem, data=[whole]))
        peer.eigenvalues(maxIter=500, tol=1e-3, top_n=FEW)
        samples = peer.trace()
        peer.density(iter=steps)
        their_time = time.perf_counter() - start
        their_products = product.call_count
    what = f"top {FEW}, trace, density of {steps} steps"
    row(f"{what}: our products, 2 bottom eigenvalues too", found.matvecs, "")
    row("the same by four calls", sum(part.matvecs for part in apart), "")
    row(f"{what}: PyHessian's products", their_products, "")
    row(f"{what}: PyHessian's time over ours", their_time / our_time)
    row("half-width of our trace's interval over its value", halves[0] / found.trace.value, "")
    row("PyHessian's trace over ours", sum(samples) / len(samples) / found.trace.value)
    benchmark.pedantic(lambda: fh.eigsh(A, 1), rounds=1)
