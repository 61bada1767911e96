"""The command line under torchrun: the numbers of one process, printed and written once."""

import json
import os
import re

import pytest
import torch

from fasthessian.app import main as cli
from fasthessian.app.analysis import analyze
from fasthessian.app.options import AnalysisOptions
from fasthessian.app.problems import Settings, load
from fasthessian.app.report import result
from fasthessian.app.report.figures import FIGURES
from tests.support.command_line import torchrun, working_folder

for extra in ("click", "rich", "matplotlib", "sklearn"):
    pytest.importorskip(extra)
pytestmark = pytest.mark.distributed

MINE = """
import os
import torch

def problem():
    print("the user prints")
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    x, y = torch.randn(21, 4), torch.randint(2, (21,))
    return model.double(), torch.nn.CrossEntropyLoss(), [(x[:9].double(), y[:9]), (x[9:].double(), y[9:])]

def nan():
    model, criterion, batches = problem()
    batches[1][0][:] = float("nan")
    return model, criterion, batches

def broken():
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("a bug of the user")
    return problem()
"""  # noqa: E501
SMALL = ("--steps", "6", "--points", "3", "--trace-rtol", "0.5", "--top", "2", "--bottom", "1")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with the user's module ``mine``."""
    yield from working_folder(tmp_path, monkeypatch, MINE)


def analyzed(here, problem, *options):
    return torchrun(here, "-m", "fasthessian", "analyze", f"mine:{problem}", *options)


def test_two_ranks_report_what_one_process_does(here, capsys):
    done = analyzed(here, "problem", "--json", "--out", "two", "--blocks", "layer", *SMALL)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == result.read("two/result.json").to_json()
    assert sorted(os.listdir("two")) == sorted([*FIGURES, "report.html", "result.json"])
    for once in ("the user prints", "spectrum ...", "Hessian spectrum", "report: two/report.html"):
        assert done.stderr.count(once) == 1, done.stderr
    assert found["distribution"] == {
        "ranks": 2,
        "backend": "gloo",
        "division": "whole batches, 2 in all",
        "batches": [1, 1],
        "terms": [9.0, 12.0],
        "sharded": False,
    }
    for words in ("2 with gloo", "9 terms in 1, 12 terms in 1"):
        assert words in done.stderr
    with pytest.raises(SystemExit):
        cli.main(["analyze", "mine:problem", "--json", "--blocks", "layer", *SMALL])
    one = json.loads(capsys.readouterr().out)
    assert one["distribution"] is None
    for part in ("top", "bottom", "trace", "density", "landscape", "blocks", "loss"):
        torch.testing.assert_close(flat(found[part]), flat(one[part]), rtol=1e-9, atol=1e-9)


def flat(part):
    """All numbers of a part of result.json."""
    text = re.sub(r'"residuals": \[[^]]*\]', "", json.dumps(part))  # these are rounding errors
    return torch.tensor([float(x) for x in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", text)])


def test_bad_input_is_one_line_and_exit_code_2_on_all_ranks(here):
    done = analyzed(here, "nan")
    assert done.returncode == 1  # of torchrun
    assert re.findall("error: .*", done.stderr) == [
        "error: rank 1 failed: the loss is nan (batch 0 of data); check the parameters, the inputs "
        "and the targets"
    ]
    assert re.findall(r"exitcode +: (\S+)", done.stderr) == ["2", "2"]
    assert not (here / "report").exists()


@pytest.mark.slow
def test_the_traceback_of_a_bug_on_one_rank_is_shown_with_the_reason(here):
    done = analyzed(here, "broken")
    assert done.stderr.count("error: rank 1 failed: ZeroDivisionError: a bug of the user") == 1
    assert done.stderr.count("\nZeroDivisionError: a bug of the user\n") == 1
    assert done.stderr.count("in broken\n") == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_other_commands_print_on_rank_0_alone(here, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = ["plan", "--params", "1e6", "--ranks", "2"]
    for command in (["doctor"], plan):
        with pytest.raises(SystemExit) as info:
            cli.main(command)
        out, err = capsys.readouterr()
        assert info.value.code == 0 and err == ""
        assert bool(out) == (rank == "0"), command


def test_sharded_needs_ranks(here, capsys):
    with pytest.raises(SystemExit) as info:
        cli.main(["analyze", "mine:problem", "--sharded"])
    assert info.value.code == 2
    assert "start with torchrun --nproc-per-node 2" in capsys.readouterr().err
    # test_division.py follows the advice
    with pytest.raises(ValueError, match="--sharded needs several ranks"):
        analyze(load("mine:problem", Settings()), AnalysisOptions(sharded=True), None)
