"""``report.html``: the template ``page.html``, filled with a result and its figures."""

from __future__ import annotations

import base64
from collections.abc import Mapping

from fasthessian.app.report.method import method
from fasthessian.app.report.result import Result
from fasthessian.app.report.summary import Rows, summary, title
from fasthessian.app.report.templates import template
from fasthessian.app.report.viewer import head, viewer


def html(result: Result, figures: Mapping[str, bytes]) -> str:
    """The whole report as one file without links; ``figures`` are PNG bytes by file name.

    A landscape over two directions is shown by the viewer; its figure stays for browsers that run
    no scripts.

    Raises:
        ImportError: jinja2 is missing.
    """
    landscape = result.analysis.landscape
    viewers = {}
    if landscape is not None and landscape.losses.dim() == 2 and "landscape.png" in figures:
        picture = figures["landscape.png"]
        viewers["landscape.png"] = viewer({(): landscape}, "Loss landscape", picture=picture)
    return template("page.html").render(
        title=title(result),
        name=result.name,
        about=result.info.get("about", ""),
        notes=result.analysis.notes,
        summary=summary(result),
        figures={name: base64.b64encode(png).decode() for name, png in figures.items()},
        viewers=viewers,
        head=head() if viewers else "",
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
