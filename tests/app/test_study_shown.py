"""What ``fasthessian study`` shows: progress, its list of needs and costs, and its report."""

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

from fasthessian.app import main as cli
from fasthessian.app import study_delivery, study_list, study_progress
from fasthessian.app.study_list import listed
from fasthessian.app.study_progress import Overview
from fasthessian.study import analysis
from fasthessian.study.descents import descents
from fasthessian.study.figures import KINDS, missing
from fasthessian.study.networks import VARIANTS, Network, Run
from fasthessian.study.recipes import RECIPES
from fasthessian.study.records import TRAINED
from fasthessian.study.schedule import Images, descent_gradient, gradient_cost
from fasthessian.study.sheets import VERDICTS
from fasthessian.study.store import Folder
from fasthessian.study.tables import tables
from tests.support.small_study import images, training

for extra in ("click", "rich", "matplotlib", "jinja2", "safetensors"):
    pytest.importorskip(extra)
RECIPE = RECIPES["laptop"].changed(epochs=2, lrs=(0.1,), checkpoints=(2,), seeds=1, width=2)


def overview(monkeypatch, *, terminal):
    """An overview, what it printed, and a clock that the caller sets."""
    clock = [0.0]
    monkeypatch.setattr(study_progress.time, "monotonic", lambda: clock[0])
    text = io.StringIO()
    return Overview(Console(file=text, force_terminal=terminal, width=100)), text, clock


def test_a_log_has_a_line_per_task_and_one_every_fifteen_seconds(monkeypatch):
    shown, text, clock = overview(monkeypatch, terminal=False)
    with shown:
        shown.begin("train it", 3, 10)
        shown.begin("train it", 3, 10)
        for clock[0], done, left in ((14.0, 1, 50.0), (16.0, 2, 7500.0), (17.0, 3, 1.0)):
            shown.step(done, 4, left)
        clock[0] = 40.0
        shown.step(5, None, None)
        shown.say("it diverged [100 %]")
    assert text.getvalue().splitlines() == [
        "study 3 of 10: train it",
        "study 3 of 10: train it 50%, about 2 h 5 min left",
        "study 3 of 10: train it",
        "it diverged [100 %]",
    ]


def test_a_terminal_has_a_bar_for_the_study_and_one_for_the_task(monkeypatch):
    shown, text, _ = overview(monkeypatch, terminal=True)
    with shown:
        shown.begin("train [it]", 3, 10)
        shown.step(1, 4, 150.0)
    for words in ("study", "3/10", "about 2 min 30 s left", "train [it]", "1/4"):
        assert words in text.getvalue()


def test_the_list_counts_what_is_done_and_takes_times_from_it(tmp_path, monkeypatch):
    networks = [Network(8), Network(8, "no-bn"), Network(14)]
    folder = Folder(tmp_path / "study", {"recipe": {}})
    times = {8: (2.0, 1.0), 14: (6.0, 1.0)}  # cost and seconds of a gradient
    monkeypatch.setattr(study_list, "timed", lambda network, *rest: times[network.depth])
    rows = listed(networks, RECIPE, Images(60, 30), folder, None)
    assert [(row.step, row.depth, row.tasks, row.done) for row in rows] == [
        (1, 8, 2, 0), (1, 14, 1, 0), (2, 8, 3, 0), (2, 14, 2, 0), (3, 8, 3, 0), (3, 14, 2, 0),
    ]  # fmt: skip
    # two trainings of two epochs, with a test of 30 images that costs as much as 10 of 60
    assert rows[0].passes == pytest.approx(2 * 2 * (1 + 10 / 60))
    for row in rows:  # 8 of cost took 2 s
        cost = row.passes * 60 * gradient_cost(Network(row.depth), RECIPE)
        assert row.seconds == pytest.approx(cost * 2 / 8)
    run = Run(networks[0], 0, 0.1)
    folder.begin()
    with folder.hold(run):
        folder.save(folder.run(run) / "training.json", training(run, seconds=7.0))
    wanted = descents([0.1], 60)
    *rows, row = listed(networks, RECIPE, Images(60, 30), folder, None, wanted)
    assert (row.step, row.depth, row.tasks, row.done) == (4, None, 2, 0)
    least = 400 + 80 + 21 * 256 / 2  # steps, and batches whose sharpness is measured
    assert least < row.passes < 4 * least
    speed = rows[2].seconds / (rows[2].passes * gradient_cost(networks[0], RECIPE))
    assert row.seconds == pytest.approx(row.passes * descent_gradient() * speed)
    after = listed(networks, RECIPE, Images(60, 30), folder, None)
    assert (after[0].tasks, after[0].done) == (2, 1)
    assert after[0].seconds == pytest.approx(7.0)
    assert not (tmp_path / "study" / "figures").exists()


def run(*options):
    with pytest.raises(SystemExit) as info:
        cli.main(["study", *options])
    assert info.value.code == 0


def test_the_list_needs_no_data_and_makes_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_list, "timed", lambda *network: (1.0, 1e-3))
    run("--list", "--depth", "20", "32", "--seeds", "1")
    text = capsys.readouterr().out
    for words in ("testing-curves", "1 train", "3 landscape", "left for one process"):
        assert words in text
    run("--list", "--json", "--recipe", "paper", "--depth", "20", "--variants", "resnet")
    found = json.loads(capsys.readouterr().out)
    assert [each["figure"] for each in found["figures"]] == [kind.name for kind in KINDS]
    paper = RECIPES["paper"]
    assert found["figures"][0]["lacks"] == "no training has ended"
    assert found["work"][0]["tasks"] == len(paper.lrs) + paper.seeds - 1
    assert found["work"][1]["tasks"] == paper.seeds * len(paper.checkpoints) * 2
    assert list(tmp_path.iterdir()) == []


def test_the_time_of_a_gradient():
    cost, seconds = study_list.timed(Network(8), RECIPE, "cpu")
    assert cost > 0
    assert 0 < seconds < 60


def measured_once(monkeypatch):
    """Measure the first network before its last epoch; the others get copies of that."""
    measure, copied = analysis.measure, {}

    def shortened(run, epoch, mode, model, *rest):
        variant = run.network.variant
        if epoch == 2 or variant == "resnet":
            found, vectors = measure(run, epoch, mode, model, *rest)
            if variant == "resnet":
                copied[epoch, mode] = found
            return found, vectors
        size = sum(p.numel() for p in model.parameters())
        found = dataclasses.replace(copied[epoch, mode], variant=variant, lr=run.lr)
        return found, torch.eye(2, size)

    monkeypatch.setattr(analysis, "VECTORS", 2)
    monkeypatch.setattr(analysis, "measure", shortened)


@pytest.mark.slow
def test_a_miniature_of_the_whole_study(tmp_path, capsys, monkeypatch):
    """Every variant trains, every kind of figure and table is made, and nothing is repeated."""
    measured_once(monkeypatch)
    data, out = images(tmp_path / "data", classes=2), tmp_path / "study"
    options = (
        "--data", str(data), "--depth", "8", "--variants", *VARIANTS, "--width", "2",
        "--epochs", "2", "--checkpoints", "0", "1", "2", "--batch-size", "10", "--lrs", "0.1",
        "--drops", "2", "--seeds", "1", "--images", "20", "--spectrum-images", "10",
        "--analysis-batch", "20", "--steps", "4", "--points", "2", "--out", str(out),
        "--edge-of-stability", "0.002", "0.001",
    )  # fmt: skip
    run(*options)
    shown = capsys.readouterr().err
    assert f"report: {out / 'report.html'}" in shown
    found = Folder(out, {}).results()
    assert [each.run.network.variant for each in found.trainings] == list(VARIANTS)
    assert {each.status for each in found.trainings} == {TRAINED}
    assert len(found.measurements) == len(found.landscapes) == 3 * (2 * len(VARIANTS) - 1)
    assert missing(found) == {}
    assert [(each.rate, each.batch) for each in found.descents] == [
        (2e-3, 60),
        (1e-3, 60),
        (2e-3, 30),
    ]
    names = {path.name for path in (out / "figures").iterdir()}
    for kind in KINDS:
        for suffix in (".png", ".svg"):
            assert any(name.startswith(kind.name) and name.endswith(suffix) for name in names)
    assert {path.stem for path in (out / "tables").iterdir()} == {
        "claims",
        *(table.name for table in tables(found)),
    }
    claims_shown = (out / "tables" / "claims.md").read_text()
    assert "not decided" in claims_shown or "not measured" in claims_shown
    with monkeypatch.context() as patch:
        for name in ("measure", "surface"):
            patch.delattr(analysis, name)
        patch.setattr(study_delivery, "files", lambda *found: {})
        run(*options, "--json")
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["measurements"]) == len(found.measurements)
    assert {each["verdict"] for each in printed["claims"]} <= set(VERDICTS)
