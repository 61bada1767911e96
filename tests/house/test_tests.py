"""The tests have the folders of the package, shared helpers in tests/support, and short files."""

import ast

import pytest

from tests.support.house import ROOT, modules

TESTS = ROOT / "tests"
# These are run as separate processes.
PROGRAMS = {f"tests.support.{name}" for name in ("script_for_pyhessian", "slepc", "triton_aot")}
FOLDERS = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}


def imported_by(path):
    """Pairs (module, name) for the imports of a file; relative modules start with dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((module, alias.name) for alias in node.names)


def forbidden(path):
    """Imports from tests/ in a file that are not ``from tests.support.module import name``."""
    for module, name in imported_by(path):
        if module.split(".")[0] in ("tests", ""):
            known = TESTS / "support" / f"{module.rpartition('.')[2]}.py"
            if not (name and module.startswith("tests.support.") and known.exists()):
                yield f"{module} {name}".strip()


@pytest.mark.parametrize(
    "path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS))
)
def test_a_test_file_imports_helpers_only_and_has_at_most_400_lines(path):
    assert list(forbidden(path)) == []
    assert len(path.read_text().splitlines()) <= 400


def test_forbidden_imports_are_found(tmp_path):
    for line in ("from tests.krylov.test_lanczos import grown", "from tests.support import models",
                 "from .models import dense", "import tests.support.models"):  # fmt: skip
        path = tmp_path / "test_x.py"
        path.write_text(line + "\n")
        assert list(forbidden(path)), line
    path.write_text("from tests.support.models import dense\nimport torch\n")
    assert list(forbidden(path)) == []


def test_the_tests_have_the_same_folders_as_the_package():
    package = {
        name.partition(".")[0] for name, path in modules().items() if path.stem == "__init__"
    }
    assert (package - {""}) | {"house", "support"} == FOLDERS


def test_every_helper_is_used():
    files = [path for name in ("tests", "bench") for path in (ROOT / name).rglob("*.py")]
    found = {pair for path in files for pair in imported_by(path)}
    used = {name for module, imported in found for name in (module, f"{module}.{imported}")}
    helpers = {f"tests.support.{path.stem}" for path in (TESTS / "support").glob("*.py")}
    assert helpers - used - {"tests.support.__init__"} == PROGRAMS
