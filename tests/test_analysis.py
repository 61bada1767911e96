import pytest
import torch

from fasthessian.algorithms.arguments import ConvergenceWarning
from fasthessian.algorithms.eigsh import eigsh
from fasthessian.algorithms.trace import trace
from fasthessian.operators.base import SymmetricOperator
from fasthessian.study.analysis import default_span, deflated


def spiked(n=300, scale=1.0):
    """A symmetric matrix with five outliers over a bulk, in a random basis."""
    generator = torch.Generator().manual_seed(2)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    spectrum = 0.1 * torch.randn(n, dtype=torch.float64, generator=generator)
    spectrum[:5] = torch.tensor([90.0, 60.0, 40.0, 30.0, 20.0])
    M = scale * (Q * spectrum) @ Q.T
    return M, SymmetricOperator(lambda v: M @ v, n, dtype=torch.float64)


def test_deflation_keeps_the_trace_and_takes_the_variance():
    M, A = spiked()
    B = deflated(A, eigsh(A, 5, "LA"))
    plain, better = trace(A, rtol=0.05), trace(B, rtol=0.05)
    assert better.matvecs < plain.matvecs / 10
    low, high = better.interval
    assert low <= float(M.trace()) <= high


def test_deflation_by_vectors_that_have_not_converged_keeps_the_trace():
    M, A = spiked()
    with pytest.warns(ConvergenceWarning):
        pairs = eigsh(A, 5, "LA", max_matvecs=7)
    dense = deflated(A, pairs) @ torch.eye(300, dtype=torch.float64)
    assert float(dense.trace()) == pytest.approx(float(M.trace()), rel=1e-9)
    assert torch.allclose(dense, dense.T, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_default_span_follows_the_scale_of_parameters_not_of_the_loss(scale):
    assert default_span(0.2 * scale, 4.0 * scale) == default_span(0.2, 4.0) == 1.0
    assert default_span(0.2, 0.04) == 10.0  # ten times wider parameters
    assert default_span(-1.0, 2.0) == default_span(1.0, -2.0) == 1.0
