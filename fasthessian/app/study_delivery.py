"""What ``fasthessian study`` leaves: figures, tables, a report, and a summary on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from fasthessian.app.progress import stderr
from fasthessian.app.report.study_page import study_page
from fasthessian.app.report.templates import template
from fasthessian.results.plots import figure
from fasthessian.results.record import write_whole
from fasthessian.study import sheets
from fasthessian.study.claims import claims
from fasthessian.study.figures import draw, missing
from fasthessian.study.records import DIVERGED, Study
from fasthessian.study.store import Folder
from fasthessian.study.tables import as_csv, as_markdown, of_claims, tables
from fasthessian.study.text import name_of


def check_packages() -> None:
    """Raise before the work if matplotlib or jinja2 is missing, which the report needs."""
    figure()
    template("base.html")


def deliver(folder: Folder, as_json: bool) -> None:
    """Write figures, tables and the report of all results so far, and show a summary.

    The summary goes to stderr; with ``as_json`` the results go to stdout as well.
    """
    study = folder.results()
    found = claims(study)
    if as_json:
        click.echo(json.dumps(json_types(study, found), indent=1, allow_nan=False))
    for name, content in files(study, found):
        path = folder.root / name
        path.parent.mkdir(exist_ok=True)
        write_whole(path, content.encode() if isinstance(content, str) else content, overwrite=True)
    show(study, found)
    stderr().print(Text(f"report: {folder.root / 'report.html'}"), soft_wrap=True)


def files(study: Study, found: list[sheets.Claim]) -> Iterator[tuple[str, str | bytes]]:
    """The files of a report by their path in the folder; ``report.html`` is the last one."""
    pictures, rows = list(draw(study)), tables(study)
    for picture in pictures:
        yield f"figures/{picture.name}.png", picture.png
        yield f"figures/{picture.name}.svg", picture.svg
    for table in [*rows, of_claims(found)]:
        yield f"tables/{table.name}.csv", as_csv(table)
        yield f"tables/{table.name}.md", as_markdown(table)
    yield "report.html", study_page(study, pictures, rows, found, missing(study))


def json_types(study: Study, found: list[sheets.Claim]) -> dict[str, Any]:
    """The results as JSON types."""
    return {
        "settings": study.settings,
        "trainings": [each.to_json() for each in study.trainings],
        "measurements": [each.to_json() for each in study.measurements],
        "claims": [
            {name: getattr(each, name) for name in ("statement", "source", "verdict", "reason")}
            for each in found
        ],
    }


def show(study: Study, found: list[sheets.Claim]) -> None:
    """Print the kept runs and the verdicts."""
    kept = Table(
        title="Kept runs, with their test accuracy",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for name in ("network", "seed", "rate", "accuracy", "trace", ""):
        kept.add_column(name, no_wrap=name == "network")
    last = {each.run: each for each in study.measurements if each.mode == "eval"}
    for training in study.kept():
        run, diverged = training.run, training.status == DIVERGED
        measured = last.get(run)
        kept.add_row(
            name_of(run.network),
            str(run.seed),
            f"{run.lr:g}",
            "" if diverged else f"{float(training.test_accuracy[-1]):.1%}",
            "" if measured is None else f"{measured.trace:.4g} after epoch {measured.epoch}",
            f"{training.status}, not analysed" if diverged else training.status,
        )
    stderr().print(kept)
    for claim in found:
        stderr().print(Text(f"{claim.verdict}: {claim.statement}"), soft_wrap=True)
