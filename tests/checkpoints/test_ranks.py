"""Calls of several ranks: they stop together, and any number of ranks goes on."""

import shutil
import signal

import pytest
import torch
import torch.distributed as dist

import fasthessian as fh
from tests.support.bits import digest
from tests.support.checkpoints import caught, classifier

pytestmark = pytest.mark.distributed


def divided(A=fh.Hessian):
    """The operator on this rank's share of the data."""
    model, criterion, (x, y) = classifier()
    rank, size = dist.get_rank(), dist.get_world_size()
    share = slice(0, 8) if rank == 0 else slice(8 + 6 * (rank - 1), 8 + 6 * rank)
    share = slice(share.start, len(x)) if rank == size - 1 else share
    return A(model, criterion, (x[share], y[share]), group=dist.group.WORLD)


def call(A, kind, **options):
    if kind == "density":
        return fh.density(A, steps=12, **options)
    if kind == "trace":
        pairs = fh.eigsh(A, 2, sharded=True)
        return fh.trace(A, rtol=0.1, method="hutchinson", max_matvecs=48, deflate=pairs, **options)
    return fh.eigsh(A, 3, **options)


def uninterrupted(kind, options):
    return digest(caught(lambda: call(divided(), kind, **options))[0])


def stopped(path, kind, options):
    """The message with which the call stops after a signal on rank 1."""

    def progress(made, total):
        if made >= 7 and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGUSR1)

    try:
        call(divided(), kind, checkpoint=path, progress=progress, **options)
    except fh.Stopped as stop:
        return str(stop)


def resumed(path):
    return digest(caught(lambda: fh.resume(path, divided()))[0])


CASES = {
    "whole vectors": ("eigsh", {"sharded": False}),
    "split vectors": ("eigsh", {"sharded": True}),
    "split vectors, gathered": ("eigsh", {"sharded": True, "gather": True}),
    "split vectors without a basis": ("density", {"sharded": True, "basis": "none"}),
    "split and compressed": ("density", {"sharded": True, "basis": "compressed"}),
    "deflated by split vectors": ("trace", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_signal_on_one_rank_stops_all_and_both_go_on_to_the_same_bits(two, tmp_path, case):
    kind, options = CASES[case]
    path = str(tmp_path / "run.fh")
    first, second = two(stopped, path, kind, options)
    assert first.startswith("stopped by another rank after ")
    assert second.startswith("stopped by SIGUSR1 after ")
    copy = shutil.copytree(path, tmp_path / "copy.fh")
    want = two(uninterrupted, kind, options)
    assert two(resumed, path) == want
    assert two(resumed, path) == want  # the saved record
    alone = fh.Hessian(*classifier())
    found, _ = caught(lambda: fh.resume(copy, alone))
    options = {name: x for name, x in options.items() if name in ("basis",)}
    if kind == "eigsh":
        whole = fh.eigsh(alone, 3, **options)
        torch.testing.assert_close(found.values, whole.values, rtol=1e-4, atol=1e-5)
        assert found.vectors.shape == whole.vectors.shape and found.matvecs == whole.matvecs
        torch.testing.assert_close((found.vectors @ whole.vectors.T).abs(), torch.eye(3),
                                   rtol=0, atol=1e-2)  # fmt: skip
    elif kind == "density":
        whole = fh.density(alone, steps=12, **options)
        moments = [float((d.nodes * d.weights).sum()) for d in (found, whole)]
        assert moments[0] == pytest.approx(moments[1], rel=1e-3)
    else:
        assert len(found.samples) == found.matvecs == 48


def test_one_rank_begins_and_two_go_on(two, tmp_path):
    """Whole rows of one rank are read as slices."""

    def stop(made, total):
        if made == 9:
            signal.raise_signal(signal.SIGTERM)

    path, A = str(tmp_path / "run.fh"), fh.Hessian(*classifier())
    with pytest.raises(fh.Stopped):
        fh.eigsh(A, 3, checkpoint=path, progress=stop)
    found, again = two(resumed_values, path, True)
    torch.testing.assert_close(found, fh.eigsh(A, 3).values, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, again)


def resumed_values(path, split):
    import fasthessian.krylov.sharding as sharding

    pays, sharding.PAYS = sharding.PAYS, 1 if split else sharding.PAYS
    try:
        return fh.resume(path, divided()).values
    finally:
        sharding.PAYS = pays


def of_another_share(path):
    """The error where rank 1 has other parameters or data than the checkpoint."""
    model, criterion, (x, y) = classifier()
    share = slice(0, 8) if dist.get_rank() == 0 else slice(8, 19)
    A = fh.Hessian(model, criterion, (x[share], y[share]), group=dist.group.WORLD)
    try:
        fh.resume(path, A)
    except fh.InputError as error:
        return str(error)


def test_other_data_on_one_rank_are_refused_on_all(two, tmp_path):
    path = str(tmp_path / "run.fh")
    two(stopped, path, "eigsh", {})
    for message in two(of_another_share, path):
        assert "the data or the criterion differ: the loss is" in message
