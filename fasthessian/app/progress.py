"""What the command line shows on stderr: progress with the time left, and the summary table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fasthessian.app.report.html import summary, title_of

EVERY = 15.0  # seconds between lines where there is no terminal to redraw a bar on


def stderr() -> Console:
    """The terminal or log behind standard error."""
    return Console(stderr=True)


class Stages:
    """Shows one bar a stage on a terminal, or a line every fifteen seconds in a log.

    ``stage(title)`` closes the stage before it and returns what to call with (done, total). Where
    the total is not known before the end, ``at_most`` bounds it, and with it the time left.
    """

    def __init__(self, console: Console):
        """Show on ``console``; nothing appears before the first stage."""
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.finish: Callable[[], None] = lambda: None

    def __enter__(self) -> Stages:
        """Start drawing."""
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the last stage and stop drawing."""
        if error is None:
            self.finish()
        self.bars.stop()

    def stage(self, title: str, at_most: int | None = None) -> Callable[[int, int | None], None]:
        """Open a stage."""
        self.finish()
        return (self.bar if self.console.is_terminal else self.lines)(title, at_most)

    def bar(self, title: str, at_most: int | None) -> Callable[[int, int | None], None]:
        """A bar; its total becomes what was needed once the stage is over."""
        task = self.bars.add_task(title, total=None)
        last = 0

        def progress(done: int, total: int | None) -> None:
            nonlocal last
            last = done
            self.bars.update(task, completed=done, total=at_most if total is None else total)

        self.finish = lambda: self.bars.update(task, completed=last, total=last)
        return progress

    def lines(self, title: str, at_most: int | None) -> Callable[[int, int | None], None]:
        """A line at the first step, every fifteen seconds, and when the stage is over.

        None before the first step: bad input is then answered by its error alone.
        """
        start = said = time.monotonic()
        last = 0

        def progress(done: int, total: int | None) -> None:
            nonlocal said, last
            if last == 0:
                self.say(f"{title} ...")
                self.finish = lambda: self.say(f"{title}: {last} in {seconds(start)}")
            last = done
            if time.monotonic() - said < EVERY or done == 0:
                return
            said = time.monotonic()
            whole = at_most if total is None else total
            if whole is None:
                self.say(f"{title}: {done}")
            else:
                bound = "about" if total is not None else "at most"
                left = (said - start) * (whole - done) / done
                self.say(f"{title}: {done} of {whole}, {bound} {left:.0f} s left")

        self.finish = lambda: None
        return progress

    def say(self, text: str) -> None:
        """One line, as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def seconds(start: float) -> str:
    """The time since ``start`` of the monotonic clock."""
    return f"{time.monotonic() - start:.1f} s"


def show_summary(console: Console, content: Mapping[str, Any], out: str | None) -> None:
    """The summary table of a result, its notes, and where the report lies."""
    table = Table(title=title_of(content), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in summary(content):
        table.add_row(Text(name), Text(value))
    console.print(table)
    for note in content["notes"]:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    if out is not None:
        console.print(Text(f"report: {out}"), soft_wrap=True)
