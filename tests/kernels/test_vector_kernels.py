"""Conformance of the kernels on one vector, in every backend: random streams and packing."""

import pytest
import torch

from fasthessian.kernels import reference
from tests.support.kernel_cases import F32, F64, each_backend, rows


@each_backend
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 10007])
@pytest.mark.parametrize("offset", [0, 1, 31, 128, 1000003, 2**40 + 5])
def test_random_streams_match_the_reference(row, dtype, n, offset):
    backend, seed = row.module(), 0x1234_5678_9ABC_DEF0
    signs = backend.signs_(torch.full((n,), 7.0, dtype=dtype, device=row.device), seed, offset)
    assert torch.equal(signs.cpu(), reference.signs_(torch.empty(n, dtype=dtype), seed, offset))
    assert bool((signs.abs() == 1).all())
    normal = backend.normal_(torch.full((n,), 7.0, dtype=dtype, device=row.device), seed, offset)
    want = reference.normal_(torch.empty(n, dtype=dtype), seed, offset)
    torch.testing.assert_close(normal.cpu(), want, rtol=4 * torch.finfo(dtype).eps, atol=1e-14)


@each_backend
def test_an_offset_gives_a_piece_of_the_same_stream(row):
    for fill in (row.module().normal_, row.module().signs_):
        whole = fill(torch.empty(1000, device=row.device), 5, 0)
        parts = [fill(torch.empty(333, device=row.device), 5, 0),
                 fill(torch.empty(667, device=row.device), 5, 333)]  # fmt: skip
        assert torch.equal(whole, torch.cat(parts))
        unaligned = torch.empty(1001, device=row.device)[1:]
        assert torch.equal(whole, fill(unaligned, 5, 0))
        assert not torch.equal(whole, fill(torch.empty(1000, device=row.device), 6, 0))


def test_philox_matches_a_published_answer():
    """The published vector of Random123 for counter 0 and key 0."""
    words = reference._philox(torch.tensor([0]), 0, 0)
    assert words.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@each_backend
def test_random_streams_have_the_right_moments(row):
    n = 200_000
    x = row.module().normal_(torch.empty(n, dtype=F64, device=row.device), 11).cpu()
    moments = [(x**p).mean().item() for p in (1, 2, 3, 4)]
    for found, want, spread in zip(
        moments, (0, 1, 0, 3), (1, 2**0.5, 15**0.5, 96**0.5), strict=True
    ):
        assert abs(found - want) < 5 * spread / n**0.5
    s = row.module().signs_(torch.empty(n, dtype=F64, device=row.device), 11).cpu()
    assert abs(s.mean().item()) < 5 / n**0.5
    assert abs((s[1:] * s[:-1]).mean().item()) < 5 / n**0.5


@each_backend
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5])
def test_pack_concatenates_scales_and_adds(row, dtype, beta):
    sizes = [(3, 4), (0,), (1,), (), (40001,), (8, 2)] + [(5,)] * 300
    tensors = [
        rows(1, max(1, torch.Size(s).numel()), dtype, i).reshape(-1) for i, s in enumerate(sizes)
    ]
    tensors = [t[: torch.Size(s).numel()].reshape(s) for t, s in zip(tensors, sizes, strict=True)]
    tensors.append(rows(6, 9, dtype, 50).T)  # not contiguous
    flat = torch.cat([t.reshape(-1) for t in tensors]).double()
    out = torch.full((flat.numel(),), float("nan") if beta == 0 else 2.0, dtype=dtype)
    out = out.to(row.device)
    want = 0.3 * flat + (0 if beta == 0 else 2.0 * beta)
    placed = [t.to(row.device) for t in tensors]
    assert row.module().pack_(out, placed, 0.3, beta) is out
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.cpu().double(), want, rtol=4 * eps, atol=4 * eps)
    assert row.module().pack_(out[:0], []).numel() == 0
