"""The README is short, its tables match the result files, and the targets of links exist."""

import re
from pathlib import Path

import pytest

import fasthessian
from bench.harness import table

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_readme_has_one_table_of_at_most_twelve_rows():
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [i for i, line in enumerate(lines) if line.startswith("|")]
    assert rows == [*range(rows[0], rows[-1] + 1)] and 1 <= len(rows) - 2 <= 12


@pytest.mark.parametrize("path", ["README.md", "bench/README.md"])
def test_the_tables_are_those_of_the_result_files(path):
    """If it fails, run: python -m bench.harness.table."""
    assert table.texts()[ROOT / path] == (ROOT / path).read_text()


def test_a_table_reads_the_numbers_of_its_run():
    run = table.newest(table.runs())
    before = table.peers_table(run)
    run.rows["top 10 eigenvalues: our products"]["value"] = 12345
    changed = table.peers_table(run)
    assert "12,345" in changed and "12,345" not in before


def test_an_incomplete_run_is_not_used_for_the_table():
    found = table.runs()
    alone = table.Run("cpu-later.json", "2099-01-01", "", {"import": {"value": 1.0}})
    assert table.newest([*found, alone]).name == table.newest(found).name


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_to_files(path):
    page = ROOT / path
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = set(re.findall(r"`([\w.]+/[\w./]+)`", text))
    assert "tests/support/models.py" in names
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "fasthessian" / name).exists(), name


def test_every_example_is_linked():
    text = (ROOT / "README.md").read_text()
    for script in (ROOT / "examples").glob("*.py"):
        assert f"](examples/{script.name})" in text, script.name


def test_the_version_is_the_same_everywhere():
    version = fasthessian.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
