"""The tests are arranged like the package: shared helpers in tests/support, files of one idea."""

import ast

import pytest

from tests.support.house import ROOT, modules

TESTS = ROOT / "tests"
# run in processes of their own; bits by hand, before and after a change that keeps all results
PROGRAMS = {f"tests.support.{name}" for name in ("bits", "script_for_pyhessian", "triton_aot")}
ROOMS = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}


def imported_by(path):
    """The modules that a file imports, with a dot and the names taken from each."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((module, alias.name) for alias in node.names)


def strange(path):
    """Imports of a file under tests/ that are not ``from tests.support.module import name``."""
    for module, name in imported_by(path):
        if module.split(".")[0] in ("tests", ""):
            known = TESTS / "support" / f"{module.rpartition('.')[2]}.py"
            if not (name and module.startswith("tests.support.") and known.exists()):
                yield f"{module} {name}".strip()


@pytest.mark.parametrize(
    "path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS))
)
def test_a_test_file_imports_helpers_only_and_has_at_most_400_lines(path):
    assert list(strange(path)) == []
    assert len(path.read_text().splitlines()) <= 400


def test_strange_imports_are_found(tmp_path):
    for line in ("from tests.krylov.test_lanczos import grown", "from tests.support import models",
                 "from .models import dense", "import tests.support.models"):  # fmt: skip
        path = tmp_path / "test_x.py"
        path.write_text(line + "\n")
        assert list(strange(path)), line
    path.write_text("from tests.support.models import dense\nimport torch\n")
    assert list(strange(path)) == []


def test_the_rooms_of_the_tests_are_those_of_the_package():
    package = {
        name.partition(".")[0] for name, path in modules().items() if path.stem == "__init__"
    }
    assert (package - {""}) | {"house", "support"} == ROOMS


def test_helpers_that_nobody_uses_are_gone():
    files = [path for name in ("tests", "bench") for path in (ROOT / name).rglob("*.py")]
    found = {pair for path in files for pair in imported_by(path)}
    used = {name for module, imported in found for name in (module, f"{module}.{imported}")}
    helpers = {f"tests.support.{path.stem}" for path in (TESTS / "support").glob("*.py")}
    assert helpers - used - {"tests.support.__init__"} == PROGRAMS
