"""The house keeps its shape: imports go down, files stay small, names stay public."""

import subprocess
import sys
from pathlib import Path

import pytest

import fasthessian
from tests.support import house

ROOT = Path(fasthessian.__file__).parent
LAZY = {"matplotlib", "click", "rich", "sklearn", "scipy", "triton", "pandas"}
ARROWS = house.imports()


@pytest.mark.parametrize("name", [name for name in ARROWS if name])
def test_imports_go_down(name):
    own = house.HEIGHT[house.room(name)]
    upwards = [other for other in ARROWS[name] if house.HEIGHT[house.room(other)] > own]
    assert not upwards, f"{name} imports {upwards}, which lie above it"


def test_no_module_knows_itself_in_a_circle():
    assert house.circles(ARROWS) == []


def modules():
    return sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_fits_in_the_head(path):
    assert len(path.read_text().splitlines()) <= 330


def test_every_room_has_a_floor():
    assert {house.room(name) for name in ARROWS} == set(house.HEIGHT)
    assert [name for name in ARROWS if name and not house.room(name)] == []


def test_import_loads_nothing_heavy():
    code = f"import sys, fasthessian; print(sorted({LAZY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_resolve_and_are_documented():
    for name in fasthessian.__all__:
        thing = getattr(fasthessian, name)
        assert name == "__version__" or thing.__doc__, name
