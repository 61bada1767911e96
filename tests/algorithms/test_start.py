"""Eigenpairs by a run that starts from approximate eigenvectors."""

import math
import warnings

import pytest
import torch

import fasthessian as fh
from tests.support.spectra import F32, F64, Dense

N = 300
TOP = torch.tensor([9.0, 6.0, 5.99, 4.0, 4.0, 3.0], dtype=F64)


def rotation(seed, drift=None):
    """An orthogonal matrix; near the identity by a drift."""
    X = torch.randn(N, N, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return torch.linalg.qr(X if drift is None else torch.eye(N) + drift / math.sqrt(N) * X)[0]


VALUES = torch.cat([TOP, torch.linspace(1.0, -0.5, N - len(TOP), dtype=F64)])
Q = rotation(0)  # eigenvectors in columns, descending


def matrix(Q, dtype=F32, values=VALUES):
    return Dense(((Q * values) @ Q.T).to(dtype))


def test_a_start_saves_products_and_changes_no_value():
    """The Hessian drifts, as between two checkpoints of a training."""
    with_start, without, vectors, drifted = 0, 0, None, Q
    values = torch.cat([torch.tensor([2.0, 1.8, 1.6, 1.4, 1.2]), VALUES[-N + 5 :].clamp(max=1.0)])
    for step in range(4):
        A = matrix(drifted, values=values)
        cold, warm = fh.eigsh(A, 5, "LA"), fh.eigsh(A, 5, "LA", start=vectors)
        for found in (cold, warm):
            assert found.converged
            torch.testing.assert_close(found.values, values[:5].double(), rtol=1e-3, atol=0)
        residuals = warm.vectors @ A.M - warm.values[:, None].float() * warm.vectors
        assert (residuals.norm(dim=1) <= warm.residuals).all()
        if step:
            with_start, without = with_start + warm.matvecs, without + cold.matvecs
        vectors, drifted = warm.vectors, drifted @ rotation(step + 1, 0.05)
    assert with_start < 0.95 * without


def test_a_start_from_the_wanted_vectors_ends_before_a_cold_run_is_first_judged():
    cold = fh.eigsh(matrix(Q), 1, "LA")
    warm = fh.eigsh(matrix(Q), 1, "LA", start=Q[:, 0].float())
    assert warm.converged and warm.matvecs < cold.matvecs


MISLEADING = {
    "an eigenvector below the top": lambda: Q[:, 4],
    "eigenvectors below the wanted ones": lambda: Q[:, 5:8].T,
    "one of the bulk": lambda: Q[:, N // 2],
    "the bottom": lambda: Q[:, -1],
    "one half of a close pair": lambda: Q[:, 1],
    "all wanted ones except the top": lambda: Q[:, 1:5].T,
    "orthogonal to the wanted ones": lambda: Q[:, 5:] @ torch.ones(N - 5, dtype=F64),
    "vectors that cancel": lambda: torch.stack([Q[:, 9], -Q[:, 9]]),
    "the wanted ones": lambda: Q[:, :5].T,
    "more than one block": lambda: Q[:, :11].T,
    "very short": lambda: 1e-30 * Q[:, 4],
}


@pytest.mark.parametrize("name", MISLEADING)
@pytest.mark.parametrize("which", ["LA", "BE"])
def test_a_start_that_misleads_hides_no_eigenvalue(name, which):
    ends = torch.cat([TOP[:3], VALUES[-2:]]) if which == "BE" else TOP[:5]
    cold = fh.eigsh(matrix(Q, F64), 5, which)
    for options in ({}, {"schedule": "cgs2"}):
        found = fh.eigsh(matrix(Q, F64), 5, which, start=MISLEADING[name](), **options)
        assert found.converged and found.matvecs <= 1.25 * cold.matvecs + 4
        torch.testing.assert_close(found.values, ends, rtol=1e-3, atol=0)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_start_in_a_space_of_few_dimensions(n):
    A = Dense(torch.diag(torch.arange(1.0, n + 1)))
    for seed in range(8):  # the random vector of n = 1 is the start or its negative
        found = fh.eigsh(A, n, "LA", start=torch.eye(n)[0], seed=seed)
        assert found.converged
        torch.testing.assert_close(found.values, torch.arange(n, 0.0, -1, dtype=F64))


def test_the_start_is_not_changed_and_the_same_seed_gives_the_same_bits():
    start = Q[:, :3].T.float()  # rows that are not contiguous
    copy, state = start.clone(), torch.random.get_rng_state()
    a, b, c = (fh.eigsh(matrix(Q), 3, "LA", start=start, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(a.vectors, b.vectors) and not torch.equal(a.vectors, c.vectors)
    assert torch.equal(start, copy) and torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("start", "error", "words"),
    [
        ([1.0] * N, TypeError, r"start must be a torch.Tensor of shape \(300,\) or \(b, 300\)"),
        (torch.ones(N - 1), ValueError, r"start must have shape .*, got \(299,\)"),
        (torch.ones(1, 1, N), ValueError, r"start must have shape .*, got \(1, 1, 300\)"),
        (torch.tensor(1.0), ValueError, r"start must have shape .*, got \(\)"),
        (torch.ones(N, dtype=F64), TypeError, "start must be torch.float32 on cpu"),
        (torch.ones(N, device="meta"), TypeError, "start must be torch.float32 on cpu"),
        (torch.ones(0, N), ValueError, "start must hold at least one vector"),
        (torch.full((N,), math.nan), ValueError, "start must hold .* finite numbers"),
        (torch.full((N,), math.inf), ValueError, "start must hold .* finite numbers"),
        (torch.eye(2, N)[[0, 1, 1]] * torch.tensor([[1.0], [1], [0]]), ValueError, "of zeros"),
    ],
)
def test_a_start_that_is_refused(start, error, words):
    A = matrix(Q)
    with pytest.raises(error, match=words) as caught:
        fh.eigsh(A, 2, start=start)
    assert "\n" not in str(caught.value) and A.matvecs == 0
    assert fh.eigsh(A, 2).converged  # the way out


def test_a_start_belongs_to_one_operator():
    blocks = {"a": matrix(Q), "b": matrix(rotation(1))}
    with pytest.raises(ValueError, match="start must be None for a dictionary of operators"):
        fh.eigsh(blocks, 2, start={"a": Q[:, :2].T.float()})
    for A in blocks.values():
        assert fh.eigsh(A, 2, start=Q[:, :2].T.float()).converged


def test_a_start_does_not_hide_that_products_were_too_few():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fh.eigsh(matrix(Q), 5, "LA", start=Q[:, :5].T.float(), max_matvecs=8)
    assert not found.converged and caught[0].category is fh.ConvergenceWarning
