"""The structure of the package: imports go down, files are small, public names are documented."""

import subprocess
import sys
from pathlib import Path

import pytest

import fasthessian
from tests.support.house import HEIGHT, circles, imports, room

ROOT = Path(fasthessian.__file__).parent
LAZY = {"matplotlib", "click", "rich", "sklearn", "scipy", "triton", "pandas"}
IMPORTS = imports()


@pytest.mark.parametrize("name", [name for name in IMPORTS if name])
def test_imports_go_down(name):
    own = HEIGHT[room(name)]
    upwards = [other for other in IMPORTS[name] if HEIGHT[room(other)] > own]
    assert not upwards, f"{name} imports {upwards}, which are on a higher floor"


def test_no_imports_go_in_a_circle():
    assert circles(IMPORTS) == []


def modules():
    return sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_has_at_most_330_lines(path):
    assert len(path.read_text().splitlines()) <= 330


def test_every_room_has_a_floor():
    assert {room(name) for name in IMPORTS} == set(HEIGHT)
    assert [name for name in IMPORTS if name and not room(name)] == []


def test_import_loads_nothing_heavy():
    code = f"import sys, fasthessian; print(sorted({LAZY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_resolve_and_are_documented():
    for name in fasthessian.__all__:
        thing = getattr(fasthessian, name)
        assert name == "__version__" or thing.__doc__, name
