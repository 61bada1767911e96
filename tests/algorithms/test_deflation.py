"""Traces deflated by eigenpairs."""

import dataclasses

import pytest
import torch

import fasthessian as fh
from fasthessian import kernels


def spiked(n=300, scale=1.0):
    """A symmetric matrix with five outliers over a bulk, in a random basis."""
    generator = torch.Generator().manual_seed(2)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    spectrum = 0.1 * torch.randn(n, dtype=torch.float64, generator=generator)
    spectrum[:5] = torch.tensor([90.0, 60.0, 40.0, 30.0, 20.0])
    M = scale * (Q * spectrum) @ Q.T
    return M, fh.SymmetricOperator(lambda v: M @ v, n, dtype=torch.float64)


def test_deflation_keeps_the_trace_and_takes_the_variance():
    M, A = spiked()
    plain, better = fh.trace(A, rtol=0.05), fh.trace(A, rtol=0.05, deflate=fh.eigsh(A, 5, "LA"))
    assert better.matvecs < plain.matvecs / 10
    low, high = better.interval
    assert low <= float(M.trace()) <= high


def test_deflation_takes_vectors_of_any_strides():
    _, A = spiked()
    pairs = fh.eigsh(A, 2, "LA")
    strided = dataclasses.replace(pairs, vectors=pairs.vectors.T.contiguous().T)
    found, want = (fh.trace(A, rtol=0.5, deflate=p).samples for p in (strided, pairs))
    assert torch.equal(found, want)


def test_deflation_by_vectors_that_have_not_converged_keeps_the_trace():
    M, A = spiked()
    with pytest.warns(fh.ConvergenceWarning):
        pairs = fh.eigsh(A, 5, "LA", max_matvecs=7)
    Q, shift = pairs.vectors, float(pairs.values.sum()) / 300
    P = torch.eye(300, dtype=torch.float64) - Q.T @ Q
    B = P @ M @ P + shift * torch.eye(300, dtype=torch.float64)
    assert float(B.trace()) == pytest.approx(float(M.trace()), rel=1e-9)
    found = fh.trace(A, rtol=0.5, deflate=pairs)
    signs = torch.empty(len(found.samples), 300, dtype=torch.float64)
    for i, row in enumerate(signs):
        kernels.select("cpu").signs_(row, 0, i * 300)
    torch.testing.assert_close(found.samples, ((signs @ B) * signs).sum(1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("probes", [1, 2])
def test_the_trace_is_sampled_by_vectors_that_no_run_started_from(probes):
    M, A = spiked()
    s = fh.spectrum(A, (5, 0), steps=20, probes=probes, rtol=0.5)
    Q, n = s.top.vectors, A.n
    P = torch.eye(n, dtype=torch.float64) - Q.T @ Q
    B = P @ M @ P + float(s.top.values.sum()) / n * torch.eye(n, dtype=torch.float64)
    signs = torch.empty(len(s.trace.samples), n, dtype=torch.float64)
    for i, row in enumerate(signs):
        kernels.select("cpu").signs_(row, 0, (probes + i) * n)
    torch.testing.assert_close(s.trace.samples, ((signs @ B) * signs).sum(1))
