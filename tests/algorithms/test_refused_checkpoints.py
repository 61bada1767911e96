"""Checkpoints of other runs, and folders that cannot serve, are refused in one line."""

import importlib.util
import os
import shutil

import pytest
import torch
from torch import nn

import fasthessian as fh
from fasthessian.errors import MissingPackageError
from tests.support.bits import digest
from tests.support.checkpoints import classifier, diagonal


def changed(what):
    """The classifier's model, criterion and data, one of them changed."""
    model, criterion, (x, y) = classifier()
    with torch.no_grad():
        if what == "parameters":
            model[0].bias[3] += 1e-6
        if what == "data":
            x[4, 1] += 0.1
    if what == "order":
        x, y = x.flip(0), y.flip(0)
    if what == "criterion":
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    if what == "shapes":
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    if what == "names":
        model = nn.Sequential(nn.Sequential(model[0]), *model[1:])
    return model, criterion, (x, y)


def dense(factor=1.0, **options):
    d = torch.linspace(1, 2, 40, dtype=options.get("dtype", torch.float32))
    return fh.SymmetricOperator(lambda v: factor * (d * v), 40, check=False, **options)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Folders of calls that were stopped before they ended, by name."""

    def saved(name, A, **options):
        path = tmp_path_factory.mktemp(name) / "run.fh"

        def stop(made, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fh.density(A, steps=6, checkpoint=path, progress=stop, **options)
        return path

    H = fh.Hessian(*classifier())
    return {
        "hessian": saved("hessian", H),
        "fisher": saved("fisher", fh.Fisher(*classifier(), samples=2)),
        "blocks": saved("blocks", H.blocks("layer")),
        "matvec": saved("matvec", dense()),
    }


def hessian(what="", **options):
    return fh.Hessian(*changed(what), **options)


OTHERS = {  # what differs: (the folder, the operator, words of the message)
    "parameters": ("hessian", lambda: hessian("parameters"), "(the parameters differ)"),
    "names": (
        "hessian",
        lambda: hessian("names"),
        "(the names or shapes of the parameters differ)",
    ),
    "shapes": ("hessian", lambda: hessian("shapes"), "(n=43, not 83)"),
    "data": (
        "hessian",
        lambda: hessian("data"),
        "(the data or the criterion differ: the loss is ",
    ),
    "criterion": (
        "hessian",
        lambda: hessian("criterion"),
        "(the data or the criterion differ: the loss is ",
    ),
    "class": (
        "hessian",
        lambda: fh.GaussNewton(*classifier()),
        "(class='GaussNewton', not 'Hessian')",
    ),
    "engine": (
        "hessian",
        lambda: hessian(engine="recompute"),
        "(engine='recompute', not 'auto')",
    ),
    "weight decay": (
        "hessian",
        lambda: hessian(weight_decay=0.1),
        "(weight_decay=0.1, not 0.0)",
    ),
    "samples": ("fisher", lambda: fh.Fisher(*classifier(), samples=3), "(samples=3, not 2)"),
    "block for whole": (
        "hessian",
        lambda: hessian().blocks("layer")["0"],
        "(class='a block of Hessian', not 'Hessian')",
    ),
    "parameters of a block": (
        "blocks",
        lambda: hessian("parameters").blocks("layer"),
        "(0: the parameters differ)",
    ),
    "names of blocks": (
        "blocks",
        lambda: {"x": hessian().blocks("layer")["0"]},
        "(the names of the operators differ: 0, 2, x)",
    ),
    "one for many": ("blocks", hessian, "A must be a dictionary of operators, as in the call"),
    "many for one": ("hessian", lambda: hessian().blocks("layer"), "A must be an operator, as in"),
    "size": ("matvec", diagonal, "(n=143, not 40)"),
    "dtype": ("matvec", lambda: dense(dtype=torch.float64), "(dtype='float64', not 'float32')"),
    "products": ("matvec", lambda: dense(1.001), "(the products with the same vector differ)"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_operator_is_refused(stopped, what):
    name, new, words = OTHERS[what]
    A = new()
    with pytest.raises(fh.InputError) as caught:
        fh.resume(stopped[name], A)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    operators = A.values() if isinstance(A, dict) else [A]
    assert all(B.matvecs == 0 for B in operators)


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("hessian", lambda: hessian("order")),
        ("hessian", lambda: hessian(memory_budget=10**7)),
        ("fisher", lambda: fh.Fisher(*classifier(), samples=2)),
        ("blocks", lambda: hessian().blocks("layer")),
        ("matvec", dense),
    ],
)
def test_the_operator_that_the_message_asks_for_is_accepted(stopped, tmp_path, name, new):
    """Samples in another order give the same loss to rounding."""
    path = shutil.copytree(stopped[name], tmp_path / "run.fh")
    found = fh.resume(path, new())
    assert {type(x) for x in (found.values() if isinstance(found, dict) else [found])} == {
        fh.Density
    }


def test_a_folder_that_holds_a_checkpoint_is_refused_with_both_ways_out(stopped, tmp_path):
    path = shutil.copytree(stopped["matvec"], tmp_path / "run.fh")
    A = dense()
    with pytest.raises(FileExistsError) as caught:
        fh.density(A, steps=7, checkpoint=path)
    assert str(caught.value) == (
        f"checkpoint {path} holds a checkpoint of density with steps=6, not 7; go on with "
        f"fh.resume({str(path)!r}, A), or delete the folder to begin anew"
    )
    with pytest.raises(FileExistsError, match=r"holds a checkpoint of density; go on"):
        fh.eigsh(A, checkpoint=path)
    with pytest.raises(FileExistsError, match=r"holds a checkpoint of density; go on"):
        fh.density(A, steps=6, checkpoint=path)
    assert A.matvecs == 0
    found = fh.resume(str(path), A)
    shutil.rmtree(path)
    assert digest(fh.density(A, steps=6, checkpoint=path)) == digest(found)


def test_an_ended_call_is_not_begun_anew_either(tmp_path):
    path, A = tmp_path / "run.fh", dense()
    found = fh.trace(A, checkpoint=path)
    with pytest.raises(FileExistsError, match=r"checkpoint of trace; go on with fh\.resume"):
        fh.trace(A, checkpoint=path)
    made = A.matvecs
    assert digest(fh.resume(path, A)) == digest(found) and A.matvecs == made


def test_a_call_that_was_killed_before_its_first_save_is_made_again(tmp_path):
    path = tmp_path / "run.fh"
    path.mkdir()
    (path / "state-00001-0of1.safetensors.part").write_bytes(b"cut")
    with pytest.raises(fh.InputError, match="no save was completed; call the algorithm again"):
        fh.resume(path, dense())
    fh.trace(dense(), checkpoint=path)
    assert not list(path.glob("*.part"))


@pytest.mark.parametrize("name", ["file", "missing/run.fh", "file/run.fh"])
def test_a_folder_that_cannot_be_made_is_found_before_the_first_product(tmp_path, name):
    (tmp_path / "file").write_text("")
    A = dense()
    with pytest.raises(OSError) as caught:
        fh.trace(A, checkpoint=tmp_path / name)
    assert "\n" not in str(caught.value) and A.matvecs == 0


def test_a_folder_that_cannot_be_written_is_found_before_the_first_product(tmp_path, monkeypatch):
    def refused(*args):
        raise PermissionError(13, "Permission denied")

    A, path = dense(), tmp_path / "run.fh"
    monkeypatch.setattr("pathlib.Path.write_bytes", refused)
    with pytest.raises(PermissionError):
        fh.trace(A, checkpoint=path)
    assert A.matvecs == 0


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda A: fh.trace(A, time_limit=5), ValueError,
         "time_limit must come with checkpoint, the folder in which the run is saved, got "
         "time_limit=5 alone; pass checkpoint='run.fh'"),
        (lambda A: fh.trace(A, checkpoint=5), TypeError,
         "checkpoint must be the path of a folder, got int"),
        (lambda A: fh.trace(A, checkpoint=b"run.fh"), TypeError,
         "checkpoint must be the path of a folder, got bytes"),
        (lambda A: fh.trace(A, checkpoint="run.fh", time_limit=-1), ValueError,
         "time_limit must be a finite positive number, got -1"),
        (lambda A: fh.resume("run.fh", A), FileNotFoundError,
         "run.fh is not the folder of a checkpoint"),
        (lambda A: fh.resume("run.fh", 3), TypeError, "A must be an operator, got int"),
        (lambda A: fh.resume("run.fh", {}), TypeError, "A must be an operator, got NoneType"),
    ],
)  # fmt: skip
def test_arguments_that_are_not_accepted(tmp_path, monkeypatch, call, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        call(dense())
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_bad_input_leaves_no_folder(tmp_path):
    A = dense()
    with pytest.raises(fh.InputError, match="ncv must be"):
        fh.eigsh(A, ncv=1, checkpoint=tmp_path / "run.fh")
    with pytest.raises(fh.InputError, match="max_matvecs must be"):
        fh.spectrum(A, max_matvecs=1, checkpoint=tmp_path / "run.fh")
    broken = fh.SymmetricOperator(lambda v: v * torch.nan, 40, check=False)
    with pytest.raises(fh.InputError, match="NaN"):
        fh.trace(broken, checkpoint=tmp_path / "run.fh")
    assert os.listdir(tmp_path) == []


def test_without_safetensors_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *x: None if name == "safetensors" else find(name)
    )
    with pytest.raises(MissingPackageError, match="pip install safetensors"):
        fh.trace(dense(), checkpoint=tmp_path / "run.fh")
    assert os.listdir(tmp_path) == [] and fh.trace(dense()).converged


def test_a_damaged_checkpoint_is_resumed_from_the_one_before(tmp_path, monkeypatch):
    path, A = tmp_path / "run.fh", dense()
    monkeypatch.setattr("fasthessian.checkpoints.keeper.INTERVAL", 0.0)
    monkeypatch.setattr("fasthessian.checkpoints.keeper.SHARE", 1e9)
    want = fh.density(dense(), steps=6)

    def stop(made, total):
        if made == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fh.density(A, steps=6, checkpoint=path, progress=stop)
    newest = max(path.glob("state-*"))
    newest.write_bytes(newest.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"newest checkpoint in .* is damaged .*before it is used"):
        found = fh.resume(path, dense())
    assert digest(found) == digest(want)


def test_a_checkpoint_that_cannot_be_read_is_deleted(stopped, tmp_path):
    path = shutil.copytree(stopped["matvec"], tmp_path / "run.fh")
    for file in path.glob("state-*"):
        file.unlink()
    words = r"no checkpoint that is whole \(state-.* is missing\); delete the folder and call"
    with pytest.raises(fh.InputError, match=words):
        fh.resume(path, dense())
    shutil.rmtree(path)
    assert fh.density(dense(), steps=6, checkpoint=path).matvecs == 6
