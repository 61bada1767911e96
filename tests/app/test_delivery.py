"""The numbers of a finished run reach the user, even if its report fails."""

import dataclasses
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from fasthessian.app import analysis, delivery
from fasthessian.app import main as cli
from fasthessian.app.options import AnalysisOptions
from fasthessian.app.problems import Problem
from fasthessian.app.report import figures, folder, result, summary
from fasthessian.results import plots
from fasthessian.results.records import BlockSpectra
from tests.support.command_line import working_folder

pytestmark = pytest.mark.slow

for extra in ("click", "rich", "matplotlib"):
    pytest.importorskip(extra)
ROOT = Path(cli.__file__).parents[2]

MINE = """
import os, shutil, torch

def problem():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    x, y = torch.randn(20, 4), torch.randint(2, (20,))
    return model, torch.nn.CrossEntropyLoss(), (x, y)

def taken():  # what another run does meanwhile
    os.makedirs("report")
    with open("report/result.json", "w") as stream:
        stream.write("of another run")
    return problem()

def gone():
    shutil.rmtree("report")
    return problem()

def never():
    raise SystemExit("the work has begun")
"""
SMALL = ("--top", "1", "--bottom", "0", "--steps", "4", "--points", "3", "--trace-rtol", "0.5")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with the user's module ``mine``, and a folder for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield from working_folder(tmp_path, monkeypatch, MINE)


def run(capsys, *args):
    """Exit code, stdout and the last line of stderr of one command."""
    with pytest.raises(SystemExit) as info:
        cli.main(list(args))
    out, err = capsys.readouterr()
    return info.value.code, out, err.splitlines()[-1] if err else ""


def read(path):
    """The content of a result.json, as it is read back strictly."""
    return result.read(path).to_json()


def advised(line):
    """The file that holds the numbers and the command that the message gives, ready to run."""
    words = shlex.split(line.partition("draw them with: ")[2])
    assert words[:2] == ["fasthessian", "plot"], line
    return words[2], [*words[1:-1], "again"]


def test_numbers_are_written_before_anything_is_drawn(here, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("fasthessian.results.plots.plot_estimate", lambda *args: 1 / 0)
        args = ("--json", "--out", "report")
        code, out, line = run(capsys, "analyze", "mine:problem", *SMALL, *args)
    assert code == 1 and "trace.png cannot be drawn (ZeroDivisionError: division by zero)" in line
    path, again = advised(line)
    assert path == "report/result.json" and os.listdir("report") == ["result.json"]
    assert json.loads(out) == read(path)
    assert run(capsys, *again)[0] == 0 and "trace.png" in os.listdir("again")


def test_a_report_that_cannot_be_made_costs_no_numbers(here, capsys, monkeypatch):
    monkeypatch.setattr(folder, "html", lambda *args: "x".missing)
    code, out, line = run(capsys, "analyze", "mine:problem", *SMALL)
    assert code == 1 and out == "" and "'str' object has no attribute 'missing'" in line
    assert read("report/result.json")["top"]["values"]


def test_a_landscape_that_fails_leaves_the_rest_of_the_report(here, capsys, monkeypatch):
    monkeypatch.setattr(analysis, "landscape", lambda *args, **options: 1 / 0)
    code, _, line = run(capsys, "analyze", "mine:problem", *SMALL)
    assert code == 1 and "error: loss landscape failed: ZeroDivisionError: division by zero" in line
    content = read("report/result.json")
    assert content["landscape"] is None and content["top"]["values"]
    assert "loss landscape failed" in content["notes"][-1]
    assert "loss landscape failed" in Path("report/report.html").read_text()
    assert "density.png" in os.listdir("report") and "landscape.png" not in os.listdir("report")


def test_an_earlier_report_does_not_remain_beside_new_numbers(here, capsys, monkeypatch):
    assert run(capsys, "analyze", "mine:problem", *SMALL)[0] == 0
    Path("report/notes.txt").write_text("mine")
    monkeypatch.setattr(folder, "html", lambda *args: 1 / 0)
    assert run(capsys, "analyze", "mine:problem", *SMALL, "--overwrite")[0] == 1
    assert sorted(os.listdir("report")) == ["notes.txt", "result.json"]


def test_a_folder_that_another_run_fills_meanwhile(here, capsys):
    code, _, line = run(capsys, "analyze", "mine:taken", *SMALL)
    path, again = advised(line)
    assert code == 1 and "report is not empty; use --overwrite or another --out" in line
    assert Path("report/result.json").read_text() == "of another run"
    assert path.startswith(str(here / "tmp")) and read(path)["top"]["values"]
    assert run(capsys, *again)[0] == 0


def test_a_folder_that_disappears_meanwhile_is_made_again(here, capsys):
    os.makedirs("report")
    assert run(capsys, "analyze", "mine:gone", *SMALL)[0] == 0
    assert read("report/result.json")["top"]["values"]


def test_a_disk_that_fills_meanwhile(here, capsys, monkeypatch):
    def full(path, payload):
        if path.name != "probe":
            raise OSError(28, "No space left on device")
        return len(payload)

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    code, out, line = run(capsys, "analyze", "mine:problem", *SMALL)
    assert code == 1 and out == "" and "No space left on device" in line
    assert read(advised(line)[0])["top"]["values"]
    code, out, line = run(capsys, "analyze", "mine:problem", *SMALL, "--json", "--out", "report")
    assert code == 1 and json.loads(out)["top"] and "JSON on standard output" in line
    assert "report" not in os.listdir()
    Path("result.json").write_text(out)
    monkeypatch.undo()
    os.chdir(here)
    assert run(capsys, *advised(line)[1])[0] == 0

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    monkeypatch.setattr("tempfile.mkstemp", full)  # no place for temporary files either
    monkeypatch.setattr(sys, "path", [str(here), *sys.path])
    code, out, line = run(capsys, "analyze", "mine:problem", *SMALL)
    assert code == 1 and json.loads(out)["top"] and "JSON on standard output" in line


def test_an_interrupt_while_drawing(here, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(delivery, "files", interrupt)
    code, _, line = run(capsys, "analyze", "mine:problem", *SMALL)
    assert code == 130 and "(interrupted); the numbers are in report/result.json" in line


def test_standard_output_that_takes_nothing(here):
    command = [sys.executable, "-m", "fasthessian", "analyze", "mine:problem", *SMALL, "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(here / "tmp")}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=env)
    os.close(writer)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Broken pipe" in line, done.stderr
    assert read(advised(line)[0])["top"]["values"]
    assert os.listdir("tmp") == [os.path.basename(advised(line)[0])]


def test_a_disk_without_free_space_is_found_before_the_work(here):
    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    command = [sys.executable, "-m", "fasthessian", "analyze", "mine:never"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, preexec_fn=small)
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr.count("\n") == 1 and "report cannot be written: File too large" in done.stderr
    )
    assert sorted(os.listdir()) == ["mine.py", "tmp"]


def test_a_folder_with_a_result_is_found_before_the_work(here, capsys):
    os.makedirs("report")
    Path("report/result.json").write_text("of another run")
    code, _, line = run(capsys, "analyze", "mine:never")
    assert code == 2 and "report is not empty; use --overwrite or another --out" in line
    os.remove("report/result.json")
    os.makedirs("report/blocks.png")
    code, _, line = run(capsys, "analyze", "mine:never", "--overwrite")
    assert code == 2 and "blocks.png is a folder" in line


def test_a_folder_whose_parent_takes_no_files_can_be_filled(tmp_path, monkeypatch):
    out, real = tmp_path / "disk", tempfile.mkdtemp
    out.mkdir()

    def only_inside(*args, dir=None, **options):  # as a disk mounted on the folder
        if Path(dir) == tmp_path:
            raise PermissionError(13, "Permission denied")
        return real(*args, dir=dir, **options)

    monkeypatch.setattr("tempfile.mkdtemp", only_inside)
    folder.check_folder(out)
    folder.write(out, {"result.json": b"1", "trace.png": b"2"})
    assert sorted(os.listdir(out)) == ["result.json", "trace.png"]


NAMES = {
    "dollars": "cost_$_in_$",
    "half a formula": "$\\frac{1}{",
    "a formula": "$x^2$",
    "markup": "<script>alert('1')</script>&amp;",
    "lines": "one\ntwo\r\x00\x1b[31m",
    "letters": "größe_漢字_\U0001f600",
    "half a letter": "name\ud800",
    "long": "x" * 20_000,
    "braces": "{0}%s%(a)s\\n",
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_are_text_in_the_figures_and_in_the_report(tmp_path, kind):
    torch.manual_seed(0)
    name = NAMES[kind]
    layers = nn.ModuleDict({name: nn.Linear(3, 2)})
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model.register_forward_hook(lambda module, args, out: layers[name](out))
    model.add_module("d", layers)
    model.forward = lambda x: nn.Sequential.forward(model[:2], x)
    problem = Problem(name, model, nn.CrossEntropyLoss(),
                      (torch.randn(8, 3), torch.arange(8) % 2), {"about": name})  # fmt: skip
    options = AnalysisOptions(top=1, bottom=0, steps=4, points=3, blocks="layer", landscape=False)
    found = analysis.analyze(problem, options, lambda title, at_most=None: lambda done, total: None)
    assert found.blocks is not None and f"d.{name}" in found.blocks.names
    content = result.result_of(problem, options, found, {"total": 1.0})
    folder.write(tmp_path / "r", folder.files(content))
    back = read(tmp_path / "r" / "result.json")
    assert back["blocks"]["names"] == list(found.blocks.names)
    assert "blocks.png" in figures.figures(result.read(tmp_path / "r" / "result.json"))
    html = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "\x1b" not in dict(summary.summary(content))["blocks"]
    assert dict(summary.summary(content))["blocks"].count("\n") == 1


def test_a_name_is_drawn_as_it_is_written():
    found = BlockSpectra(("$a$ b_1", "x" * 99, "a\nb"), *(torch.ones(3).double(),) * 5)
    ax = plots.plot_blocks(found)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["$a$ b_1", f"{'x' * 24}…{'x' * 24}", "a\\nb"]
    assert not any(label.get_parse_math() for label in ax.get_yticklabels())


def test_the_sharpest_of_very_many_blocks_are_drawn():
    values = torch.arange(3000.0).double() - 1500
    found = BlockSpectra(tuple(f"block {i}" for i in range(3000)), *(values.abs(),) * 5)
    found = dataclasses.replace(found, values=values)
    ax = plots.plot_blocks(found)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(labels) == 100 and labels[0] == "block 0" and labels[-1] == "block 2999"
    assert "the sharpest 100 of 3000" in ax.get_title()
    assert figures.png(ax.figure).startswith(b"\x89PNG")
