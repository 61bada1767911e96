"""``report.html``: the template ``page.html``, filled with a result and its figures."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING

from fasthessian.app.report.method import method
from fasthessian.app.report.result import Result
from fasthessian.app.report.summary import Rows, summary, title
from fasthessian.errors import MissingPackageError

if TYPE_CHECKING:
    from jinja2 import Template


def template() -> Template:
    """The template of the report.

    Raises:
        ImportError: jinja2 is missing.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MissingPackageError("the report needs jinja2; pip install jinja2") from error
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string((files(__package__) / "page.html").read_text("utf-8"))


def html(result: Result, figures: Mapping[str, bytes]) -> str:
    """The whole report as one file without links; ``figures`` are PNG bytes by file name."""
    return template().render(
        title=title(result),
        name=result.name,
        about=result.info.get("about", ""),
        notes=result.analysis.notes,
        summary=summary(result),
        figures={name: base64.b64encode(png).decode() for name, png in figures.items()},
        tables=tables(result),
    )


def tables(result: Result) -> list[tuple[str, Rows]]:
    """The tables below the figures, by heading."""
    settings = [
        (name.replace("_", " "), "automatic" if value is None else str(value))
        for name, value in vars(result.options).items()
        if name == "span" or value is not None
    ]
    machine = [(name, str(v)) for name, v in result.environment.items() if name != "engine"]
    timing = [(name, f"{seconds:.1f} s") for name, seconds in result.timing.items()]
    return [
        ("How it was computed", method(result)),
        ("Settings", settings),
        ("Versions and machine", machine),
        ("Time", timing),
    ]
