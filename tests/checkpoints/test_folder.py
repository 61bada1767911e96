"""Generations of a checkpoint: whole or not at all, written by P ranks and read by Q."""

from __future__ import annotations  # a state reads its annotations as text

import dataclasses
import itertools
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fasthessian as fh
from fasthessian.checkpoints import folder as folders
from fasthessian.checkpoints import index as indexes
from fasthessian.checkpoints import shards
from fasthessian.checkpoints.folder import Folder
from fasthessian.checkpoints.state import State
from fasthessian.distributed.ranks import ALONE
from fasthessian.distributed.slices import Slice
from fasthessian.errors import UnsupportedError
from fasthessian.vectors import empty_rows
from tests.support.checkpoints import on_threads

N = 101


@dataclasses.dataclass
class Example(State):
    SPLIT = ("V", "halves")

    V: Tensor
    halves: Tensor
    T: Tensor
    flags: Tensor
    words: str = "a"
    limit: float = float("inf")
    count: int | None = None


def rows(k, dtype=torch.float32):
    """Padded rows, as those of a basis."""
    found = empty_rows(k, N, dtype, "cpu")
    found.copy_(torch.randn(k, N, generator=torch.Generator().manual_seed(k)))
    return found


def example(own=None, k=5):
    """The state of a rank, whose slices are padded with zeros."""
    generator = torch.Generator().manual_seed(1)
    T = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    split = [rows(k), rows(2, torch.float16)]
    if own is not None:
        split = [t[:, own.first : own.first + own.held] for t in split]
        split = [torch.nn.functional.pad(t, (0, own.width - own.held)) for t in split]
    return Example(*split, T, torch.tensor([True, False]), "b", 0.1, 7)


def part(rank, size):
    """Uneven ranges, padded to one width; the last rank of three or more has none."""
    ends = [round(N * (i / size) ** 2) for i in range(size + 1)]
    if size > 2:
        ends[-2] = N
    width = 8 + max(b - a for a, b in itertools.pairwise(ends))
    return Slice(N, width, ends[rank], ends[rank + 1] - ends[rank], ALONE)


def write(path, generation=1, size=1):
    def job(ranks):
        own = part(ranks.rank, size) if size > 1 else None
        held = Folder(path, ranks)
        for number in range(generation):
            body = {"generation in words": f"number {number + 1}"}
            held.write(body, {("run/a/b", "x"): example(own)}, own)

    path.mkdir(exist_ok=True)
    on_threads(size, job)


def read(path, ranks=ALONE, own=None):
    held = Folder(path, ranks)
    index = held.read()
    state = example(own)
    for tensor in (state.V, state.halves, state.T):
        tensor.fill_(3.0)
    state.restore(*held.parts("run/a/b", own)["x"])
    return index, state


def equal(found, want):
    assert found.numbers() == want.numbers() and len(want.numbers()) == 3
    assert len(want.tensors()) == len(want.split()) == 2
    for name, tensor in {**want.tensors(), **want.split()}.items():
        assert torch.equal(getattr(found, name), tensor), name


@pytest.mark.parametrize("chunk", [64, 1 << 25])
@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("q", [1, 2, 4])
def test_what_p_ranks_wrote_q_ranks_read(tmp_path, monkeypatch, p, q, chunk):
    monkeypatch.setattr(shards, "CHUNK", chunk)
    write(tmp_path, size=p)

    def own(rank):
        return part(rank, q) if q > 1 else None

    found = on_threads(q, lambda ranks: read(tmp_path, ranks, own(ranks.rank))[1])
    for rank, state in enumerate(found):
        equal(state, example(own(rank)))


def test_the_files_are_safetensors_and_the_index_says_where_each_tensor_lies(tmp_path):
    write(tmp_path, size=2)
    index = json.loads((tmp_path / "index-00001.json").read_text())["body"]
    place = index["runs"]["run/a/b"]["x"]["tensors"]["V"]
    assert place["dtype"] == "F32" and place["shape"] == [5, N] and place["split"]
    for file, key, first, last, _ in place["pieces"]:
        assert torch.equal(load_file(tmp_path / file)[key], rows(5)[:, first:last])
    assert [piece[2:4] for piece in place["pieces"]] == [[0, 25], [25, N]]
    assert sorted(os.listdir(tmp_path)) == [
        "index-00001.json", "state-00001-0of2.safetensors", "state-00001-1of2.safetensors",
    ]  # fmt: skip


def test_two_generations_are_kept_and_the_newest_is_read(tmp_path):
    write(tmp_path, generation=5)
    assert sorted(os.listdir(tmp_path)) == [
        "index-00004.json", "index-00005.json",
        "state-00004-0of1.safetensors", "state-00005-0of1.safetensors",
    ]  # fmt: skip
    assert read(tmp_path)[0]["generation in words"] == "number 5"


def test_what_never_changes_is_written_once(tmp_path):
    class Constant(Example):
        FROZEN = True

    constant = Constant(**vars(example()))
    held = Folder(tmp_path, ALONE)
    for count in range(4):
        state = dataclasses.replace(example(), count=count)
        held.write({}, {("run", "x"): state, ("call", "y"): constant})
    names = sorted(os.listdir(tmp_path))
    assert [name for name in names if "frozen" in name] == ["frozen-00001-0of1.safetensors"]
    assert len(names) == 5
    again = Folder(tmp_path, ALONE)
    again.read()
    again.write({}, {("call", "y"): constant})
    saved = again.parts("call")["y"]
    assert torch.equal(saved.stored["V"].tensor(), constant.V)
    assert "frozen-00001-0of1.safetensors" in os.listdir(tmp_path)


def damages():
    def drop(path, name):
        (path / name).unlink()

    def cut(path, name):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-1])

    def flip(path, name, place=0.7):
        content = bytearray((path / name).read_bytes())
        content[int(len(content) * place)] ^= 1
        (path / name).write_bytes(content)

    def empty(path, name):
        (path / name).write_bytes(b"")

    def older(path, name):
        shutil.copy(path / name.replace("00003", "00002"), path / name)

    return {f.__name__: f for f in (drop, cut, flip, empty, older)}


DAMAGES = damages()
FILES = ["state-00003-0of2.safetensors", "state-00003-1of2.safetensors", "index-00003.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_generation_before_a_damaged_one_is_read(tmp_path, damage, file):
    write(tmp_path, generation=3, size=2)
    DAMAGES[damage](tmp_path, file)
    whole = damage in ("drop", "older") and "index" in file  # as if it was not written
    for size in (1, 2):
        if whole:
            found = on_threads(size, lambda ranks: read(tmp_path, ranks)[0])
        else:
            with pytest.warns(UserWarning, match=r"damaged \((state|index)-00003.*the one before"):
                found = on_threads(size, lambda ranks: read(tmp_path, ranks)[0])
        assert {index["generation in words"] for index in found} == {"number 2"}


def test_an_index_whose_numbers_were_changed_is_not_read(tmp_path):
    write(tmp_path)
    path = tmp_path / "index-00001.json"
    path.write_text(path.read_text().replace('"count": 7', '"count": 8'))
    with pytest.raises(fh.InputError, match=r"index-00001.json is damaged: its sum differs"):
        read(tmp_path)


def test_the_next_save_replaces_a_damaged_generation(tmp_path):
    write(tmp_path, generation=3)
    DAMAGES["flip"](tmp_path, "state-00003-0of1.safetensors")
    held = Folder(tmp_path, ALONE)
    with pytest.warns(UserWarning, match="damaged"):
        held.read()
    held.write({}, {("run/a/b", "x"): example()})
    assert {name.split("-")[1].split(".")[0] for name in os.listdir(tmp_path)} == {"00002", "00004"}
    read(tmp_path)


def test_two_damaged_generations_are_refused(tmp_path):
    write(tmp_path, generation=3)
    for number in (2, 3):
        DAMAGES["cut"](tmp_path, f"state-0000{number}-0of1.safetensors")
    with pytest.raises(fh.InputError, match=r"no checkpoint that is whole \(state-00003") as caught:
        Folder(tmp_path, ALONE).read()
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_whole_generation_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a checkpoint"):
        Folder(tmp_path / "none", ALONE).read()
    with pytest.raises(fh.InputError, match="no save was completed"):
        Folder(tmp_path, ALONE).read()


def test_a_file_of_another_run_is_refused(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name)
    state = "state-00001-0of1.safetensors"
    shutil.copy(tmp_path / "a" / state, tmp_path / "b" / state)
    with pytest.raises(fh.InputError, match=f"{state} belongs to another generation or run"):
        read(tmp_path / "b")


def test_another_version_of_the_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "FORMAT", 2)
    write(tmp_path)
    monkeypatch.undo()
    words = r"format 2 of fasthessian .*format 1 is read here"
    with pytest.raises(fh.InputError, match=words):
        read(tmp_path)
    later = {"format": 2, "version": "9.9", "what else": "a later version may hold"}
    indexes.write(tmp_path / "index-00002.json", later)
    with pytest.raises(fh.InputError, match=words):
        read(tmp_path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("last", [1, 2])  # the file of tensors, the index
def test_a_failed_write_leaves_the_generation_before_it(tmp_path, monkeypatch, function, last):
    write(tmp_path, generation=2)
    before, real, count = sorted(os.listdir(tmp_path)), getattr(os, function), []

    def full(*args):
        count.append(args)
        if len(count) == last:
            raise OSError(28, "No space left on device")
        return real(*args)

    held = Folder(tmp_path, ALONE)
    held.read()
    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match="No space left"):
        held.write({}, {("run/a/b", "x"): example()})
    monkeypatch.undo()
    left = sorted(os.listdir(tmp_path))
    assert [name for name in left if "-00003" not in name] == before
    assert [name for name in left if name.endswith(".part") or "index-00003" in name] == []
    assert read(tmp_path)[0]["generation in words"] == "number 2"


def test_an_error_of_one_rank_reaches_all(tmp_path, monkeypatch):
    """The other ranks do not wait for it, and no index is written."""
    write_shard = shards.write

    def failing(path, *args):
        if "1of2" in path.name:
            raise OSError(28, "No space left on device")
        return write_shard(path, *args)

    def job(ranks):
        with pytest.raises((OSError, UnsupportedError), match="No space left"):
            own = part(ranks.rank, 2)
            Folder(tmp_path, ranks).write({}, {("run", "x"): example(own)}, own)

    monkeypatch.setattr(shards, "write", failing)
    on_threads(2, job)
    assert not list(tmp_path.glob("index-*"))


def test_a_big_basis_is_written_and_read_without_a_copy(tmp_path, monkeypatch):
    """The largest block that passes through memory is CHUNK."""
    monkeypatch.setattr(shards, "CHUNK", 1 << 12)
    V, sizes = empty_rows(9, 5000, torch.float32, "cpu"), []
    contiguous = Tensor.contiguous
    monkeypatch.setattr(
        Tensor, "contiguous", lambda t: (sizes.append(t.numel() * 4), contiguous(t))[1]
    )
    sums = shards.write(tmp_path / "a.safetensors", {"V": V.normal_()}, "x")
    assert 9 * 5000 * 4 / 4096 <= len(sizes) < 60 and max(sizes) <= 4096
    piece = shards.Piece("a.safetensors", "V", 0, 5000, sums["V"])
    shards.verify(tmp_path, [piece], "x")
    out = empty_rows(9, 5000, torch.float32, "cpu")
    shards.Source(tmp_path, torch.float32, (9, 5000), [piece], (0, 5000)).read_into(out)
    assert torch.equal(out, V)
