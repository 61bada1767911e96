"""Flat vectors, padded rows, and operators from a callable."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fasthessian as fh
from fasthessian import kernels
from fasthessian.operators.base import multiply
from fasthessian.operators.request import Request
from fasthessian.vectors import LARGE, Layout, empty_rows
from tests.support.models import PROBLEMS


def test_flatten_and_unflatten_are_inverse_and_share_memory() -> None:
    model, criterion, data = PROBLEMS["cnn"].make()
    A = fh.Hessian(model, criterion, data)
    theta = A.flatten(dict(model.named_parameters()))
    assert torch.equal(theta, nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(theta, A.flatten(list(model.parameters())))
    assert not theta.requires_grad
    pieces = A.unflatten(theta)
    assert list(pieces) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(pieces[k], p) for k, p in model.named_parameters())
    pieces["head.bias"].fill_(7.0)
    assert torch.equal(theta[-4:], torch.full((4,), 7.0, dtype=torch.float64))


def test_flatten_reads_non_contiguous_tensors_and_scalars() -> None:
    M = torch.arange(6.0).view(2, 3)
    layout = Layout({"a": M.T, "empty": torch.empty(0, 4), "b": torch.tensor(9.0)})
    flat = layout.flatten([M.T, torch.empty(0, 4), torch.tensor(9.0)])
    assert flat.tolist() == [0, 3, 1, 4, 2, 5, 9]
    assert layout.unflatten(flat)["b"].shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 511, 512, 1024, 2048, 4099, LARGE])
def test_rows_are_aligned_to_cache_lines_and_not_to_pages(n: int, dtype: torch.dtype) -> None:
    V = empty_rows(3, n, dtype, "cpu")
    assert V.shape == (3, n) and not V.any()
    stride = V.stride(0) * V.element_size()
    assert stride % 64 == 0 and stride % 4096 != 0 and stride - n * V.element_size() < 128
    assert all(row.data_ptr() % 64 == 0 for row in V)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rows_take_memory_when_they_are_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    V = empty_rows(100, 1 << 20, torch.float32, "cpu")
    assert resident() - before < 1 << 25
    V[:40] = 1.0
    assert 140 << 20 < resident() - before < 240 << 20
    assert V[39, -1] == 1 and V[40, 0] == 0
    row = V[:1]
    del V  # the memory lives as long as a view of it
    assert row.all()
    del row
    assert resident() - before < 1 << 25


def test_large_rows_are_on_the_cpu_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        V = empty_rows(2, LARGE, torch.float16, "cpu")
    assert V.device.type == "cpu" and not V.any()


def test_a_request_writes_only_its_strided_rows() -> None:
    made = PROBLEMS["mlp"].make()
    A = PROBLEMS["mlp"].operator(*made)
    n = A.n
    store = torch.full((4, n + 3), 5.0, dtype=A.dtype)
    source = torch.zeros(4, n + 5, dtype=A.dtype)
    for row in source:
        kernels.reference.normal_(row[1 : n + 1], 2)
    kept = source.clone()
    multiply([Request(A, source[::2, 1 : n + 1], store[1:3, 2 : n + 2])])
    assert torch.equal(store[1:3, 2 : n + 2], A @ source[::2, 1 : n + 1])
    store[1:3, 2 : n + 2] = 5.0
    assert bool((store == 5.0).all()) and torch.equal(source, kept)
    A.matvecs = 0
    assert (A @ torch.empty(0, n, dtype=A.dtype)).shape == (0, n) and A.matvecs == 0


def _symmetric(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    M = kernels.reference.normal_(torch.empty(n * n, dtype=dtype), 4).view(n, n)
    return M + M.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 37])
def test_a_callable_multiplies_vectors_blocks_and_requests(n: int, dtype: torch.dtype) -> None:
    M = _symmetric(n, dtype)
    A = fh.SymmetricOperator(lambda v: M @ v, n, dtype=dtype)
    v = torch.arange(2.0 * n, dtype=dtype).view(2, n)
    tolerance = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(A @ v[0], M @ v[0], **tolerance)
    torch.testing.assert_close(A @ v, v @ M, **tolerance)
    torch.testing.assert_close(A @ v.T.contiguous().T, v @ M, **tolerance)
    out = torch.empty_like(v)
    multiply([Request(A, v, out)])
    torch.testing.assert_close(out, v @ M, **tolerance)
    assert A.matvecs == 7


def test_the_symmetry_probe_is_made_once_and_not_counted() -> None:
    M, seen = _symmetric(5), []

    def matvec(v: Tensor) -> Tensor:
        seen.append(v)
        return M @ v

    A = fh.SymmetricOperator(matvec, 5, dtype=torch.float64)
    assert seen == []
    A @ torch.ones(3, 5, dtype=torch.float64)
    A @ torch.ones(5, dtype=torch.float64)
    assert A.matvecs == 4 and len(seen) == 4 + 2
    skew = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    B = fh.SymmetricOperator(lambda v: skew @ v, 2, check=False)
    assert (B @ torch.tensor([0.0, 1.0])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_symmetry_probe_detects_one_per_cent_at_any_scale(
    dtype: torch.dtype, scale: float
) -> None:
    n = 200
    M = _symmetric(n, dtype) * scale
    one = torch.ones(n, dtype=dtype)
    fh.SymmetricOperator(lambda v: M @ v, n, dtype=dtype) @ one
    crooked = M + 0.1 * torch.triu(M, 1)
    with pytest.raises(ValueError, match="not symmetric"):
        fh.SymmetricOperator(lambda v: crooked @ v, n, dtype=dtype) @ one


def test_a_matvec_that_differentiates_works_under_no_grad() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)

    def matvec(v: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(w.pow(3).sum(), w, create_graph=True)
        return torch.autograd.grad(g, w, v)[0]

    with torch.no_grad():
        Hv = fh.SymmetricOperator(matvec, 2) @ torch.ones(2)
    assert Hv.tolist() == [6.0, 12.0] and not Hv.requires_grad


def test_callables_accept_tensors_made_under_inference_mode() -> None:
    M = _symmetric(4)
    A = fh.SymmetricOperator(lambda v: M @ v, 4, dtype=torch.float64)
    with torch.inference_mode():
        V, out = torch.eye(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
        multiply([Request(A, V, out)])
        assert torch.equal(out, M) and torch.equal(A @ V, M)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_scipy_works_with_arpack(dtype: torch.dtype) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    made = PROBLEMS["mlp"].make(dtype)
    A = PROBLEMS["mlp"].operator(*made)
    L = A.to_scipy()
    assert L.shape == (A.n, A.n) and L.dtype == np.dtype(str(dtype).removeprefix("torch."))
    exact = PROBLEMS["mlp"].dense(*PROBLEMS["mlp"].make()).numpy()
    top = linalg.eigsh(L, k=2, which="LA", return_eigenvectors=False)
    assert np.allclose(np.sort(top), np.linalg.eigvalsh(exact)[-2:], rtol=1e-5)
    X = np.asfortranarray(np.eye(A.n)[:, :3])
    assert np.allclose(L @ X, exact[:, :3], atol=1e-5)
    assert np.allclose(L.T @ X[:, 0], exact[:, 0], atol=1e-5)
    assert A.matvecs > 6
