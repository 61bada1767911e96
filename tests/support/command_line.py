"""A working folder with a module of the user's, for tests of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Iterator[Path]:
    """The body of a fixture: inside ``folder``, whose module ``mine`` has this text."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (folder / "mine.py").write_text(text)
    yield folder
    sys.modules.pop("mine", None)


def torchrun(folder: Path, *command: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """What torchrun gives for a script, or for ``-m`` and a module, with one thread per rank."""
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*start, "--nproc-per-node", str(ranks), *command],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
