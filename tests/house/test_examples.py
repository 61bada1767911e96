"""The examples in docstrings, the code in the README and the example scripts run."""

import contextlib
import doctest
import importlib
import inspect
import io
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fasthessian
from fasthessian import SymmetricOperator

ROOT = Path(fasthessian.__file__).parent
NAMES = [m.name for m in pkgutil.walk_packages([str(ROOT)], "fasthessian.")]
NAMES = [name for name in NAMES if not name.endswith(("_native", "__main__"))]
EXTRAS = {
    "fasthessian.app.commands": "click", "fasthessian.app.plan": "click",
    "fasthessian.app.plan_report": "rich", "fasthessian.app.progress": "rich",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_docstring_examples(name):
    pytest.importorskip(EXTRAS.get(name, "torch"))
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_public_functions_have_an_example():
    documented = [
        name
        for name in fasthessian.__all__
        if inspect.isfunction(getattr(fasthessian, name))
        or (
            (isinstance(getattr(fasthessian, name), type) and name[0].isupper())
            and issubclass(getattr(fasthessian, name), SymmetricOperator)
        )
    ]
    missing = [name for name in documented if ">>>" not in getattr(fasthessian, name).__doc__]
    assert len(documented) >= 11 and not missing


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    names = {"__name__": "readme"}  # later blocks use names of earlier blocks
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)


EXAMPLES = sorted((ROOT.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
@pytest.mark.slow
def test_example_scripts_run(path, tmp_path):
    if path.stem == "language_model":
        pytest.importorskip("transformers")
    command = [sys.executable, "-W", "error", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr[-500:]
    assert run.stdout
    assert not list(tmp_path.iterdir())


def test_there_are_examples():
    assert len(EXAMPLES) == 5
