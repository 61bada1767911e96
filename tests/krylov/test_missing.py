"""No wanted eigenvalue is missing: copies of multiple ones, close pairs, values overlooked."""

import math
import warnings

import pytest
import torch
from torch import nn

import fasthessian as fh
from fasthessian.algorithms import eigsh as eigsh_module
from fasthessian.krylov.missing import MISS, Side, limits, outside

F32, F64 = torch.float32, torch.float64
BULK = torch.linspace(-1, 1, 300, dtype=F64)
VALUES = torch.tensor([9.0, 7, 5, 4, 3, 2.5, -8, -6, -3.5, -2.2], dtype=F64)


def diagonal(values, dtype=F64, scale=1.0):
    d = torch.as_tensor(values, dtype=F64).mul(scale).to(dtype)
    return fh.SymmetricOperator(lambda v: d * v, len(d), dtype=dtype, check=False)


def wanted(values, k, which):
    down = values.sort(descending=True).values
    if which == "LM":
        return values[values.abs().argsort(descending=True)][:k].abs()
    if which == "BE":
        return torch.cat((down[: (k + 1) // 2], down[len(down) - k // 2 :]))
    return down[:k] if which == "LA" else down.flip(0)[:k]


def wrong(found, values, which, error=2e-3):
    """Whether a result that says "converged" is wrong."""
    want = wanted(values, len(found.values), which)
    got = found.values.abs() if which == "LM" else found.values
    floor = 1e-6 * float(values.abs().max())
    return found.converged and bool(((got - want).abs() > error * want.abs() + floor).any())


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("copies", [2, 3, 5])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_all_copies_of_multiple_eigenvalues(copies, which, dtype):
    values = torch.cat([VALUES.repeat_interleave(copies), BULK])
    for k in (1, 4, 7):
        found = fh.eigsh(diagonal(values, dtype), k, which, seed=k)
        assert found.converged and not wrong(found, values, which)
        gram = found.vectors.double() @ found.vectors.double().T
        torch.testing.assert_close(gram, torch.eye(k, dtype=F64), rtol=0, atol=1e-5)
        d = values.to(dtype).double()
        true = (d * found.vectors.double() - found.values[:, None] * found.vectors.double()).norm(
            dim=1
        )
        assert bool((true <= found.residuals * (1 + 1e-9)).all())


def test_ten_copies_of_one_inner_value():
    values = torch.cat([VALUES, torch.full((9,), 5.0, dtype=F64), BULK])
    found = fh.eigsh(diagonal(values), 12, "LA")
    assert found.converged and found.values.tolist() == pytest.approx([9, 7, *[5] * 10])


@pytest.mark.parametrize("apart", [1e-4, 5e-4, 9e-4, 3e-3])
def test_pairs_closer_than_tol(apart):
    values = torch.cat([VALUES, VALUES * (1 - apart), BULK])
    for which in ("LM", "LA", "SA", "BE"):
        for k in (1, 3, 6):
            assert not wrong(fh.eigsh(diagonal(values), k, which, seed=k), values, which)


def test_a_close_pair_in_front_of_a_dense_bulk():
    """Spectrum of LUNDA (147 x 147), a pair 9e-4 apart: one seed in four found only one of it."""
    top = torch.tensor(
        [2.23854064, 2.21040215, 2.19788363, 2.16594143, 2.12213122, 2.10704309, 2.08478198,
         2.03935452, 2.03316370, 2.03142322, 2.00409166, 1.98642469, 1.98055200, 1.95133679],
        dtype=F64,
    )  # fmt: skip
    values = torch.cat([top, torch.linspace(1.94, 0, 133, dtype=F64)])
    for seed in range(20):
        found = fh.eigsh(diagonal(values), 10, "LA", seed=seed)
        assert found.converged and not wrong(found, values, "LA")


def test_a_larger_eigenvalue_that_the_start_vector_nearly_misses():
    """Without the search 18 of 400 seeds return 0.996 for the largest."""
    values = torch.cat([torch.tensor([1.0, 0.996], dtype=F64), torch.linspace(0, 0.97, 500)])
    assert not any(
        wrong(fh.eigsh(diagonal(values), 1, "LA", seed=seed), values, "LA") for seed in range(60)
    )


@pytest.mark.parametrize("which", ["SA", "BE"])
def test_zeros_of_a_large_null_space(which):
    values = torch.cat([torch.linspace(0.1, 1, 300, dtype=F64), torch.zeros(700, dtype=F64)])
    found = fh.eigsh(diagonal(values), 4, which)
    assert found.converged and not wrong(found, values, which)


@pytest.mark.parametrize("basis", ["full", "compressed"])
def test_layers_under_mean_squared_error(basis):
    """H of a linear layer with C outputs has every eigenvalue C times."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    H = fh.Hessian(model, torch.nn.MSELoss(), (x, y))
    block = H.blocks("layer")["2"]
    exact = torch.linalg.eigvalsh((block @ torch.eye(block.n)).double()).flip(0)
    for pairs in (
        fh.eigsh({"2": block}, 5, basis=basis)["2"],
        fh.spectrum(block, (5, 0), basis=basis).top,
    ):
        assert pairs.converged
        torch.testing.assert_close(pairs.values, exact[:5], rtol=1e-3, atol=1e-6)
    last = fh.hessian(model, torch.nn.MSELoss(), data=(x, y), cuda=False)
    last.params, last.gradsH = last.params[2:], last.gradsH[2:]
    assert last.eigenvalues(top_n=5)[0] == pytest.approx(exact[:5].tolist(), rel=2e-3)


def test_too_few_products_to_tell_is_no_convergence():
    values = torch.cat([torch.tensor([4.0, 3, 2], dtype=F64), torch.linspace(-1, 1, 400)])
    full = fh.eigsh(diagonal(values), 3, "LA")
    assert full.converged
    with pytest.warns(fh.ConvergenceWarning, match="no eigenvalue between them is missing"):
        found = fh.eigsh(diagonal(values), 3, "LA", max_matvecs=full.matvecs - 2)
    assert not found.converged and bool((found.residuals <= 1e-3 * found.values).all())
    assert found.matvecs == full.matvecs - 2


def test_same_seed_same_bits_and_deferred_runs_agree(monkeypatch):
    values = torch.cat([VALUES.repeat_interleave(2), BULK])
    first, again = (fh.eigsh(diagonal(values), 5, seed=3) for _ in range(2))
    assert torch.equal(first.vectors, again.vectors) and first.matvecs == again.matvecs
    krylov = eigsh_module.Lanczos
    monkeypatch.setattr(
        eigsh_module, "Lanczos", lambda *a, **o: krylov(*a, **o | {"deferred": True})
    )
    deferred = fh.eigsh(diagonal(values), 5, seed=3)
    assert deferred.converged
    torch.testing.assert_close(deferred.values, first.values, rtol=1e-6, atol=0)


def test_the_polynomials_bound_the_weight_at_a_point():
    """Legendre: sum p_j(x)^2 of the uniform measure, in closed form at x = 1."""
    side = Side(1.0, 1)
    for j in range(1, 20):
        side.add(0.0, j / math.sqrt(4 * j * j - 1))
        assert side.total == pytest.approx((j + 1) ** 2) and not side.passed
    inside = Side(0.5, 1)
    for j in range(1, 20):
        inside.add(0.0, j / math.sqrt(4 * j * j - 1))
    assert inside.passed
    below = Side(-1.0, -1)
    below.add(0.0, 1 / math.sqrt(3))
    assert below.total == pytest.approx(4)


def test_a_weight_above_the_bound_is_seen():
    """An eigenvalue whose weight is the least that a search must see, at the end of a bulk."""
    n = 400
    values = torch.cat([torch.linspace(-1, 1, n - 1, dtype=F64), torch.tensor([1.3], dtype=F64)])
    weights = torch.full((n,), 1 / n, dtype=F64)
    weights[-1] = MISS**2 * math.pi / 2 / n  # (d^2 / n), P(|g| < d) = MISS
    q, before, beside, side = (
        weights.sqrt() / weights.sum().sqrt(),
        torch.zeros(n),
        0.0,
        Side(1.2, 1),
    )
    basis = []
    while not side.passed and side.total < 1 / float(weights[-1]):
        basis.append(q)
        w = values * q - beside * before
        alpha = float(w @ q)
        w = w - alpha * q
        for _ in range(2):
            w = w - torch.stack(basis).T @ (torch.stack(basis) @ w)
        before, beside = q, float(w.norm())
        q = w / beside
        side.add(alpha, beside)
    assert side.passed


@pytest.mark.parametrize(
    ("which", "want"),
    [("LM", [(3.003, 1), (-3.003, -1)]), ("LA", [(-3.996, 1)]), ("SA", [(4.995, -1)]),
     ((2, 1), [(3.003, 1), (-4.004, -1)]), ((0, 3), [(4.995, -1)])],
)  # fmt: skip
def test_the_points_lie_beyond_the_last_wanted_value(which, want):
    values = torch.tensor([5.0, 3.0, -4.0], dtype=F64)
    found = limits(values, which, 1e-3, 0.0)
    assert [sign for _, sign in found] == [sign for _, sign in want]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in want])


def test_zeros_have_points_apart_from_them():
    assert limits(torch.zeros(2, dtype=F64), "LA", 1e-3, 1e-9) == [(1e-9, 1)]
    assert outside(torch.tensor([5.0, 3.0, -4.0]), [(2.9, 1), (-3.5, -1)]) == 3


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e20, 1e30])
@pytest.mark.parametrize("schedule", ["dcgs2", "cgs2"])
def test_float32_operators_of_any_norm(scale, schedule):
    values = torch.cat([VALUES, BULK])
    one, other = (
        fh.eigsh(diagonal(values, F32, factor), 4, schedule=schedule) for factor in (1.0, scale)
    )
    assert other.converged
    torch.testing.assert_close(other.values / scale, one.values, rtol=1e-5, atol=0)
    torch.testing.assert_close(other.residuals / scale, one.residuals, rtol=0.2, atol=1e-5)
    densities = [fh.density(diagonal(values, F32, f), steps=30) for f in (1.0, scale)]
    torch.testing.assert_close(densities[1].nodes / scale, densities[0].nodes, rtol=1e-3, atol=1e-4)
    s = fh.spectrum(diagonal(values, F32, scale), (2, 2), steps=30)
    assert s.top.values.tolist() == pytest.approx([9 * scale, 7 * scale], rel=1e-3)


def test_residuals_of_inexact_products_are_measured():
    """Bounds on |A v - theta v| within a factor of 2, for every kind of error in products."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))

    class Autocast(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x).float()

    x, y = torch.randn(64, 8), torch.randint(4, (64,))
    loss, d = torch.nn.CrossEntropyLoss(), torch.cat([VALUES, BULK]).float()
    skew = torch.randn(len(d), len(d))
    skew = 2e-3 * (skew - skew.T)
    cases = {
        "bf16": fh.Hessian(model, loss, (x, y), precision="bf16"),
        "difference": fh.Hessian(model, loss, (x, y), engine="difference"),
        "autocast": fh.Hessian(Autocast(), loss, (x, y)),
        "block": fh.Hessian(model, loss, (x, y), precision="bf16").blocks("layer")["2"],
        "skew": fh.SymmetricOperator(lambda v: d * v + skew @ v, len(d), check=False),
        "rounded": fh.SymmetricOperator(lambda v: (d * v).bfloat16().float(), len(d), check=False),
    }
    for name, A in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fh.ConvergenceWarning)
            found = fh.eigsh(A, 3)
        pairs = zip(found.values, found.vectors, strict=True)
        true = torch.stack([(A @ v).double() - t * v.double() for t, v in pairs]).norm(dim=1)
        assert bool((found.residuals >= 0.5 * true).all()), name
        assert found.converged == bool((found.residuals <= 1e-3 * found.values.abs()).all()), name


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("n", [5, 40, 200])
def test_an_operator_that_is_zero(which, n):
    A = fh.SymmetricOperator(torch.zeros_like, n, dtype=torch.float64)
    found = fh.eigsh(A, 2, which)
    assert found.converged and not found.values.any()


def test_a_dead_layer_among_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    data = torch.randn(8, 4), torch.randint(3, (8,))
    blocks = fh.Hessian(model, nn.CrossEntropyLoss(), data).blocks("layer")
    for which in ("LM", "LA", "SA"):
        found = fh.eigsh(blocks, 1, which)
        assert all(pairs.converged for pairs in found.values())
        assert not found["0"].values.any()
