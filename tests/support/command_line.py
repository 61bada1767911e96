"""A working folder with a module of the user's, for tests of the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Iterator[Path]:
    """The body of a fixture: inside ``folder``, whose module ``mine`` has this text."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (folder / "mine.py").write_text(text)
    yield folder
    sys.modules.pop("mine", None)
