"""softmax_curvature_ in every backend: (diag(p) - p p^T) u by rows, against wider arithmetic.

The tolerance is an error budget: twice the error of the same expression in torch, in the same
dtype.
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.backends import ROWS
from tests.support.kernel_cases import each_backend, marked

F32, F64 = torch.float32, torch.float64
INF, NAN = float("inf"), float("nan")
SHAPES = [  # outer, classes, inner, and by how many numbers U and Z are shifted
    (0, 5, 3, 0, 0), (3, 0, 2, 0, 0), (2, 4, 0, 0, 0), (1, 1, 1, 0, 0), (5, 1, 7, 1, 0),
    (9, 2, 1, 0, 0), (70, 10, 1, 0, 0), (3, 13, 1, 1, 1), (5, 64, 1, 0, 1), (2, 104, 2, 3, 1),
    (3, 101, 7, 0, 0), (2, 17, 37, 0, 3), (1, 5, 131, 2, 0), (2, 2056, 1, 0, 0), (1, 4099, 1, 1, 2),
    (1, 1031, 3, 0, 0),
]  # fmt: skip
LARGE = [(3, 50257, 1, 0, 0), (2, 3001, 70, 1, 1), (40, 21, 400, 0, 0)]
dtypes = pytest.mark.parametrize("dtype", [F32, F64])
inners = pytest.mark.parametrize("inner", [1, 7])
wider = pytest.mark.skipif(
    np.finfo(np.longdouble).eps > 1e-18, reason="no arithmetic wider than float64 here"
)


def placed(values, dtype, pad, device):
    """A contiguous copy that starts ``pad`` numbers after the start of its memory."""
    buffer = torch.full((values.numel() + pad,), NAN, dtype=dtype, device=device)
    return buffer[pad:].view(values.shape).copy_(values)


def problem(shape, dtype, device="cpu", pads=(0, 0), spread=3.0, seed=1):
    """U, Z and scale."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.randn(shape, generator=generator, dtype=F64) + 0.5
    Z = spread * torch.randn(shape, generator=generator, dtype=F64)
    scale = torch.randn(shape[0], shape[2], generator=generator, dtype=F64)
    return placed(U, dtype, pads[0], device), placed(Z, dtype, pads[1], device), scale.to(device)


def in_torch(U, Z, scale):
    """The usual expression in torch, in the dtype of U."""
    p = torch.softmax(Z, 1)
    return scale[:, None].to(U.dtype) * (p * U - p * (p * U).sum(1, keepdim=True))


def exact(U, Z, scale):
    """The product, and the magnitudes that its rounding is relative to, in NumPy's widest float."""
    u, z, s = (x.cpu().numpy().astype(np.longdouble) for x in (U, Z, scale.unsqueeze(1)))
    if z.size == 0:
        return z, z
    e = np.exp(z - z.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    mean = (p * u).sum(1, keepdims=True)
    return s * p * (u - mean), np.abs(s) * p * (np.abs(u) + np.abs(p * u).sum(1, keepdims=True))


def assert_within_budget(found, U, Z, scale):
    """Compare ``found`` with twice the error of torch, by the norm of each row and of all rows."""
    want, magnitude = exact(U, Z, scale)
    wide = [x.cpu().numpy().astype(np.longdouble) - want for x in (found, in_torch(U, Z, scale))]
    eps = torch.finfo(U.dtype).eps
    sums = torch.finfo(F64).eps * U.shape[1] ** 0.5
    # in a single row, torch may be exact by chance
    for axis, tiny in ((1, 4 * eps + sums), (None, eps + sums)):
        ours, torchs, reach = (np.sqrt((x**2).sum(axis)) for x in (*wide, magnitude))
        worst = (ours / (2 * torchs + tiny * reach + 1e-300)).max() if ours.size else 0
        assert worst <= 1, f"{worst:.2f} of the budget"


@each_backend
@dtypes
@wider
@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_within_twice_the_error_of_torch(row, dtype, shape):
    if row.slow and shape in LARGE:
        pytest.skip("too large to be simulated")
    U, Z, scale = problem(shape[:3], dtype, row.device, shape[3:])
    before, given = Z.clone(), scale.clone()
    found = U.clone() if not shape[3] else placed(U, dtype, shape[3], row.device)
    assert row.module().softmax_curvature_(found, Z, scale) is found
    assert torch.equal(Z, before) and torch.equal(scale, given)
    assert_within_budget(found, U, Z, scale)
    if shape[1] == 1:
        assert not found.any()


def ramp(shape):
    """Logits whose running maximum rises with every class, far beyond the range of exp."""
    return torch.linspace(-400, 400, shape[1], dtype=F64)[:, None].expand(shape).contiguous()


def extremes(shape):
    """About -80 and 80, then about -1e4 and 1e4."""
    sign = 1 - 2.0 * (torch.arange(shape[1]) % 3 == 0)
    size = torch.where(torch.arange(shape[0]) % 2 == 0, 80.0, 1e4)[:, None, None]
    jitter = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    return sign[:, None] * size * (1 + 1e-3 * jitter)


def masked(shape):
    """-inf in the first 5/8 of the classes and in every third of the others."""
    Z = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    Z[:, : 5 * shape[1] // 8], Z[:, ::3] = -INF, -INF
    return Z


@each_backend
@dtypes
@inners
@wider
@pytest.mark.parametrize("make", [ramp, extremes, masked])
@pytest.mark.parametrize("classes", [16, 4999])
def test_logits_of_any_size(row, dtype, inner, make, classes):
    U, _, scale = problem((2, classes, inner), dtype, row.device)
    Z = make(U.shape).to(U)
    found = row.module().softmax_curvature_(U.clone(), Z, scale)
    assert torch.isfinite(found).all()
    assert_within_budget(found, U, Z, scale)
    assert not found[Z == -INF].any()


@each_backend
@inners
def test_equals_the_second_derivative_of_cross_entropy(row, inner):
    """By double backward in float64, with class weights and ignored targets."""
    U, Z, _ = problem((6, 5, inner), F64)
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(5, (6, inner), generator=generator)
    target[1], target[4, 0] = -100, -100
    weight = torch.rand(5, generator=generator, dtype=F64) + 0.5
    logits = Z.clone().requires_grad_()
    loss = cross_entropy(logits, target, weight)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    (want,) = torch.autograd.grad(gradient, logits, U)
    valid = target != -100
    weights = torch.where(valid, weight[target.clamp(min=0)], 0.0)
    scale = (weights / weights.sum()).to(row.device)
    Z[1], U[1] = NAN, INF  # rows of ignored targets are not used
    found = row.module().softmax_curvature_(U.to(row.device), Z.to(row.device), scale).cpu()
    torch.testing.assert_close(found, want, rtol=1e-13, atol=1e-16)
    assert not found[1].any() and not torch.signbit(found[1]).any()


@each_backend
@dtypes
@inners
@pytest.mark.parametrize("classes", [3, 2100])
@pytest.mark.parametrize(
    ("which", "value", "all_nan"),
    [("Z", NAN, True), ("Z", INF, True), ("all of Z", -INF, True), ("all of Z", NAN, True),
     ("U", NAN, True), ("U", INF, False), ("masked U", NAN, True), ("scale", NAN, True)],
)  # fmt: skip
def test_nan_and_infinity_stay_in_their_row(row, dtype, inner, classes, which, value, all_nan):
    U, Z, scale = problem((3, classes, inner), dtype, row.device)
    last = classes - 1
    clean = row.module().softmax_curvature_(U.clone(), Z, scale)
    if which == "masked U":
        Z[1, last, 0] = -INF
    if which == "all of Z":
        Z[1, :, 0] = value
    elif which == "scale":
        scale[1, 0] = value
    else:
        (Z if which == "Z" else U)[1, last, 0] = value
    found = row.module().softmax_curvature_(U, Z, scale)
    bad = found[1, :, 0].clone()
    assert torch.isnan(bad).all() if all_nan else not torch.isfinite(bad).any()
    found[1, :, 0] = clean[1, :, 0]
    assert torch.equal(found, clean)


@each_backend
@dtypes
@inners
def test_rows_of_scale_zero_are_zero_and_not_used(row, dtype, inner):
    U, Z, scale = problem((4, 300, inner), dtype, row.device)
    want = row.module().softmax_curvature_(U.clone(), Z, scale)
    for signed_zero, cell in ((0.0, (0, 0)), (-0.0, (2, inner - 1)), (0.0, (3, inner // 2))):
        scale[cell], want[cell[0], :, cell[1]] = signed_zero, 0.0
        Z[cell[0], 7:, cell[1]], U[cell[0], :290, cell[1]] = NAN, INF
    found = row.module().softmax_curvature_(U, Z, scale)
    assert torch.equal(found, want)
    assert not torch.signbit(found[0, :, 0]).any()


@each_backend
@dtypes
@inners
def test_the_matrix_is_symmetric_semidefinite_with_zero_row_sums(row, dtype, inner):
    """Unit vector j gives column j. Each index of ``inner`` has its own logits."""
    classes, eps = 23, torch.finfo(dtype).eps
    _, Z, _ = problem((1, classes, inner), dtype, row.device)
    unit = torch.eye(classes, dtype=dtype, device=row.device)[:, :, None]
    scale = torch.full((classes, inner), 2.0, dtype=F64, device=row.device)
    logits = Z.expand(classes, -1, -1).contiguous()
    found = row.module().softmax_curvature_(unit.repeat(1, 1, inner), logits, scale)
    for M in found.double().cpu().unbind(2):
        assert float((M - M.T).abs().max()) <= 4 * eps
        assert float(M.sum(0).abs().max()) <= 4 * eps
        assert float(torch.linalg.eigvalsh((M + M.T) / 2).min()) >= -4 * eps
    p = torch.softmax(Z[0].double(), 0)
    torch.testing.assert_close(
        found.double().diagonal().T, 2 * p * (1 - p), rtol=8 * eps, atol=4 * eps
    )


@each_backend
@inners
def test_constant_tangents_give_zero(row, inner):
    """Constant tangents are the null space, because shifted logits have the same softmax."""
    U, Z, scale = problem((3, 700, inner), F32, row.device)
    found = row.module().softmax_curvature_(torch.full_like(U, 1e3), Z, scale)
    assert float(found.abs().max()) <= 1e3 * 4 * torch.finfo(F32).eps * float(scale.abs().max())


class Largest(TorchDispatchMode):
    """The bytes of the largest result of torch's operations, except views of ``given``."""

    def __init__(self, given):
        super().__init__()
        self.given, self.bytes = {t.untyped_storage().data_ptr() for t in given}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        memory = result.untyped_storage()
        if memory.data_ptr() not in self.given:
            self.bytes = max(self.bytes, memory.nbytes())
        return result


@pytest.mark.parametrize("row", list(marked(row for row in ROWS if not row.slow)), ids=str)
@pytest.mark.parametrize("shape", [(600, 2000, 1), (1, 2000, 600), (2, 200_000, 1)])
def test_no_temporary_has_the_size_of_the_logits(row, shape):
    """At most 1 MiB, or one row of a large vocabulary in float64."""
    given = problem(shape, F32, row.device)
    with Largest(given) as largest:
        row.module().softmax_curvature_(*given)
    assert largest.bytes <= max(1 << 20, 8 * shape[1])


@each_backend
@inners
def test_two_calls_have_the_same_bits(row, inner):
    backend, runs = row.module(), []
    for seed in (1, 2):
        if hasattr(backend, "seed"):
            backend.seed(seed)  # a different order of the simulated threads
        U, Z, scale = problem((3, 1500, inner), F32, row.device)
        runs.append(backend.softmax_curvature_(U, Z, scale))
    assert torch.equal(*runs)


@pytest.mark.parametrize("row", [row for row in ROWS if str(row) == "native"], ids=str)
@dtypes
@pytest.mark.parametrize("shape", [(7, 20011, 1), (3, 501, 211)])
def test_same_bits_for_any_number_of_threads(row, dtype, shape):
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(row.module().softmax_curvature_(*problem(shape, dtype)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def ones(*shape, dtype=F32):
    return torch.ones(shape, dtype=dtype)


BAD = [
    ((ones(2, 5), ones(2, 5), ones(2, 1, dtype=F64)), r"matrix of rows as \(rows, classes, 1\)"),
    ((ones(2, 5, 1).half(), ones(2, 5, 1), ones(2, 1, dtype=F64)), "U must be a float32 or"),
    (
        (ones(2, 5, 1), ones(2, 5, 1, dtype=F64), ones(2, 1, dtype=F64)),
        "Z must have .* of torch.float32 on cpu",
    ),
    ((ones(2, 5, 1), ones(2, 4, 1), ones(2, 1, dtype=F64)), r"Z must have shape \(2, 5, 1\)"),
    ((ones(2, 5, 1), ones(2, 5, 1), ones(2, 1)), "scale must have .*float64 on cpu"),
    ((ones(2, 5, 3), ones(2, 5, 3), ones(2, 5, dtype=F64)), r"scale must have shape \(2, 3\)"),
    ((ones(2, 5, 3), ones(2, 5, 3), ones(2, 3, dtype=F64).to("meta")), "got .* on meta"),
    ((ones(3, 5, 2).transpose(0, 2), ones(2, 5, 3), ones(2, 3, dtype=F64)), "U must be contig"),
    ((ones(2, 5, 3), ones(2, 3, 5).transpose(1, 2), ones(2, 3, dtype=F64)), r"Z.contiguous\(\)"),
    ((ones(2, 5, 3), ones(2, 5, 3), ones(3, 2, dtype=F64).T), r"scale.contiguous\(\)"),
]


@each_backend
@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_arguments_are_refused_in_one_line(row, given, message):
    with pytest.raises(ValueError, match=message) as caught:
        row.module().softmax_curvature_(*given)
    assert "\n" not in str(caught.value)
