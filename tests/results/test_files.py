"""Files that are not records are refused in one line, before they fill the memory."""

import io
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import fasthessian as fh
from fasthessian.operators.checks import Check
from fasthessian.results.record import Record
from fasthessian.results.records import (
    BlockSpectra,
    Density,
    Eigenpairs,
    Estimate,
    Landscape,
)
from tests.support.result_files import BLOCKS, MEAN, refused_file

pytestmark = pytest.mark.slow

pytest.importorskip("matplotlib")

PAIRS = {"converged": True, "matvecs": 1, "graph": ""}
ARRAYS = {"values": np.ones(2), "vectors": np.ones((2, 3), np.float32), "residuals": np.ones(2)}


def saved(path, kind, scalars, arrays, text=None, write=np.savez):
    """A file as ``save`` would write it, from parts that may be wrong."""
    text = json.dumps({"record": kind.__name__, "scalars": scalars}) if text is None else text
    with open(path, "wb") as stream:
        write(stream, __record__=np.array(text), **arrays)
    return path


def test_the_pattern_of_these_tests_is_a_record(tmp_path):
    saved(tmp_path / "a", Eigenpairs, PAIRS, ARRAYS)
    assert Eigenpairs.load(tmp_path / "a").vectors.shape == (2, 3)
    saved(tmp_path / "b", Estimate, MEAN, {"samples": np.ones(3)})
    assert Estimate.load(tmp_path / "b").interval == (0.5, 1.5)
    saved(tmp_path / "c", BlockSpectra, {"names": ["a", "b"]}, BLOCKS)
    assert BlockSpectra.load(tmp_path / "c").names == ("a", "b")
    saved(tmp_path / "d", Eigenpairs, PAIRS, ARRAYS, write=np.savez_compressed)
    assert Eigenpairs.load(tmp_path / "d").matvecs == 1


@pytest.mark.parametrize(
    ("scalars", "words"),
    [
        ({"converged": 1}, "converged must be true or false, got 1"),
        ({"converged": None}, "got None"),
        ({"matvecs": 1.0}, "matvecs must be an integer >= 0, got 1.0"),
        ({"matvecs": True}, "got True"),
        ({"matvecs": -1}, "matvecs must be >= 0, got [-1.0]"),
        ({"matvecs": 10**400}, "matvecs must be an integer"),
        ({"graph": 3}, "graph must be text, got 3"),
    ],
)
def test_scalars_of_the_wrong_type(tmp_path, scalars, words):
    refused_file(Eigenpairs.load, saved(tmp_path / "a", Eigenpairs, PAIRS | scalars, ARRAYS), words)


@pytest.mark.parametrize(
    ("scalars", "words"),
    [
        ({"confidence": 1.0}, "confidence must be between 0 and 1, got [1.0]"),
        ({"confidence": "high"}, "confidence must be a number between 0 and 1, got 'high'"),
        ({"interval": [2, 1]}, "interval must be ascending"),
        ({"interval": [1, 2, 3]}, "interval must be a list of a number, 2 items"),
        ({"interval": [1, "2"]}, "interval must be"),
        ({"interval": 1.0}, "interval must be"),
        ({"stderr": -0.1}, "stderr must be >= 0"),
        ({"value": [1.0]}, "value must be a number"),
    ],
)
def test_numbers_out_of_range(tmp_path, scalars, words):
    path = saved(tmp_path / "a", Estimate, MEAN | scalars, {"samples": np.ones(3)})
    refused_file(Estimate.load, path, words)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"values": np.ones(2, np.float32)}, "values must be float64 of shape (k,), got float32"),
        ({"values": np.ones(2, int)}, "got int64"),
        ({"values": np.array(["a", "b"])}, "got <U1"),
        ({"values": np.array([1, None], object)}, "got pickled objects"),
        ({"values": np.ones(2, ">f8")}, "got >f8"),
        ({"vectors": np.ones((3, 3))}, "float64 of shape (k=2, n), got float64"),
        ({"vectors": np.ones((2, 3), complex)}, "got complex128"),
        ({"residuals": np.ones(3)}, "residuals must be float64 of shape (k=2,)"),
        ({"residuals": -np.ones(2)}, "residuals must be >= 0, got [-1.0, -1.0]"),
        ({"more": np.ones(2)}, "another version's fields: more"),
    ],
)  # fmt: skip
def test_arrays_of_the_wrong_dtype_or_shape(tmp_path, arrays, words):
    refused_file(Eigenpairs.load, saved(tmp_path / "a", Eigenpairs, PAIRS, ARRAYS | arrays), words)


@pytest.mark.parametrize(
    ("names", "arrays", "words"),
    [
        (["a"], {}, "sizes must be float64 of shape (b=1,), got float64 of shape (2,)"),
        ("ab", {}, "names must be a list of text"),
        (["a", 3], {}, "names must be a list of text"),
        (["a", "b"], {"errors": -np.ones(2)}, "errors must be >= 0"),
    ],
)
def test_lists_of_names(tmp_path, names, arrays, words):
    path = saved(tmp_path / "a", BlockSpectra, {"names": names}, BLOCKS | arrays)
    refused_file(BlockSpectra.load, path, words)


def test_rules_hold_within_a_record_of_records(tmp_path):
    n = torch.arange(1.0, 21.0, dtype=torch.float64)
    fh.spectrum(fh.SymmetricOperator(lambda v: n * v, 20, dtype=torch.float64)).save(tmp_path / "a")
    with np.load(tmp_path / "a") as archive:
        arrays = dict(archive)
    header = json.loads(str(arrays.pop("__record__")))
    kind = fh.Spectrum
    for change, words in (
        ({"density.weights": -arrays["density.weights"]}, "density.weights must be >= 0"),
        ({"density.grid": arrays["density.grid"][::-1]}, "density.grid must be ascending"),
        ({"top.values": np.ones((1, 1))}, "top.values must be float64 of shape (k,)"),
    ):
        text = json.dumps(header)
        refused_file(kind.load, saved(tmp_path / "b", kind, {}, arrays | change, text=text), words)
    for part in (3, None, {"record": "Estimate", "scalars": {}}, {"record": "Eigenpairs"}):
        header["scalars"]["top"] = part
        text = json.dumps(header)
        refused_file(
            kind.load, saved(tmp_path / "b", kind, {}, arrays, text=text), "not a Eigenpairs"
        )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[]", "no record that is known here"),
        ('{"record": ["Eigenpairs"], "scalars": {}}', "no record that is known here"),
        ('{"record": "Later", "scalars": {}}', "no record that is known here, but 'Later'"),
        ('{"record": "Eigenpairs", "scalars": []}', "is not a"),
        ('{"record": "Eigenpairs", "record": "Density"}', "the key 'record' appears twice"),
        ('{"record": "Eigenpairs", "scalars": {"matvecs": 1e400}}', "1e400 is above the largest"),
    ],
)
def test_headers_that_are_none(tmp_path, text, words):
    refused_file(Eigenpairs.load, saved(tmp_path / "a", Eigenpairs, {}, ARRAYS, text=text), words)


def member(shape, descr="<f8"):
    """The header of an array without its data."""
    stream = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def zipped(path, members, how=zipfile.ZIP_DEFLATED):
    """A zip file of members, each given as pieces of bytes."""
    text = io.BytesIO()
    np.save(text, np.array(json.dumps({"record": "Eigenpairs", "scalars": PAIRS})))
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, pieces in {"__record__.npy": [text.getvalue()], **members}.items():
            with archive.open(name, "w", force_zip64=True) as stream:
                for piece in pieces:
                    stream.write(piece)
    return path


ZEROS = [bytes(1 << 24)] * 32
BOMBS = {
    "an unknown member": {"other.npy": [member((1 << 26,)), *ZEROS]},
    "a field": {"values.npy": [member((1 << 26,)), *ZEROS]},
    "columns of nothing": {
        "values.npy": [member((1 << 26,)), *ZEROS],
        "residuals.npy": [member((1 << 26,)), *ZEROS],
        "vectors.npy": [member((1 << 26, 0))],
    },
    "the text": {"__record__.npy": [member((), "<U134217728"), *ZEROS]},
}

GROWTH = """
import resource, sys, fasthessian as fh
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    fh.Eigenpairs.load(sys.argv[1])
except ValueError as error:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, error)
"""


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_cannot_fill_the_memory(tmp_path, kind):
    path = zipped(tmp_path / "bomb.npz", BOMBS[kind])
    assert os.path.getsize(path) < 3 << 20
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, path], capture_output=True, text=True, check=True
    )
    grown, _, message = done.stdout.partition(" ")
    assert int(grown) < 64 and "its members declare" in message, done.stdout
    assert message.count("\n") == 1


def test_a_member_that_declares_what_it_does_not_have(tmp_path):
    for shape in ((3,), (1 << 60,), (-2,), ()):
        members = {"values.npy": [member(shape), bytes(16)]}
        path = zipped(tmp_path / "a", members, zipfile.ZIP_STORED)
        refused_file(Eigenpairs.load, path, f"values, float64 of shape {shape}", "its member has")


def test_other_zip_files_are_refused(tmp_path):
    path = tmp_path / "a"
    refused_file(Eigenpairs.load, zipped(path, {"values.npy": [b"text"]}), "magic string")
    refused_file(Eigenpairs.load, zipped(path, {}, zipfile.ZIP_LZMA), "must be stored or deflated")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "text")
    refused_file(Eigenpairs.load, path, "it has no member '__record__'")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("values.npy", "one")
        archive.writestr("values", "two")
    refused_file(Eigenpairs.load, path, "a member appears twice")
    refused_file(Eigenpairs.load, tmp_path, "Is a directory")


def test_every_field_of_every_record_has_a_declaration_that_is_understood():
    from fasthessian.results.fields import WORDS, fields_of

    for kind in Record.__subclasses__():
        for name, field in fields_of(kind).items():
            known = field.kind in (torch.Tensor, tuple, *WORDS) or issubclass(field.kind, Record)
            assert known, (kind, name)
            assert bool(field.axes) or field.kind is not torch.Tensor, (kind, name)
            assert set(field.items) - {Ellipsis} <= set(WORDS), (kind, name)
    assert {Check, Density, Landscape} < set(Record.__subclasses__())
