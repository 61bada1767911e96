"""An analysis that was stopped goes on with --resume, and gives the numbers of one that was not."""

import json
import os
import re

import pytest

from fasthessian.app import main as cli
from tests.support.command_line import working_folder

for extra in ("click", "rich", "matplotlib", "safetensors"):
    pytest.importorskip(extra)

MINE = """
import time
import torch

def problem():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    x, y = torch.randn(20, 4), torch.randint(2, (20,))

    def criterion(outputs, targets):
        time.sleep(SECONDS)
        return torch.nn.functional.cross_entropy(outputs, targets)

    return model, criterion, (x, y)

SECONDS = 0.0
"""
SMALL = ("--engine", "recompute", "--json", "--steps", "9", "--points", "5", "--top", "2")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with the user's module ``mine``."""
    yield from working_folder(tmp_path, monkeypatch, MINE)


def analyze(capsys, *options):
    """Exit code, result.json or None, stderr."""
    with pytest.raises(SystemExit) as info:
        cli.main(["analyze", "mine:problem", *SMALL, *options])
    out, err = capsys.readouterr()
    return info.value.code, json.loads(out) if out else None, err


@pytest.mark.parametrize("parts", [(), ("--no-trace", "--no-landscape")], ids=["one run", "runs"])
def test_a_stopped_analysis_goes_on(here, capsys, parts):
    code, expected, _ = analyze(capsys, *parts)
    assert code == 0
    import mine

    mine.SECONDS = 0.03
    code, found, err = analyze(capsys, *parts, "--checkpoint", "run", "--time-limit", "0.6")
    assert code == 0 and found is None
    advice = re.search("go on with the same options and (--resume run)\n", err).group(1)
    mine.SECONDS = 0.0
    saved = sorted(os.listdir("run"))
    assert set(saved) <= {"spectrum", "landscape", "top", "bottom", "density"} and saved
    code, found, _ = analyze(capsys, *parts, *advice.split())
    assert code == 0 and ("landscape" in os.listdir("run")) == (parts == ())
    for content in (expected, found):
        del content["timing"]
    assert found == expected
    code, found, _ = analyze(capsys, *parts, "--resume", "run")  # it has ended: read at once
    del found["timing"]
    assert code == 0 and found == expected


def refused(capsys, *options):
    code, found, err = analyze(capsys, *options)
    assert code == 2 and found is None and err.count("\n") == 1
    return err


def test_the_advice_about_checkpoints_works(here, capsys):
    assert "--resume run is no folder; begin with --checkpoint run" in refused(
        capsys, "--resume", "run"
    )
    assert analyze(capsys, "--checkpoint", "run")[0] == 0
    assert "exists; go on with --resume run" in refused(capsys, "--checkpoint", "run")
    assert analyze(capsys, "--resume", "run")[0] == 0
    err = refused(capsys, "--resume", "run", "--seed", "3")
    assert "begun with seed=0, now it is 3; give the options of the first call" in err
    assert "give one" in refused(capsys, "--checkpoint", "a", "--resume", "run")
    assert "give --checkpoint DIR" in refused(capsys, "--time-limit", "9")
    assert analyze(capsys, "--time-limit", "900", "--checkpoint", "DIR")[0] == 0
    assert "must be a positive number" in refused(capsys, "--time-limit", "0", "--resume", "run")


def test_a_failed_analysis_leaves_no_folder(here, capsys):
    assert "parameters of the model" in refused(capsys, "--top", "99", "--checkpoint", "run")
    assert not (here / "run").exists()
