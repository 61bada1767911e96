import pytest
import torch

from fasthessian.krylov import basis
from fasthessian.krylov.basis import allocate
from fasthessian.krylov.space import Space
from fasthessian.operators.base import SymmetricOperator

N = 1000
UNIT = {torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def made(kind, dtype, rows, n=N):
    """A basis of random rows of length about 1, and the rows in float64 as they are stored."""
    A = SymmetricOperator(lambda v: v, n, dtype=dtype)
    found = allocate(kind, rows, Space(A, None))
    V = torch.randn(rows, n, dtype=dtype, generator=torch.Generator().manual_seed(1)) / n**0.5
    for row, v in enumerate(V):
        found.store(row, v)
    return found, found.stored.double() / found.scale


@pytest.fixture(params=[1 << 30, 20_000, 1], ids=["one tile", "several", "narrowest"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(basis, "TILE", request.param)


@pytest.mark.parametrize("kind", ["full", "compressed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1, 8, 11])
@pytest.mark.usefixtures("tiles")
def test_rows_are_rotated(kind, dtype, p):
    rotated, rows = made(kind, dtype, 13)
    S = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0][:, :p]
    wanted = S.T @ rows[:12]
    out = torch.full((p, N), torch.nan, dtype=dtype)
    rotated.rotate(S, out)
    bound = 1.01 * UNIT[dtype] * wanted.abs() + 1e-15
    assert ((out.double() - wanted).abs() <= bound).all()  # rounded once
    last = rotated.stored[p:].clone()
    rotated.rotate(S)
    unit = UNIT[dtype] + (UNIT[torch.float16] if kind == "compressed" else 0)
    found = rotated.stored[:p].double() / rotated.scale
    smallest = 2.0**-25 / rotated.scale if kind == "compressed" else 1e-15  # of float16
    assert ((found - wanted).abs() <= 1.01 * unit * wanted.abs() + smallest).all()
    assert torch.equal(rotated.stored[p:], last)


@pytest.mark.parametrize("kind", ["full", "compressed"])
def test_a_rotation_has_the_same_bits_in_tiles_of_any_size(kind, monkeypatch):
    S = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for size in (1 << 30, 30_000, 1):
        monkeypatch.setattr(basis, "TILE", size)
        rotated, _ = made(kind, torch.float32, 10)
        rotated.rotate(S)
        found.append(rotated.stored.clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_rotation_takes_each_part_of_the_rows_once(monkeypatch):
    rotated, _ = made("full", torch.float32, 20, n=30_000)
    monkeypatch.setattr(basis, "TILE", 1 << 20)
    calls, update_ = [], rotated.space.kernels.update_

    def counted(V, W, H, *rest, **options):
        calls.append(tuple(V.shape))
        return update_(V, W, H, *rest, **options)

    monkeypatch.setattr(rotated.space, "kernels", type("Kernels", (), {"update_": counted}))
    rotated.rotate(torch.eye(20, dtype=torch.float64)[:, :8])
    assert sum(columns for _, columns in calls) == 30_000 and len(calls) == 3
