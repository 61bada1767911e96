import dataclasses
import json
import math
import os
import stat

import numpy as np
import pytest
import torch

from fasthessian.results.record import Record, empty_axes, write_whole
from fasthessian.results.records import Density, Eigenpairs, Estimate, Landscape, Spectrum


def doubles(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def ascending(*shape):
    return doubles(*shape).sort().values


RECORDS = [
    Eigenpairs(doubles(2), doubles(2, 5).float(), doubles(2).abs(), True, 17),
    Estimate(1.5, 0.25, (1.0, 2.0), 0.95, doubles(4), 4, False),
    Estimate(math.nan, math.inf, (-math.inf, math.inf), 0.95, doubles(0), 0, False),
    Density(
        ascending(1, 3),
        doubles(1, 3).abs(),
        ascending(9),
        doubles(9).abs(),
        doubles(9),
        doubles(9),
        0.1,
        3,
    ),
    Landscape(ascending(3), ascending(4), doubles(3, 4)),
    Landscape(ascending(3), doubles(0), doubles(3)),
]
RECORDS.append(Spectrum(RECORDS[0], RECORDS[0], *RECORDS[1:4:2], 9))


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_save_and_load_give_the_same_bits(tmp_path, record):
    path = tmp_path / "result.npz"
    record.save(path)
    same_bits(record, type(record).load(path))
    assert os.listdir(tmp_path) == ["result.npz"]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_json_gives_the_fields_back_except_vectors_and_infinities(record):
    text = json.dumps(record.to_json(), allow_nan=False)
    back = type(record).from_json(json.loads(text))
    same_fields(record, back)
    assert "vectors" not in text


def same_fields(record, back):
    for field in dataclasses.fields(record):
        a, b = getattr(record, field.name), getattr(back, field.name)
        assert type(a) is type(b), field.name
        if field.name == "vectors":
            assert b.shape == (0, 0)
        elif isinstance(a, Record):
            same_fields(a, b)
        elif isinstance(a, (bool, int, str)):
            assert a == b, field.name
        else:
            a, b = np.asarray(a), np.asarray(b)
            np.testing.assert_equal(b, np.where(np.isfinite(a), a, np.nan))


def test_json_within_a_record_is_read_strictly():
    given = RECORDS[-1].to_json()
    given["trace"]["confidence"] = 2
    with pytest.raises(ValueError, match="trace: confidence must be between 0 and 1"):
        Spectrum.from_json(given)
    del given["trace"]
    with pytest.raises(ValueError, match="trace is missing"):
        Spectrum.from_json(given)
    with pytest.raises(ValueError, match="expected an object of JSON, got a list"):
        Spectrum.from_json([])


def test_axes_without_entries_are_named():
    assert empty_axes(RECORDS[2]) == ["s"]
    assert empty_axes(RECORDS[5]) == []  # a landscape along one direction has no betas


@pytest.mark.parametrize("name", ["nodes", "weights", "grid", "values", "lower", "upper"])
def test_a_density_with_infinite_values_is_loaded_and_drawn(tmp_path, name):
    pytest.importorskip("matplotlib")
    odd = getattr(RECORDS[3], name).clone()
    odd.view(-1)[-1] = math.inf
    dataclasses.replace(RECORDS[3], **{name: odd}).save(tmp_path / "a")
    axes = Density.load(tmp_path / "a").plot()
    axes.figure.canvas.draw()
    assert np.isfinite(axes.get_ylim()).all()


def same_bits(record, back):
    for field in dataclasses.fields(record):
        a, b = getattr(record, field.name), getattr(back, field.name)
        assert type(a) is type(b), field.name
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b) and a.dtype == b.dtype, field.name
        elif isinstance(a, Record):
            same_bits(a, b)
        else:
            np.testing.assert_equal(b, a)  # NaN equals NaN here


def test_strided_and_differentiable_tensors_are_saved(tmp_path):
    vectors = torch.randn(6, 4, requires_grad=True)[::2]
    record = Eigenpairs(doubles(3), vectors, doubles(3).abs(), True, 1)
    record.save(tmp_path / "a")
    assert torch.equal(Eigenpairs.load(tmp_path / "a").vectors, vectors.detach())


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORDS[0].matvecs = 3


def test_an_existing_file_stays_unless_overwritten(tmp_path):
    path = tmp_path / "a"
    RECORDS[0].save(path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists; pass overwrite=True"):
        RECORDS[1].save(path)
    assert path.read_bytes() == before
    RECORDS[1].save(path, overwrite=True)
    assert Estimate.load(path).value == 1.5


def test_another_class_is_refused_by_name(tmp_path):
    RECORDS[0].save(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"holds a Eigenpairs, not a Density; use Eigenpairs\.load"
    ):
        Density.load(tmp_path / "a")
    with pytest.raises(ValueError, match="not a Record"):
        Record.load(tmp_path / "a")


def test_damaged_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "a"
    RECORDS[0].save(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(RECORDS[0].values.numpy().tobytes())] ^= 255
    for damage in (whole[:-20], whole[:40], b"", b"plain text", bytes(flipped)):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="is not a saved Eigenpairs") as info:
            Eigenpairs.load(path)
        assert "\n" not in str(info.value)
    with pytest.raises(FileNotFoundError):
        Eigenpairs.load(tmp_path / "absent")


@pytest.mark.parametrize(
    "scalars", [{"converged": True}, {"converged": True, "matvecs": 1, "other": 2}]
)
def test_missing_or_unknown_fields_are_a_value_error(tmp_path, scalars):
    header = json.dumps({"record": "Eigenpairs", "scalars": scalars})
    arrays = {name: np.zeros(1) for name in ("values", "vectors", "residuals")}
    np.savez(tmp_path / "a.npz", __record__=np.array(header), **arrays)
    with pytest.raises(ValueError, match="is not a saved Eigenpairs"):
        Eigenpairs.load(tmp_path / "a.npz")


@pytest.mark.parametrize("stray", ["other.values", "x.junk", "top.junk"])
def test_stray_arrays_are_a_value_error(tmp_path, stray):
    for record in (RECORDS[0], RECORDS[-1]):
        record.save(tmp_path / "a", overwrite=True)
        with np.load(tmp_path / "a") as archive:
            arrays = dict(archive)
        np.savez(tmp_path / "b.npz", **arrays, **{stray: np.zeros(1)})
        with pytest.raises(ValueError, match=f"is not a saved .*{stray.rpartition('.')[2]}"):
            type(record).load(tmp_path / "b.npz")


def test_a_file_without_a_field_that_has_a_default_is_read(tmp_path):
    header = json.dumps({"record": "Eigenpairs", "scalars": {"converged": True, "matvecs": 1}})
    arrays = {"values": np.zeros(1), "vectors": np.zeros((1, 1)), "residuals": np.zeros(1)}
    np.savez(tmp_path / "a.npz", __record__=np.array(header), **arrays)
    assert Eigenpairs.load(tmp_path / "a.npz").graph == ""


def test_pickled_arrays_are_refused(tmp_path):
    header = json.dumps({"record": "Eigenpairs", "scalars": {"converged": True, "matvecs": 1}})
    np.savez(tmp_path / "a.npz", __record__=np.array(header), values=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="is not a saved Eigenpairs"):
        Eigenpairs.load(tmp_path / "a.npz")


def test_write_whole_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    write_whole(tmp_path / "a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_whole(tmp_path / "a", b"new", overwrite=True)
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "absent" / "a", b"new")
    with pytest.raises(FileExistsError):
        write_whole(tmp_path, b"new")


def test_write_whole_honours_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_whole(tmp_path / "a", b"x")
        assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o640
    finally:
        os.umask(old)
