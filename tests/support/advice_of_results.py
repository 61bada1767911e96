"""The advice in the messages of algorithms, kernels and records; see advice_of_operators.py."""

import torch
from torch import nn

import fasthessian as fh
from fasthessian import kernels
from fasthessian.kernels import reference
from fasthessian.results.records import Eigenpairs

D = torch.linspace(1, 400, 400, dtype=torch.float64)


def diagonal(d=D, **options):
    return fh.SymmetricOperator(lambda v: d * v, len(d), dtype=torch.float64, **options)


def skewed():
    S = torch.diag(D[:30]) + torch.ones(30, 30, dtype=torch.float64).triu(1)
    return fh.SymmetricOperator(lambda v: v @ S.T, 30, dtype=torch.float64, check=False)


def loss():
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    return fh.Hessian.from_closure(lambda: (x**4).sum(), [x])


def save(folder, **options):
    fh.eigsh(diagonal(), 1).save(folder, **options)


def outliers():
    d = torch.linspace(-0.3, 0.7, 4000, dtype=torch.float64)
    d[:3] = torch.tensor([3000.0, 2100.0, 1500.0])
    return diagonal(d)


CORNERS = torch.eye(3, dtype=torch.float64)
ROWS, W = torch.ones(2, 5), torch.ones(1, 5)
SOFTMAX = torch.rand(4, 3), torch.rand(4, 3), torch.rand(4).double()
EQUAL = torch.tensor([5.0, 5, 5, 4, 4, 4, *torch.linspace(0, 3, 94)], dtype=torch.float64)

CASES = {
    # algorithms
    "make one with fh.Hessian(model, criterion, data) or fh.SymmetricOperator(matvec, n)": (
        TypeError, lambda p: fh.eigsh(torch.eye(3)), lambda p: fh.eigsh(diagonal()),
        lambda p: fh.eigsh(loss())),
    "A must know its loss": (TypeError, lambda p: fh.landscape(diagonal(), D),
        lambda p: fh.landscape(loss(), D[:3], points=3),
        lambda p: fh.landscape(fh.Hessian(nn.Linear(2, 1), nn.MSELoss(),
            (torch.ones(3, 2), torch.ones(3, 1))), torch.ones(3), points=3)),
    "pass directions of your own to fh.landscape": (ValueError,
        lambda p: fh.filter_normalized(loss()), lambda p: fh.landscape(loss(), D[:3], points=2)),
    "; use points=list(...)": (TypeError, lambda p: fh.trajectory(loss(), iter(CORNERS)),
        lambda p: fh.trajectory(loss(), list(CORNERS))),
    "for one or two use fh.toward(A, point)": (ValueError,
        lambda p: fh.trajectory(loss(), CORNERS[:2]),
        lambda p: fh.landscape(loss(), fh.toward(loss(), CORNERS[0]), points=2)),
    "lie on one line, to rounding; use ": (ValueError,
        lambda p: fh.trajectory(loss(), torch.outer(D[:4], CORNERS[0])),
        lambda p: fh.landscape(loss(), fh.toward(loss(), CORNERS[0]), points=2)),
    "pass a symmetric operator": (ValueError, lambda p: fh.eigsh(skewed(), 2),
        lambda p: fh.eigsh(diagonal(D[:30]), 2)),
    "pass an operator, or blocks such as A.blocks()": (ValueError, lambda p: fh.eigsh({}),
        lambda p: fh.eigsh(loss()), lambda p: fh.eigsh(loss().blocks("."))),
    "raise max_matvecs or ": (UserWarning,
        lambda p: fh.eigsh(diagonal(), 4, "SA", max_matvecs=40, ncv=20),
        lambda p: fh.eigsh(diagonal(), 4, "SA", max_matvecs=2000, ncv=20),
        lambda p: fh.eigsh(diagonal(), 4, "SA", max_matvecs=400, ncv=390)),
    "raise max_matvecs or tol": (UserWarning,
        lambda p: fh.eigsh(diagonal(), 4, tol=1e-5, basis="compressed", max_matvecs=30),
        lambda p: fh.eigsh(diagonal(), 4, tol=1e-3, basis="compressed", max_matvecs=600),
        lambda p: fh.eigsh(diagonal(), 4, tol=1e-5, basis="full", max_matvecs=600)),
    "between them is missing; raise max_matvecs": (UserWarning,
        lambda p: fh.eigsh(diagonal(EQUAL), 3, "LA", max_matvecs=34),
        lambda p: fh.eigsh(diagonal(EQUAL), 3, "LA", max_matvecs=300)),
    "wider than rtol=": (UserWarning, lambda p: fh.trace(symmetric(), rtol=0.1, max_matvecs=9),
        lambda p: fh.trace(symmetric(), rtol=0.1, max_matvecs=900),
        lambda p: fh.trace(symmetric(), rtol=0.9, max_matvecs=900)),
    "take basis='full', or a sigma of at least ": (UserWarning,
        lambda p: fh.density(outliers(), steps=40, sigma=0.1, basis="compressed"),
        lambda p: fh.density(outliers(), steps=40, sigma=0.1, basis="full"),
        lambda p: fh.density(outliers(), steps=40, sigma=9.0, basis="compressed")),
    # basis, kernels
    "use 'full' or 'compressed'": (ValueError, lambda p: fh.eigsh(diagonal(), basis="offload"),
        lambda p: fh.eigsh(diagonal(), basis="full"),
        lambda p: fh.eigsh(diagonal(), basis="compressed")),
    "; leave backend unset": (RuntimeError, lambda p: kernels.select("meta", "native"),
        lambda p: kernels.select("meta")),
    " must have unit stride along its rows, got strides ": (ValueError,
        lambda p: reference.project_(torch.ones(5, 2).T, W.clone()),
        lambda p: reference.project_(torch.ones(5, 2).T.contiguous(), W.clone())),
    " but W is on ": (ValueError, lambda p: reference.project_(ROWS.to("meta"), W.clone()),
        lambda p: reference.project_(ROWS, W.clone())),
    "; move one": (ValueError,
        lambda p: reference.project_(ROWS, W.clone(), torch.ones(2, 1, device="meta")),
        lambda p: reference.project_(ROWS, W.clone(), torch.ones(2, 1))),
    "split the block": (ValueError, lambda p: reference.project_(ROWS, torch.ones(9, 5)),
        lambda p: [reference.project_(ROWS, w) for w in torch.ones(9, 5).split(8)]),
    "give a matrix of rows as (rows, classes, 1)": (ValueError,
        lambda p: reference.softmax_curvature_(*SOFTMAX),
        lambda p: reference.softmax_curvature_(*(t.unsqueeze(-1) for t in SOFTMAX))),
    " must be contiguous, got strides ": (ValueError,
        lambda p: reference.softmax_curvature_(*strided()),
        lambda p: reference.softmax_curvature_(*(t.contiguous() for t in strided()))),
    # records
    " does not exist; make it first": (FileNotFoundError, lambda p: save(p / "a" / "b"),
        lambda p: ((p / "a").mkdir(), save(p / "a" / "b"))),
    "pass overwrite=True or choose another path": (FileExistsError,
        lambda p: (save(p / "c"), save(p / "c")),
        lambda p: save(p / "c", overwrite=True), lambda p: save(p / "d")),
    " holds a ": (ValueError, lambda p: (save(p / "e"), fh.Density.load(p / "e")),
        lambda p: Eigenpairs.load(p / "e")),
}  # fmt: skip


def symmetric():
    torch.manual_seed(0)
    S = torch.randn(200, 200, dtype=torch.float64)
    S = S + S.T + 8 * torch.eye(200)
    return fh.SymmetricOperator(lambda v: v @ S, 200, dtype=torch.float64)


def strided():
    U = torch.rand(4, 3, 2).transpose(1, 2)
    return U, torch.rand(4, 2, 3), torch.rand(4, 3).double()
