"""The examples in docstrings and in the README run as written."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from pathlib import Path

import pytest

import fasthessian

ROOT = Path(fasthessian.__file__).parent
NAMES = [m.name for m in pkgutil.walk_packages([str(ROOT)], "fasthessian.")]
NAMES = [name for name in NAMES if not name.endswith(("_native", "__main__"))]
EXTRAS = {"fasthessian.commands": "click", "fasthessian.console": "rich"}


@pytest.mark.parametrize("name", NAMES)
def test_docstring_examples(name):
    pytest.importorskip(EXTRAS.get(name, "torch"))
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_public_functions_have_an_example():
    for name in (
        "Hessian",
        "SymmetricOperator",
        "eigsh",
        "trace",
        "density",
        "landscape",
        "doctor",
    ):
        assert ">>>" in getattr(fasthessian, name).__doc__, name


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    names = {"__name__": "readme"}  # later blocks go on with the names of earlier ones
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
