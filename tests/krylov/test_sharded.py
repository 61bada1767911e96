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


def problem():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double()
        return model, nn.CrossEntropyLoss(), torch.randn(24, 7).double(), torch.randint(5, (24,))


def divided():
    """The Hessian with its data divided over the ranks."""
    model, criterion, x, y = problem()
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = (x[rank::size], y[rank::size])
    return fh.Hessian(model, criterion, mine, group=dist.group.WORLD, weight_decay=0.01)


def whole():
    """That of one process."""
    model, criterion, x, y = problem()
    return fh.Hessian(model, criterion, (x, y), weight_decay=0.01)


def pairs_of(options):
    """The eigenvalues of a sharded run, its products, and whether its residuals hold."""
    A = divided()
    a = fh.eigsh(A, 4, sharded=True, gather=True, **options)
    explicit = torch.stack([(A @ v - x * v).norm() for v, x in zip(a.vectors, a.values)])  # noqa: B905
    assert a.vectors.shape == (4, A.n) and a.converged
    return a.values.tolist(), a.matvecs, bool((explicit <= a.residuals + 1e-10).all())


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((2, 4), {}),
        ((2,), {"schedule": "cgs2"}),
        ((4,), {"which": "BE", "tol": 1e-8}),
        ((2,), {"which": "SA", "ncv": 12, "tol": 1e-6}),
        ((2, 4), {"basis": "compressed", "tol": 1e-2}),
        ((4,), {"backend": "reference"}),
    ],
    ids=str,
)
def test_eigenpairs_are_those_of_one_process(two, four, sizes, options):
    rounding = 5e-4 if "basis" in options else 1e-10
    alone = fh.eigsh(whole(), 4, **options)
    assert alone.converged
    for ranks in (two, four):
        if ranks.size not in sizes:
            continue
        found = ranks(pairs_of, options)
        assert len({str(values) for values, *_ in found}) == 1  # the same bits on all ranks
        for values, products, bounded in found:
            distance = (alone.values - torch.tensor(values, dtype=torch.float64)).abs().max()
            assert float(distance) < rounding and bounded
            assert products == alone.matvecs or "basis" in options


def others(A, **sharded):
    """Numbers of the algorithms other than eigsh."""
    found = {}
    for basis in ("full", "none"):
        d = fh.density(A, steps=20, probes=2, basis=basis, **sharded)
        found[f"nodes {basis}"], found[f"weights {basis}"] = d.nodes, d.weights
    s = fh.spectrum(A, 3, steps=20, **sharded)
    found["spectrum"], found["trace"] = s.top.values, torch.tensor(s.trace.value)
    found["deflated"] = torch.tensor(fh.trace(A, deflate=s.top, seed=5).value)
    found["landscape"] = fh.landscape(A, s.top.vectors[:1], points=3).losses[1]
    return found


def others_sharded():
    return others(divided(), sharded=True)


def test_other_algorithms_are_those_of_one_process(two, four):
    alone = others(whole())
    for ranks in (two, four):
        for found in ranks(others_sharded):
            for name, value in alone.items():
                assert float((found[name] - value).abs().max()) < 1e-9, name


def counted(steps, **options):
    """Collectives of each of the last steps of a run, and the bytes of its basis here."""
    calls = collections.Counter()
    originals = {name: getattr(Ranks, name) for name in ("sum_", "rows", "gather_", "scatter_")}

    def counting(name):
        def call(self, *args):
            calls[name] += 1
            return originals[name](self, *args)

        return call

    A = divided()
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
    """Whether runs that stop at these products, most of them in the search, go on to the bits.

    The first state of a run is saved, and that before its last product.
    """
    A = divided()
    options = {"tol": 1e-9, "ncv": 12, "sharded": True}
    whole, equal = fh.eigsh(A, 4, **options), []
    for stop in stops:
        path = f"{folder}/{stop}.fh"
        with pytest.MonkeyPatch.context() as patch:

            def progress(made, total, stop=stop, patch=patch):
                if made == stop - 1:
                    patch.setattr(keeper, "INTERVAL", 0.0)
                    patch.setattr(keeper, "SHARE", 1e9)
                if made == stop:
                    raise known_to_all(InterruptedError("stopped"))

            with pytest.raises(InterruptedError):
                fh.eigsh(A, 4, **options, checkpoint=path, progress=progress)
        counts = []
        found = fh.resume(path, A, progress=lambda made, _, counts=counts: counts.append(made))
        same = torch.equal(found.vectors, whole.vectors) and torch.equal(found.values, whole.values)
        equal.append(same and found.matvecs == whole.matvecs and counts[0] == stop)
    return equal, whole.matvecs


def test_a_run_goes_on_from_its_search_for_missing_eigenvalues(two, tmp_path):
    ((_, products), _) = two(resumed_everywhere, str(tmp_path / "none"), ())
    stops = tuple(range(products - 9, products, 2))
    for equal, _ in two(resumed_everywhere, str(tmp_path), stops):
        assert equal == [True] * len(stops)
