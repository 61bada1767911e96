"""Runs whose vectors are split over ranks: the numbers of one process, three collectives a step."""

import collections

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fasthessian as fh
from fasthessian.checkpoints import keeper
from fasthessian.distributed.failures import known_to_all
from fasthessian.distributed.ranks import Ranks
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.sharding import sharded_operator

pytestmark = pytest.mark.distributed


def pair(dtype=torch.float64):
    """The Hessian with its data divided over the ranks, and that of one process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).to(dtype)
    x, y = torch.randn(24, 7, dtype=dtype), torch.randint(5, (24,))
    rank, size = dist.get_rank(), dist.get_world_size()
    criterion = nn.CrossEntropyLoss()
    mine = (x[rank::size], y[rank::size])
    A = fh.Hessian(model, criterion, mine, group=dist.group.WORLD, weight_decay=0.01)
    return A, fh.Hessian(model, criterion, (x, y), weight_decay=0.01)


def pairs_of(options):
    """How far a sharded run of eigsh is from one process; whether residuals hold."""
    A, whole = pair()
    a = fh.eigsh(A, 4, sharded=True, gather=True, **options)
    b = fh.eigsh(whole, 4, **options)
    explicit = torch.stack([(A @ v - x * v).norm() for v, x in zip(a.vectors, a.values)])  # noqa: B905
    assert a.vectors.shape == (4, A.n) and a.converged and b.converged
    return (
        float((a.values - b.values).abs().max()),
        a.matvecs - b.matvecs,
        bool((explicit <= a.residuals + 1e-10).all()),
        a.values.tolist(),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "cgs2"},
        {"which": "BE", "tol": 1e-8},
        {"which": "SA", "ncv": 12, "tol": 1e-6},
        {"basis": "compressed", "tol": 1e-2},
        {"backend": "reference"},
    ],
    ids=str,
)
def test_eigenpairs_are_those_of_one_process(two, four, options):
    rounding = 5e-4 if "basis" in options else 1e-10
    for ranks in (two, four):
        found = ranks(pairs_of, options)
        assert len({str(values) for *_, values in found}) == 1  # the same bits on all ranks
        for distance, products, bounded, _ in found:
            assert distance < rounding and bounded
            assert products == 0 or "basis" in options


def others():
    A, whole = pair()
    found = {}
    for basis in ("full", "none"):
        a = fh.density(A, steps=20, probes=2, basis=basis, sharded=True)
        b = fh.density(whole, steps=20, probes=2, basis=basis)
        found[basis] = float((a.nodes - b.nodes).abs().max() + (a.weights - b.weights).abs().max())
    a, b = fh.spectrum(A, 3, steps=20, sharded=True), fh.spectrum(whole, 3, steps=20)
    found["spectrum"] = float((a.top.values - b.top.values).abs().max())
    found["trace"] = abs(a.trace.value - b.trace.value)
    c = fh.eigsh(A, 3, start=a.top.vectors, sharded=True)
    d = fh.eigsh(whole, 3, start=b.top.vectors)
    found["start"] = float((c.values - d.values).abs().max()) + abs(c.matvecs - d.matvecs)
    deflated = fh.trace(A, deflate=a.top, seed=5).value
    found["deflated"] = abs(deflated - fh.trace(whole, deflate=b.top, seed=5).value)
    x = fh.landscape(A, a.top.vectors[:1], points=3).losses
    found["landscape"] = float((x - fh.landscape(whole, b.top.vectors[:1], points=3).losses)[1])
    return found


def test_other_algorithms_are_those_of_one_process(two, four):
    for ranks in (two, four):
        for found in ranks(others):
            assert max(found.values()) < 1e-9, found


def counted(steps, **options):
    """Collectives of each of the last steps of a run, and the bytes of its basis here."""
    calls = collections.Counter()
    originals = {name: getattr(Ranks, name) for name in ("sum_", "rows", "gather_", "scatter_")}

    def counting(name):
        def call(self, *args):
            calls[name] += 1
            return originals[name](self, *args)

        return call

    A, _ = pair()
    krylov = Lanczos(sharded_operator(A, options.pop("sharded")), steps, seed=0, **options)
    with A._kept.run():
        for _ in range(3):
            krylov.step()
        for name in originals:
            setattr(Ranks, name, counting(name))
        try:
            krylov.step()
        finally:
            for name, original in originals.items():
                setattr(Ranks, name, original)
    stored = krylov.state.basis.stored
    return dict(calls), stored.numel() * stored.element_size()


def test_a_step_has_three_collectives_and_a_part_of_the_basis(two, four):
    whole = two(call_counted, {"sharded": False})
    assert [calls for calls, _ in whole] == [{"sum_": 1}] * 2
    for ranks in (two, four):
        for options in ({}, {"basis": "compressed"}):
            found = ranks(call_counted, {"sharded": True, **options})
            for calls, size in found:
                assert calls == {"gather_": 1, "scatter_": 1, "rows": 1}
                factor = 4 if options else 1
                assert size <= whole[0][1] / ranks.size / factor + 40 * 16 * 8


def call_counted(options):
    return counted(40, **options)


def resumed_everywhere(folder, stops):
    """Whether runs that stop at these products, most of them in the search, go on to the bits."""
    A, _ = pair()
    options = {"tol": 1e-9, "ncv": 12, "sharded": True}
    whole, equal = fh.eigsh(A, 4, **options), []
    for stop in stops:

        def stopped(made, total, stop=stop):
            if made == stop:
                raise known_to_all(InterruptedError("stopped"))

        path = f"{folder}/{stop}.fh"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(keeper, "INTERVAL", 0.0)
            patch.setattr(keeper, "SHARE", 1e9)
            with pytest.raises(InterruptedError):
                fh.eigsh(A, 4, **options, checkpoint=path, progress=stopped)
            found = fh.resume(path, A)
        same = torch.equal(found.vectors, whole.vectors) and torch.equal(found.values, whole.values)
        equal.append(same and found.matvecs == whole.matvecs)
    return equal, whole.matvecs


def test_a_run_goes_on_from_its_search_for_missing_eigenvalues(two, tmp_path):
    ((_, products), _) = two(resumed_everywhere, str(tmp_path / "none"), ())
    stops = tuple(range(products - 9, products, 2))
    for equal, _ in two(resumed_everywhere, str(tmp_path), stops):
        assert equal == [True] * len(stops)
