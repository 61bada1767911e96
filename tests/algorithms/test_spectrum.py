"""spectrum, deflated traces and their records against what their documentation promises."""

import dataclasses
import gc
import itertools
import json
import math

import numpy as np
import pytest
import torch

import fasthessian as fh
from fasthessian.krylov.quadrature import Measured
from fasthessian.krylov.smoothing import smoothed
from tests.support.models import PROBLEMS, columns, refused
from tests.support.spectra import diagonal, outliers
from tests.support.untouched import restless, world

# runs are cut short on purpose; test_each_shortfall_is_one_warning checks the warnings
pytestmark = pytest.mark.filterwarnings("ignore::fasthessian.ConvergenceWarning")
F32, F64 = torch.float32, torch.float64
EDGES = {
    "one": [3.0], "two": [1.0, -4.0], "zero": [0.0] * 20, "identity": [1.0] * 20,
    "rank one": [5.0] + [0.0] * 30, "three values": [2.0] * 30 + [5.0] * 10 + [-1.0] * 5,
    "degenerate top": [7.0] * 6 + torch.linspace(-3, 3, 30).tolist(),
    "both signs": list(range(-10, 31)),
}  # fmt: skip
LAYERS = {"a": range(1, 41), "b": range(1, 5), "c": range(-20, 10)}


def rotated(values, dtype=F64, scale=1.0):
    """The matrix of these eigenvalues in a random basis, and its operator."""
    values = torch.as_tensor(values, dtype=F64)
    generator = torch.Generator().manual_seed(3)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=F64, generator=generator))
    M = ((Q * values * scale) @ Q.T).to(dtype)
    return M, fh.SymmetricOperator(lambda v: M @ v, len(values), dtype=dtype)


def differences(a, b):
    """Names of the fields in which two records differ, those within included."""
    out = []
    for name, x in vars(a).items():
        y = getattr(b, name)
        if dataclasses.is_dataclass(x):
            out += [f"{name}.{inner}" for inner in differences(x, y)]
        elif type(x) is not type(y) or not np.array_equal(x, y):
            out.append(name)
    return out


def check_ends(s, M, k):
    """Values and residuals of both ends against the dense matrix, to the rounding of its dtype."""
    true = torch.linalg.eigvalsh(M.double())
    floor = 64 * torch.finfo(s.top.vectors.dtype).eps * float(true.abs().max())
    for pairs, want in ((s.top, true.flip(0)[: k[0]]), (s.bottom, true[: k[1]])):
        assert pairs.values.shape == want.shape and pairs.values.dtype is F64
        V = pairs.vectors.double()
        actual = (V @ M.double() - pairs.values[:, None] * V).norm(dim=1)
        assert bool(((pairs.values - want).abs() <= pairs.residuals + floor).all())
        assert bool((actual <= pairs.residuals + floor).all())
    assert s.top.matvecs == s.bottom.matvecs


@pytest.mark.parametrize("options", [{}, {"basis": "compressed"}, {"steps": 12, "probes": 2}])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=lambda p: p.name)
def test_both_ends_and_trace_of_small_problems(problem, dtype, options):
    H, M = problem.operator(*problem.make(dtype)), problem.dense(*problem.make())
    s = fh.spectrum(H, 3, max_matvecs=400, **options)
    check_ends(s, M, (3, 3))
    assert s.top.converged and s.bottom.converged and s.matvecs == H.matvecs <= 400
    low, high = s.trace.interval
    assert low - 1e-6 * float(M.norm()) <= float(M.trace()) <= high + 1e-6 * float(M.norm())


@pytest.mark.parametrize("k", ["default", "one", "over half", "all", "no bottom", "no top"])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", EDGES)
def test_edges_of_the_spectrum(name, dtype, k):
    (M, A), n = rotated(EDGES[name], dtype), len(EDGES[name])
    asked = {"default": None, "one": 1, "over half": min(n // 2 + 1, n), "all": n,
             "no bottom": (min(3, n), 0), "no top": (0, min(3, n))}[k]  # fmt: skip
    s = fh.spectrum(A, asked, steps=n + 5, rtol=0.5)
    check_ends(s, M, asked if isinstance(asked, tuple) else (asked or min(5, n),) * 2)
    for pairs in (s.top, s.bottom):
        gram = pairs.vectors.double() @ pairs.vectors.double().T
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=F64), rtol=0, atol=1e-5)
    if k == "all":
        assert s.trace.value == pytest.approx(float(M.double().trace()), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"steps": 3}, {"steps": 70, "probes": 3}, {"sigma": 0.7, "steps": 25},
                {"basis": "compressed", "steps": 30}, {"backend": "reference", "seed": 4}]
)  # fmt: skip
@pytest.mark.parametrize("name", ["three values", "both signs", "one"])
def test_density_is_that_of_density_to_the_bit(name, options):
    _, A = rotated(EDGES[name], F32)
    s = fh.spectrum(A, 1, max_matvecs=400, **options)
    assert differences(s.density, fh.density(A, **options)) == []


@pytest.mark.parametrize(
    ("name", "k", "steps", "extra"),
    [("identity", (3, 0), 5, {}), ("three values", 2, 6, {}), ("both signs", 5, 10, {}),
     ("both signs", 5, 10, {"probes": 2}), ("degenerate top", (2, 0), 20, {}),
     ("three values", 4, 8, {"basis": "compressed"})],
)  # fmt: skip
@pytest.mark.slow
def test_the_trace_is_unbiased_and_its_interval_covers(name, k, steps, extra):
    """With an rtol that is out of reach the number of samples is fixed: theory holds exactly."""
    M, A = rotated(EDGES[name])
    least = steps * extra.get("probes", 1) + 16 + (8 if "basis" in extra else 0)
    options = {"steps": steps, "max_matvecs": least + 30, "rtol": 1e-12, **extra}
    found = [fh.spectrum(A, k, seed=seed, **options).trace for seed in range(150)]
    values, true = np.array([t.value for t in found]), float(M.trace())
    hits = sum(t.interval[0] <= true <= t.interval[1] for t in found)
    assert hits >= 150 * (0.95 - 3.5 * math.sqrt(0.95 * 0.05 / 150))
    assert abs(values.mean() - true) <= 3.5 * values.std() / math.sqrt(150)


def test_operators_of_a_dictionary_advance_together_with_the_same_results():
    layers, calls = {name: diagonal(values) for name, values in LAYERS.items()}, []
    found = fh.spectrum(layers, 3, steps=20, rtol=0.3, progress=lambda *c: calls.append(c))
    assert calls[-1] == (sum(s.matvecs for s in found.values()), None)
    pairs = fh.eigsh(layers, 3)
    traces = fh.trace(layers, deflate=dict(reversed(pairs.items())), rtol=0.2)
    assert list(found) == list(traces) == list(LAYERS)
    for name, A in layers.items():
        assert differences(found[name], fh.spectrum(A, 3, steps=20, rtol=0.3)) == []
        assert differences(traces[name], fh.trace(A, deflate=pairs[name], rtol=0.2)) == []
    blocks = PROBLEMS["mlp"].operator(*PROBLEMS["mlp"].make()).blocks("layer")
    for name, s in fh.spectrum(blocks, 2, max_matvecs=300).items():
        check_ends(s, columns(blocks[name]), (2, 2))


@pytest.mark.parametrize("basis", ["full", "compressed"])
@pytest.mark.parametrize("probes", [1, 3])
def test_progress_is_monotone_and_counts_every_product(basis, probes):
    _, A = rotated(range(100))
    calls = []
    s = fh.spectrum(A, 2, steps=10, probes=probes, basis=basis, progress=lambda *c: calls.append(c))
    assert all(a[0] < b[0] and b[1] is None for a, b in itertools.pairwise(calls))
    assert calls[0] == (1, None) and calls[-1][0] == s.matvecs == A.matvecs
    assert s.matvecs == s.top.matvecs + (probes - 1) * 10 + s.trace.matvecs


@pytest.mark.parametrize(("basis", "pairs"), [("full", 0), ("compressed", 6)])
@pytest.mark.parametrize("probes", [1, 2])
def test_the_least_budget_serves_and_one_less_does_not(basis, pairs, probes):
    _, A = rotated(range(100))
    least, options = 10 * probes + 16 + pairs, {"steps": 10, "probes": probes, "basis": basis}
    s = fh.spectrum(A, 3, max_matvecs=least, **options)
    assert s.matvecs == A.matvecs == least and len(s.trace.samples) == 16
    words = f"max_matvecs must be at least {least}, got {least - 1}"
    refused(lambda: fh.spectrum(A, 3, max_matvecs=least - 1, **options), ValueError, words)
    assert A.matvecs == least


@pytest.mark.parametrize("k", [12, (25, 0), 13, 40])
def test_a_tight_budget_for_more_pairs_than_steps_is_an_answer_or_one_line(k):
    try:
        s = fh.spectrum(rotated(range(100))[1], k, steps=10, max_matvecs=26)
        assert s.matvecs <= 26 and len(s.trace.samples) >= 2
    except ValueError as error:
        assert "max_matvecs must be at least" in str(error)


def test_by_default_the_trace_may_take_as_many_products_as_by_itself():
    A = fh.SymmetricOperator(lambda v: v.flip(0), 1100, dtype=F64)  # exact by 1100, trace 0
    assert len(fh.spectrum(A, 2).trace.samples) == 1000


def test_each_shortfall_is_one_warning():
    _, A = rotated([1.0, -1.0] * 60 + list(range(2, 42)))  # 160 products would give the trace
    for options, words in (
        ({"rtol": 1e-9, "max_matvecs": 150}, ["interval"]),
        ({"tol": 1e-12, "rtol": 0.9, "steps": 20, "max_matvecs": 40}, ["eigenpairs converged"]),
        ({"rtol": 1e-9, "steps": 20, "max_matvecs": 36}, ["eigenpairs converged", "interval"]),
    ):
        with pytest.warns(fh.ConvergenceWarning) as caught:
            fh.spectrum(A, 4, **options)
        assert len(caught) == len(words), [str(w.message) for w in caught]
        assert all(w in str(c.message) for w, c in zip(words, caught, strict=True))
        assert {c.filename for c in caught} == {__file__}
        if "eigenpairs converged" in words:
            assert "raise max_matvecs or steps" in str(caught[0].message)


def test_a_run_whose_pairs_have_converged_makes_no_further_step():
    """61 rows, of which `eigsh` would judge every third, and a short search for missing pairs."""
    s = fh.spectrum(diagonal(outliers(2000)), (3, 1), steps=61)
    assert s.top.converged and s.bottom.converged and s.density.matvecs == 61
    assert 61 < s.top.matvecs <= 61 + 6


def test_runs_that_differ_say_so():
    runs = [Measured(torch.eye(2, dtype=F64), 0.0, words) for words in ("captured", "eager: x")]
    assert smoothed([*runs, runs[0]], 9, 2, None, 6)[0].graph == "captured; eager: x"


@pytest.mark.parametrize("options", [{}, {"basis": "compressed"}, {"backend": "reference"}])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_same_seed_same_bits_other_seed_other_numbers(dtype, options):
    _, A = rotated(EDGES["both signs"], dtype)
    a, b, c = (fh.spectrum(A, 3, steps=20, rtol=0.5, seed=seed, **options) for seed in (1, 1, 2))
    assert differences(a, b) == []
    assert {"top.vectors", "bottom.vectors", "density.nodes"} <= set(differences(a, c))


@pytest.mark.parametrize("basis", ["full", "compressed"])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scale_equivariant(dtype, basis, scale):
    values = [*torch.linspace(-0.1, 0.1, 150).tolist(), 20.0, 10.0, 5.0, -3.0]
    numbers = []
    for factor in (1.0, scale):
        s = fh.spectrum(rotated(values, dtype, factor)[1], (3, 1), steps=40, basis=basis)
        ends = torch.cat([s.top.values, s.bottom.values]).tolist()
        numbers.append([x / factor for x in (*ends, s.trace.value, s.density.sigma)])
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-9 if dtype is F64 else 1e-5)


def test_the_basis_is_freed_before_the_trace():
    n, last, sizes = (
        4099,
        [0],
        {1: [], 8: []},
    )  # per number of products at once: a step, or 8 samples

    def largest(done, _):
        if done == 30 or done - last[0] == 8:
            tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
            held = (t.untyped_storage().nbytes() for t in tensors if t.shape[1:] == (n,))
            sizes[done - last[0]].append(max(held) / (4 * n))
        last[0] = done

    A = diagonal(torch.cat([torch.linspace(0, 0.1, n - 4), torch.tensor([9.0, 7, 5, -3])]), F32)
    fh.spectrum(A, (3, 1), steps=60, max_matvecs=120, progress=largest)
    assert min(sizes[1]) >= 60 and max(sizes[8]) < 20


def test_the_model_its_gradients_and_random_states_are_unchanged():
    model, criterion, *batch = restless()
    before = world(model, criterion)
    fh.spectrum(fh.Hessian(model, criterion, tuple(batch)), 2, max_matvecs=200)
    assert world(model, criterion) == before


def failing(calls):
    """An operator whose products are NaN after the first ``calls``."""
    made = itertools.count()
    return fh.SymmetricOperator(lambda v: v * (2.0 if next(made) < calls else math.nan), 40)


SKEW = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
SKEWED, HIDDEN = (fh.SymmetricOperator(SKEW.mv, 40, check=check) for check in (True, False))
A30, PAIRS = diagonal(range(1, 31)), fh.eigsh(diagonal(range(1, 31)), 2)
VALUES = {
    "k": (0, -1, 31, (31, 0), (0, 31), (-1, 2), (0, 0), (1,), (1, 2, 3)),
    "tol": (0, -1.0, math.nan), "steps": (0, -1), "probes": (0,), "sigma": (0, -1.0, math.inf),
    "rtol": (0, 1, math.nan), "confidence": (0, 1, 2.0), "max_matvecs": (0, 45),
    "seed": (-1, 2**64), "backend": ("blas",), "basis": ("none", "half"),
}  # fmt: skip
TYPES = {
    "k": (2.0, "3", True, (1, None), (1.5, 2)), "tol": ("a",), "steps": (2.5, None),
    "probes": (1.5,), "max_matvecs": (99.5,), "seed": (None,), "rtol": ("a",),
}  # fmt: skip
BAD = [
    *[(failing(calls), {}, ValueError, "NaN or Inf") for calls in (0, 2, 4, 8)],
    (SKEWED, {}, ValueError, "not symmetric"), (HIDDEN, {}, ValueError, "A is not symmetric"),
    (torch.eye(3), {}, TypeError, "A must be an operator"),
    ({}, {"k": 5}, ValueError, "A is an empty dictionary"),
    (A30, {"basis": "offload"}, ValueError, "use 'full' or 'compressed'"),
    *[(A30, {name: value}, kind, f"{name} must")
      for kind, table in ((ValueError, VALUES), (TypeError, TYPES))
      for name, values in table.items() for value in values],
    *[(A, {"deflate": pairs}, kind, "deflate must") for A, pairs, kind in (
        (A30, PAIRS.vectors, TypeError), (A30, {"a": PAIRS}, TypeError),
        (A30, dataclasses.replace(PAIRS, vectors=PAIRS.vectors * math.nan), ValueError),
        (A30, dataclasses.replace(PAIRS, vectors=PAIRS.vectors * 1.05), ValueError),
        (A30, dataclasses.replace(PAIRS, vectors=[1]), TypeError),
        (A30, dataclasses.replace(PAIRS, values=PAIRS.values.tolist()), TypeError),
        (A30, dataclasses.replace(PAIRS, values=PAIRS.values[:, None]), TypeError),
        (A30, dataclasses.replace(PAIRS, values=PAIRS.values * math.nan), ValueError),
        (diagonal([1, 2]), PAIRS, ValueError), (diagonal([1] * 30, F32), PAIRS, ValueError),
        ({"a": A30}, PAIRS, ValueError), ({"a": A30}, {"b": PAIRS}, ValueError))],
]  # fmt: skip


@pytest.mark.parametrize(("A", "options", "kind", "words"), BAD)
def test_bad_arguments_are_refused_in_one_line(A, options, kind, words):
    function = fh.trace if "deflate" in options else fh.spectrum
    refused(lambda: function(A, **options), kind, words)


@pytest.mark.parametrize("k", [2, (3, 0), (0, 2), 30])
def test_spectra_are_saved_loaded_and_drawn(tmp_path, k):
    pytest.importorskip("matplotlib")
    s, path = fh.spectrum(A30, k), tmp_path / "s.npz"
    s.save(path)
    assert differences(s, fh.Spectrum.load(path)) == []
    refused(lambda: s.save(path), FileExistsError, "pass overwrite=True")
    for kind in (fh.Eigenpairs, fh.Estimate, fh.Density):
        refused(lambda kind=kind: kind.load(path), ValueError, r"use Spectrum\.load")
    dataclasses.replace(s, trace=s.density).save(tmp_path / "mixed")
    refused(lambda: fh.Spectrum.load(tmp_path / "mixed"), ValueError, "trace is a Density, not a")
    s.top.save(tmp_path / "top")
    refused(lambda: fh.Spectrum.load(tmp_path / "top"), ValueError, r"use Eigenpairs\.load")
    axes = s.plot()
    axes.figure.canvas.draw()


def test_steps_say_how_they_ran_and_files_without_that_load(tmp_path):
    s, path = fh.spectrum(A30, 2, graph=False), tmp_path / "s.npz"
    assert s.top.graph == s.bottom.graph == s.density.graph == "eager: graph=False"
    for record in (s.top, s.density, s):
        record.save(path, overwrite=True)
        with np.load(path) as archive:
            arrays = dict(archive)
        header = json.loads(str(arrays["__record__"]))
        inner = [h["scalars"] for h in header["scalars"].values() if isinstance(h, dict)]
        for scalars in (header["scalars"], *inner):
            scalars.pop("graph", None)
        np.savez(path, **{**arrays, "__record__": np.array(json.dumps(header))})
        back = type(record).load(path)
        assert {name.split(".")[-1] for name in differences(record, back)} == {"graph"}
