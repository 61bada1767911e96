"""The house keeps its shape: imports go down, files stay small, names stay public."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fasthessian

ROOT = Path(fasthessian.__file__).parent
LAYERS = [  # from the bottom; a module imports its own layer and those before it
    {"__about__", "records", "fields", "npz", "memory"},
    {"kernels"},
    {"vectors", "basis"},
    {"operators"},
    {"algorithms"},
    {"pyhessian", "study"},
    {"plots"},
    {"page", "report"},
    {"cli", "commands", "console", "__main__"},
]
HEIGHT = {name: level for level, names in enumerate(LAYERS) for name in names}
LAZY = {"matplotlib", "click", "rich", "sklearn", "scipy", "triton", "pandas"}
# Methods of the records draw themselves: plots is imported when one is called.
DOWN_BY_CALL = {("records", "plots")}


def modules():
    return sorted(p for p in ROOT.rglob("*.py") if p.name != "__init__.py" or p.parent != ROOT)


def imported(path):
    """Names of the modules that the file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "fasthessian" or len(parts) == 1:
            continue
        other = parts[1]
        if other in HEIGHT and (own, other) not in DOWN_BY_CALL:
            assert HEIGHT[other] <= HEIGHT[own], f"{own} imports {other}, which is above it"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_fits_in_the_head(path):
    assert len(path.read_text().splitlines()) <= 330


def test_every_module_has_a_layer():
    found = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in modules()}
    assert found == set(HEIGHT)


def test_import_loads_nothing_heavy():
    code = f"import sys, fasthessian; print(sorted({LAZY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_resolve_and_are_documented():
    for name in fasthessian.__all__:
        thing = getattr(fasthessian, name)
        assert name == "__version__" or thing.__doc__, name
