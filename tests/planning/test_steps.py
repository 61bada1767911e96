"""Counts of a Lanczos step: by hand for small cases, and against a run of the package."""

import pytest
import torch

from fasthessian import kernels
from fasthessian.distributed.slices import slice_width
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.state import ROWS
from fasthessian.krylov.three_term import ThreeTerm
from fasthessian.planning.steps import BASES, Collective, KrylovSize, collectives
from tests.support.krylov_runs import grown
from tests.support.spectra import F32, F64, diagonal


@pytest.mark.parametrize(
    ("n", "ranks", "width"),
    [(1, 1, 16), (16, 1, 16), (17, 1, 32), (100, 4, 32), (64, 4, 16), (65, 4, 32), (3, 64, 16),
     (7 * 10**9, 64, 109_375_008), (2**40 + 1, 3, 366_503_875_936)],
)  # fmt: skip
def test_a_slice_is_whole_cache_lines(n, ranks, width):
    assert slice_width(n, ranks) == width
    assert width % 16 == 0 and 0 <= width - n / ranks < 32


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sharded": False}, [("all_reduce", 400)]),
        ({"sharded": False, "basis": "none"}, [("all_reduce", 400)]),
        ({"sharded": False, "dtype": "float64"}, [("all_reduce", 800)]),
        # 100 numbers on 4 ranks: slices of 25, so of 32; 7 rows: 2 x 7 + 3 scalars
        ({"sharded": True},
         [("all_gather", 128), ("reduce_scatter", 512), ("all_gather", 136)]),
        ({"sharded": True, "dtype": "bfloat16", "basis": "compressed"},
         [("all_gather", 128), ("reduce_scatter", 512), ("all_gather", 136)]),
        ({"sharded": True, "dtype": "float64"},
         [("all_gather", 256), ("reduce_scatter", 1024), ("all_gather", 136)]),
        ({"sharded": True, "basis": "none"},
         [("all_gather", 128), ("reduce_scatter", 512), ("all_gather", 16), ("all_gather", 16)]),
    ],
)  # fmt: skip
def test_the_collectives_of_a_step(options, expected):
    assert list(collectives(100, 4, 7, **options)) == expected


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_only_the_scalars_grow_with_the_rows(ranks):
    for basis in BASES:
        before, after = (collectives(999, ranks, j, sharded=True, basis=basis) for j in (8, 9))
        changed = [b.payload - a.payload for a, b in zip(before, after, strict=True)]
        assert changed == ([0] * 4 if basis == "none" else [0, 0, 16])


def test_one_rank_has_no_collectives():
    assert KrylovSize(100).collectives(3) == ()
    assert KrylovSize(100, ranks=2).collectives(3) == (Collective("all_reduce", 400),)


def test_bytes_of_the_ring_algorithms():
    assert Collective("all_reduce", 800).sent(4) == 1200
    assert Collective("reduce_scatter", 800).sent(4) == 600
    assert Collective("all_gather", 200).sent(4) == 600  # 200 from each
    for name in ("all_reduce", "reduce_scatter", "all_gather"):
        assert Collective(name, 800).sent(1) == 0


def test_the_two_halves_of_an_all_reduce_send_as_much_as_it():
    whole, (gather, scatter, _) = (
        collectives(64 * 16, 64, 5, sharded=sharded) for sharded in (False, True)
    )
    assert gather.sent(64) + scatter.sent(64) == whole[0].sent(64)


@pytest.mark.parametrize(
    ("basis", "sharded", "kept", "others"),
    [
        # 100 numbers: 12 rows, and a candidate and its product; or the three vectors
        ("full", False, 12 * 400, 2 * 400),
        ("compressed", False, 12 * 200, 2 * 400),
        ("none", False, 0, 3 * 400),
        # slices of 32; two vectors of 4 x 32 as well
        ("full", True, 12 * 128, 2 * 128 + 2 * 512),
        ("compressed", True, 12 * 64, 2 * 128 + 2 * 512),
        ("none", True, 0, 3 * 128 + 2 * 512),
    ],
)
def test_memory_by_hand(basis, sharded, kept, others):
    space = KrylovSize(100, ranks=4, steps=12, basis=basis, sharded=sharded)
    assert (space.basis_bytes, space.vectors_bytes) == (kept, others)
    assert space.device_bytes() == kept + others and space.host_bytes == 0
    pairs = KrylovSize(100, ranks=4, steps=12, basis=basis, sharded=sharded, pairs=3)
    assert pairs.device_bytes() - space.device_bytes() == 3 * (128 if sharded else 400)


def test_memory_of_an_offloaded_basis():
    space = KrylovSize(10**6, steps=100, basis="offload")
    assert space.host_bytes == 2**29 >= space.basis_bytes == 4 * 10**8  # the next power of two
    # buffers of 268 rows would fit into a gibibyte, 100 rows are all: 101 with the new row, twice
    assert space.buffers_bytes(None) == 2 * 101 * 4 * 10**6
    # an eighth of 800 MB holds 25 rows, one of which is the new one
    assert space.buffers_bytes(8e8) == 2 * 25 * 4 * 10**6
    assert space.buffers_bytes(1) == 2 * 2 * 4 * 10**6
    assert space.device_bytes(8e8) == (50 + 2) * 4 * 10**6
    assert KrylovSize(10**6, steps=100).buffers_bytes(8e8) == 0


@pytest.mark.parametrize("basis", BASES)
def test_a_space_has_n_rows_at_most(basis):
    small, large = (KrylovSize(20, steps=m, basis=basis) for m in (20, 50))
    assert small.rows == large.rows == 20
    assert small.device_bytes() == large.device_bytes()
    assert small.checkpoint_bytes == large.checkpoint_bytes


def test_fewer_numbers_than_ranks():
    space = KrylovSize(3, ranks=64, steps=2, sharded=True)
    assert space.width == 16 and space.rows == 2
    assert [tuple(each) for each in space.collectives(1)] == [
        ("all_gather", 64), ("reduce_scatter", 64 * 64), ("all_gather", 40)
    ]  # fmt: skip


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("sharded", [False, True])
def test_more_is_never_less(basis, sharded):
    def sizes(**options):
        space = KrylovSize(**{"n": 10**6, "ranks": 8, "steps": 50, "pairs": 2, **options},
                      basis=basis, sharded=sharded)  # fmt: skip
        parts = space.device_bytes(1e9), space.host_bytes, space.checkpoint_bytes
        return *parts, space.streamed_bytes(20), space.moved_bytes

    first = sizes()
    for more in ({"n": 10**6 + 100}, {"steps": 51}, {"pairs": 3}, {"dtype": "float64"}):
        assert all(a <= b for a, b in zip(first, sizes(**more), strict=True)), more
    assert (sizes(ranks=16)[0] < first[0]) == sharded


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("basis", ["full", "compressed"])
def test_a_run_has_the_memory_that_is_planned(basis, dtype):
    n, steps = 1616, 9  # rows of whole cache lines: no padding
    run = grown(diagonal(torch.arange(n), dtype), steps, basis=basis)
    space = KrylovSize(n, steps=steps, basis=basis, dtype=str(dtype).removeprefix("torch."))
    stored, W = run.state.basis.stored, run.state.W
    assert stored.numel() * stored.element_size() == space.basis_bytes
    assert W.numel() * W.element_size() == space.vectors_bytes
    saved = run.state.tensors() | run.state.split()
    vectors = sum(saved[name].nbytes for name in ("V", "W"))
    assert vectors == space.checkpoint_bytes


def test_a_run_without_a_basis_has_the_memory_that_is_planned():
    run = ThreeTerm(diagonal(torch.arange(1616), F32), 9, seed=0)
    space = KrylovSize(1616, steps=9, basis="none")
    assert run.state.rows.nbytes == space.vectors_bytes == space.checkpoint_bytes
    assert len(run.state.rows) == ROWS == 3


@pytest.mark.parametrize(("basis", "per_row", "vectors"), [("full", 8, 7), ("none", 0, 10)])
def test_a_step_reads_and_writes_what_is_planned(monkeypatch, basis, per_row, vectors):
    """Bytes of all kernel calls of the sixth step, counted by their arguments."""
    moved = {"basis": 0, "others": 0}
    reference = kernels.BACKENDS["reference"]
    project_, update_ = reference.project_, reference.update_

    def rows_in(V, count):
        return (len(V) if count is None else int(count)) * V.shape[1] * V.element_size()

    def project(V, W, H=None, *, count=None):
        moved["basis" if basis == "full" else "others"] += rows_in(V, count)
        moved["others"] += W.nbytes * (1 if H is None else 2)  # W is written, too
        return project_(V, W, H, count=count)

    def update(V, W, H, S=None, *, count=None, append=None):
        moved["basis" if basis == "full" else "others"] += rows_in(V, count)
        written = 2 if append is not None else len(W)  # the new row and the candidate
        moved["others"] += W.nbytes + written * W.shape[1] * W.element_size()
        update_(V, W, H, S, count=count, append=append)

    n = 1616
    kind = Lanczos if basis == "full" else ThreeTerm
    run = kind(diagonal(torch.arange(n), F32), 9, seed=0, backend="reference")
    for _ in range(5):
        run.step()
    monkeypatch.setattr(reference, "project_", project)
    monkeypatch.setattr(reference, "update_", update)
    run.step()
    space = KrylovSize(n, steps=9, basis=basis)
    assert moved == {"basis": space.streamed_bytes(5), "others": space.moved_bytes}
    assert moved == {"basis": 5 * per_row * n, "others": vectors * 4 * n}


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match=r"dtype must be one of float64, .*, got 'int8'"):
        collectives(10, 2, 1, "int8", sharded=True)
