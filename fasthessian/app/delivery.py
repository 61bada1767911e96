"""Brings a finished result to the user, even if its report cannot be written or drawn."""

from __future__ import annotations

import io
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

from fasthessian.app.report.folder import files, write
from fasthessian.app.report.result import Result, encode


class Unfinished(click.ClickException):
    """The numbers are kept, but a part of the work or of the report failed."""


class Interrupted(Unfinished):
    """The same, because of Ctrl-C."""

    exit_code = 130


def deliver(result: Result, out: str | None, as_json: bool, overwrite: bool) -> Unfinished | None:
    """Print and write a result: the numbers first, then the figures and the report.

    If the numbers cannot be written to ``out``, they go to a temporary file, or else to standard
    output.

    Returns:
        None, or an error that says what failed, where the numbers are and how to draw them.
    """
    numbers = encode(result)
    failed: list[BaseException] = []

    def attempt(job: Callable[[], None]) -> bool:
        try:
            job()
        except (Exception, KeyboardInterrupt) as error:
            failed.append(error)
            return False
        return True

    def show() -> None:
        try:
            sys.stdout.write(numbers.decode())
            sys.stdout.flush()
        except OSError:
            sys.stdout = io.StringIO()  # the text still buffered would fail again at exit
            raise

    printed = as_json and attempt(show)
    kept: str | None = None
    if out is not None:
        first = {"result.json": numbers}
        if attempt(lambda: write(out, first, overwrite=overwrite)):
            kept = str(Path(out) / "result.json")
            if not any(isinstance(error, KeyboardInterrupt) for error in failed):
                attempt(lambda: write(out, files(result), overwrite=True))
    if not failed:
        return None
    if kept is None and not printed:

        def keep() -> None:
            nonlocal kept
            handle, name = tempfile.mkstemp(prefix="fasthessian-", suffix=".json")
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(numbers)
            except BaseException:
                os.unlink(name)
                raise
            kept = name

        printed = not attempt(keep) and not as_json and attempt(show)
    stopped = isinstance(failed[0], KeyboardInterrupt)
    what = "interrupted" if stopped else str(failed[0]) or type(failed[0]).__name__
    place = "the numbers could not be kept"
    if kept or printed:
        source = kept or "the JSON on standard output, to be saved as result.json"
        draw = f"fasthessian plot {shlex.quote(kept or 'result.json')} --out DIR"
        place = f"the numbers are in {source}; draw them with: {draw}"
    return (Interrupted if stopped else Unfinished)(
        f"the work is done, but its report is not complete ({what}); {place}"
    )
