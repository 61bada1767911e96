"""``fasthessian study``: its options, bad input, and what it prints; analysis is replaced."""

import dataclasses
import errno
import json
import os

import click
import pytest

from fasthessian.app import main as cli
from fasthessian.app import study_work
from fasthessian.app.study import explanations, in_options, study_command
from fasthessian.app.study_work import recipe_of
from fasthessian.study import carry_out
from fasthessian.study.networks import VARIANTS
from fasthessian.study.recipes import RECIPES, Recipe
from fasthessian.study.store import SETTINGS, Folder
from tests.support.small_study import contents, images, replace_analysis

for extra in ("click", "rich", "matplotlib", "jinja2", "safetensors"):
    pytest.importorskip(extra)

SMALL = (
    "--depth", "8", "--variants", "no-bn", "--width", "2", "--epochs", "1", "--lrs", "0.1",
    "--seeds", "1", "--images", "20", "--spectrum-images", "10",
)  # fmt: skip
NUMBERS = [field.name for field in dataclasses.fields(Recipe) if field.name != "name"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return str(images(tmp_path_factory.mktemp("images") / "cifar"))


@pytest.fixture
def delivered(monkeypatch):
    """The folders whose report was written; the analysis and the report are replaced."""
    folders = []
    replace_analysis(monkeypatch)
    monkeypatch.setattr(study_work, "deliver", lambda folder, as_json: folders.append(folder))
    return folders


def run(capsys, *options):
    """Exit code, and the lines of stderr."""
    with pytest.raises(SystemExit) as info:
        cli.main(["study", *options])
    return info.value.code, capsys.readouterr().err.splitlines()


def parsed(*options):
    return study_command.make_context("study", list(options)).params


@pytest.mark.parametrize(
    "options",
    [
        ("--depth", "20", "32", "--variants", "resnet", "no-bn", "--lrs", "0.1", "0.01"),
        ("--depth=20", "32", "--lrs=0.1", "0.01", "--variants=resnet", "no-bn"),
        ("--depth", "20", "--depth", "32", "--variants", "resnet", "--variants", "no-bn",
         "--lrs", "0.1", "--lrs=0.01"),
    ],
)  # fmt: skip
def test_options_take_several_values(options):
    params = parsed(*options, "--out", "there", "--no-augment")
    assert params["depth"] == (20, 32)
    assert params["variants"] == ("resnet", "no-bn")
    assert params["lrs"] == (0.1, 0.01)
    assert (params["out"], params["augment"]) == ("there", False)


def test_an_option_with_one_value_takes_no_second_one():
    with pytest.raises(click.UsageError, match=r"unexpected extra argument \(3\)"):
        parsed("--epochs", "2", "3")
    with pytest.raises(click.UsageError, match="requires an argument"):
        parsed("--out", "there", "--depth")


def test_every_number_of_a_recipe_is_an_option_with_its_help():
    options = {each.name: each for each in study_command.params}
    words = explanations(Recipe)
    assert set(words) == {*NUMBERS, "name"}
    for name in NUMBERS:
        assert words[name][1:].lower() in options[name].help.lower()
        assert "laptop" in options[name].help


def test_numbers_replace_those_of_the_recipe():
    given = {
        "epochs": "7", "batch_size": "5", "lrs": "0.5", "momentum": "0.5", "weight_decay": "0.25",
        "drops": "3", "checkpoints": "7", "train_images": "9", "images": "8",
        "analysis_batch": "6", "spectrum_images": "4", "top": "3", "steps": "11",
        "trace_rtol": "0.125", "points": "13", "span": "0.75", "width": "2", "seeds": "4",
    }  # fmt: skip
    assert {*given, "augment"} == set(NUMBERS)
    options = [part for name, value in given.items() for part in (in_option(name), value)]
    recipe = recipe_of(parsed("--recipe", "paper", *options, "--no-augment"))
    for name, value in given.items():
        found = getattr(recipe, name)
        assert found == ((float(value),) if isinstance(found, tuple) else float(value)), name
    assert recipe.augment is False
    assert recipe_of(parsed("--recipe", "paper")) == RECIPES["paper"]
    assert recipe_of(parsed()) == RECIPES["laptop"]


def in_option(name):
    return "--" + name.replace("_", "-")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--variants", "no-bn-stage4"),
            "variant 'no-bn-stage4' does not exist; use resnet,",
        ),
        (("--depth", "21"), "depth=21 is not 6 m + 2; use 8, 14, 20"),
        (("--images", "61"), "--images 61 is above the 60 images of the training"),
        (("--spectrum-images", "61"), "--spectrum-images 61 is above the 60 images"),
        (("--train-images", "70"), "--train-images 70 is above the 60 training images"),
        (("--checkpoints", "0", "2"), "--checkpoints must be"),
        (("--lrs", "0"), "--lrs must be a finite positive number"),
        (("--edge-of-stability", "0"), "--edge-of-stability must be a finite positive number"),
        (("--edge-of-stability", "1", "1"), "--edge-of-stability must be rates that differ in six"),
        (("--points", "1"), "--points must be"),
        (("--time-limit", "0"), "--time-limit must be a positive number, got 0"),
        (("--device", "cuda:99"), "--device cuda:99 cannot be used ("),
        (("--data", "nowhere"), "data: nowhere is not a folder; give a folder of images"),
    ],
)
def test_bad_input_is_one_line_before_any_work(tmp_path, capsys, data, options, words):
    code, lines = run(capsys, "--data", data, *SMALL, "--out", str(tmp_path / "out"), *options)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: {words}")
    assert not (tmp_path / "out").exists()


def test_a_device_that_cannot_be_used_is_left_out():
    with pytest.raises(ValueError, match=r"--device cuda:99 cannot be used \(.*\); leave it out"):
        study_work.device_of("cuda:99")
    assert study_work.device_of(None).type in ("cpu", "cuda")
    assert study_work.device_of("cpu").type == "cpu"


def test_data_are_needed_and_have_two_classes(tmp_path, capsys):
    words = "error: --data is missing; give a folder of images, or digits"
    assert run(capsys) == (2, [words])
    one = str(images(tmp_path / "one", classes=1))
    code, lines = run(capsys, "--data", one, *SMALL, "--out", str(tmp_path / "out"))
    assert code == 2
    assert "all 60 training images" in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_study_is_refused_but_a_study_can_be_extended(
    tmp_path, capsys, data, delivered
):
    out = tmp_path / "out"
    whole = ("--data", data, *SMALL, "--out", str(out))
    assert run(capsys, *whole)[0] == 0
    code, lines = run(capsys, *whole, "--points", "7")
    assert code == 2
    assert lines == [
        f"error: --out: {out} holds a study with other settings: points is 15 there and 7 now; "
        f"choose another folder, or give the settings of that study"
    ]
    code, lines = run(capsys, *whole, "--seeds", "2", "--variants", "no-bn", "no-res")
    assert code == 0
    assert len([line for line in lines if ": train" in line]) == 3
    assert len(delivered) == 2
    assert len(delivered[-1].results().trainings) == 4
    (tmp_path / "file").write_text("")
    code, lines = run(capsys, *whole[:-1], str(tmp_path))
    assert code == 2
    assert "is not empty and holds no study, but " in lines[0]


def test_the_limit_of_time_ends_with_code_0_and_a_report(tmp_path, capsys, data, delivered):
    whole = ("--data", data, *SMALL, "--out", str(tmp_path / "out"))
    code, lines = run(capsys, *whole, "--time-limit", "1e-6")
    assert code == 0
    assert lines == [
        f"stopped by the time limit of 9e-07 s; the same command goes on; results so far are in "
        f"{tmp_path / 'out'}"
    ]
    assert len(delivered) == 1
    assert run(capsys, *whole)[0] == 0
    assert len(delivered[1].results().landscapes) == 2


def interrupted(task, asked, folder, progress):
    raise KeyboardInterrupt


def full(task, asked, folder, progress):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights")


def test_an_interrupt_and_a_full_disk_say_how_to_go_on(
    tmp_path, capsys, data, delivered, monkeypatch
):
    whole = ("--data", data, *SMALL, "--out", str(tmp_path / "out"))
    rest = f"the same command goes on; results so far are in {tmp_path / 'out'}"
    for happens, expected, words in (
        (interrupted, 130, "interrupted; "),
        (full, 1, "weights: No space left on device; make room, and "),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(carry_out, "do", happens)
            code, lines = run(capsys, *whole)
        assert code == expected
        assert lines[-1] == f"error: {words}{rest}"
    assert run(capsys, *whole)[0] == 0
    assert len(delivered) == 1


def test_an_analysis_that_failed_is_named_at_the_end(
    tmp_path, capsys, data, delivered, monkeypatch
):
    monkeypatch.setattr(study_work, "carry_out", lambda *study: ["cannot analyse it: nan", "b"])
    code, lines = run(capsys, "--data", data, *SMALL, "--out", str(tmp_path / "out"))
    assert code == 1
    assert lines == ["error: 2 of the analyses failed, the first one: cannot analyse it: nan"]
    assert len(delivered) == 1


def test_the_log_names_each_task(tmp_path, capsys, data, delivered):
    _, lines = run(capsys, "--data", data, *SMALL, "--out", str(tmp_path / "out"))
    assert lines == [
        "study 0 of 5: train resnet8-no-bn, seed 0, rate 0.1",
        "study 1 of 5: analyse resnet8-no-bn, seed 0, epoch 0, eval statistics",
        "study 2 of 5: analyse resnet8-no-bn, seed 0, epoch 1, eval statistics",
        "study 3 of 5: landscape resnet8-no-bn, seed 0, epoch 0, eval statistics",
        "study 4 of 5: landscape resnet8-no-bn, seed 0, epoch 1, eval statistics",
    ]
    settings = json.loads((tmp_path / "out" / SETTINGS).read_text())
    assert settings["begun"]["device"] == "cpu"
    assert settings["recipe"]["width"] == 2
    assert settings["data"]["name"] == "CIFAR-10"


def test_ranks_print_once_and_take_tasks_of_one_folder(
    tmp_path, capsys, data, delivered, monkeypatch
):
    """Ranks without a process group: each is a process that finds what the others have done."""
    whole = ("--data", data, *SMALL, "--out", str(tmp_path / "out"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, *whole) == (0, [])
    assert delivered == []
    done = contents(Folder(tmp_path / "out", {}))
    monkeypatch.setenv("RANK", "0")
    assert run(capsys, *whole) == (0, [])
    assert len(delivered) == 1
    assert contents(delivered[0]) == done


def test_messages_name_options():
    assert in_options("checkpoints must ascend") == "--checkpoints must ascend"
    assert in_options("train_images=9 is above") == "--train-images 9 is above"
    assert in_options("out: here is") == "--out: here is"
    assert in_options("the images=") == "the --images "
    assert in_options("timeout: x") == "timeout: x"


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        cli.main(["study", "--help"])
    text = capsys.readouterr().out
    for words in (*VARIANTS, "report.html", "study.json", "Examples:", "goes on", "--list"):
        assert words in text
