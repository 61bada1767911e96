import json
import subprocess
import sys
from subprocess import PIPE

import pytest
import torch

from fasthessian.study.networks import Network, Run
from fasthessian.study.store import LANDSCAPE, SETTINGS, Folder
from tests.support.small_study import landscape, measurement, training

pytest.importorskip("safetensors")
GIVEN = {"version": "1", "data": {"fingerprint": "a"}, "recipe": {"epochs": 2, "lrs": (0.1,)}}
RUN = Run(Network(8, "no-bn"), 0, 0.1)


@pytest.fixture
def folder(tmp_path):
    """The folder of a study that has begun."""
    made = Folder(tmp_path / "study", GIVEN)
    made.begin()
    return made


def test_what_is_saved_is_found_in_the_order_of_networks_seeds_and_epochs(folder):
    networks = [Network(8), Network(8, "no-bn"), Network(14)]
    runs = [Run(network, seed, 0.1) for network in networks for seed in (0, 1)]
    for run in reversed(runs):
        with folder.hold(run):
            folder.save(folder.run(run) / "training.json", training(run))
        for epoch in (10, 2):
            folder.save(folder.part(run, epoch, "eval"), measurement(run, epoch, "eval"))
    folder.save(folder.part(runs[0], 2, "train", LANDSCAPE), landscape())
    found = Folder(folder.root, GIVEN).results()
    assert [each.run for each in found.trainings] == runs
    assert [(each.run, each.epoch) for each in found.measurements] == [
        (run, epoch) for run in runs for epoch in (2, 10)
    ]
    assert list(found.landscapes) == [(runs[0], 2, "train")]
    assert found.landscapes[runs[0], 2, "train"].losses.shape == (2, 2)
    assert found.settings["recipe"] == {"epochs": 2, "lrs": [0.1]}
    assert list(folder.trainings()) == runs


def test_vectors_come_back_with_the_same_bits(folder):
    vectors = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    with folder.hold(RUN):
        folder.save_vectors(RUN, 3, "eval", vectors)
    assert torch.equal(folder.vectors(RUN, 3, "eval"), vectors)
    assert folder.vectors(RUN, 3, "train") is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": {"epochs": 3, "lrs": [0.1]}}, "epochs is 2 there and 3 now"),
        ({"recipe": {"epochs": 2, "lrs": [0.1, 0.2]}}, r"lrs is \[0.1\] there and \[0.1, 0.2\]"),
        ({"data": {"fingerprint": "b"}}, 'fingerprint is "a" there and "b" now'),
        ({"version": "2"}, 'version is "1" there and "2" now'),
    ],
)
def test_the_folder_of_another_study_is_refused_and_stays_as_it_is(folder, change, words):
    before = (folder.root / SETTINGS).read_bytes()
    with pytest.raises(ValueError, match=f"holds a study with other settings: {words}.*; choose"):
        Folder(folder.root, {**GIVEN, **change})
    assert (folder.root / SETTINGS).read_bytes() == before
    # both ways out of the message
    Folder(folder.root.parent / "another", {**GIVEN, **change}).begin()
    Folder(folder.root, GIVEN).begin()


def test_where_a_study_was_begun_may_differ(folder):
    again = Folder(folder.root, {**GIVEN, "begun": {"cores": 64}})
    assert "begun" not in again.settings
    without_data = {key: value for key, value in GIVEN.items() if key != "data"}
    assert Folder(folder.root, without_data).settings["data"] == {"fingerprint": "a"}


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"is not empty and holds no study, but thesis\.tex; "):
        Folder(tmp_path, GIVEN)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    Folder(tmp_path / "another", GIVEN).begin()
    (tmp_path / "another" / SETTINGS).unlink()
    (tmp_path / "another").rmdir()
    (tmp_path / "thesis.tex").rename(tmp_path / f".{SETTINGS}.abc")  # of a begin that was killed
    Folder(tmp_path, GIVEN).begin()


@pytest.mark.parametrize("text", ["{", "[]", '{"recipe": 1}'])
def test_damaged_settings_are_refused(folder, text):
    (folder.root / SETTINGS).write_text(text)
    with pytest.raises(ValueError, match=r"study.json is damaged \(.*\); choose another folder"):
        Folder(folder.root, GIVEN)
    Folder(folder.root.parent / "another", GIVEN).begin()


def test_a_damaged_result_names_its_file_and_is_made_again_after_it_is_deleted(folder):
    with folder.hold(RUN):
        path = folder.run(RUN) / "training.json"
        folder.save(path, training(RUN))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"training.json is damaged \(.*\); delete it, and it is"):
        folder.results()
    path.unlink()
    assert folder.results().trainings == ()


def test_a_result_of_another_run_is_refused(folder):
    with folder.hold(RUN):
        path = folder.run(RUN) / "training.json"
        folder.save(path, training(Run(Network(8), 0, 0.1)))
    with pytest.raises(ValueError, match="belongs to another run; delete it"):
        folder.trainings()
    path.unlink()
    assert folder.trainings() == {}


def test_other_folders_and_files_of_the_user_are_ignored(folder):
    for name in ("notes", "resnet8-odd-seed0-lr0.1", "resnet8-seed0-lr0.10", "resnet8-seed0-lrx"):
        (folder.root / "runs" / name).mkdir(parents=True)
        (folder.root / "runs" / name / "training.json").write_text("{}")
    with folder.hold(RUN):
        (folder.run(RUN) / "epoch-001-eval.json.bak").write_text("")
    found = folder.results()
    assert found.trainings == found.measurements == ()


HOLD = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(); input()"


def test_a_run_is_held_by_one_process_and_released_when_it_dies(folder):
    with folder.hold(RUN) as held, Folder(folder.root, GIVEN).hold(RUN) as again:
        assert (held, again) == (True, False)
        with folder.hold(Run(Network(8), 0, 0.1)) as other_run:
            assert other_run
    command = [sys.executable, "-c", HOLD, folder.run(RUN) / "lock"]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE) as other:
        other.stdout.readline()
        with folder.hold(RUN) as held:
            assert not held
        other.kill()
    with folder.hold(RUN) as held:
        assert held


def test_records_are_plain_json(folder):
    with folder.hold(RUN):
        path = folder.run(RUN) / "training.json"
        folder.save(path, training(RUN, float("nan"), "diverged"))
    assert json.loads(path.read_text())["test_accuracy"] == [None, None]
    assert folder.trainings()[RUN].status == "diverged"
