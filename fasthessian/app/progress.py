"""What the command line shows on stderr: progress with the time left, and a summary table."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

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

from fasthessian.distributed.launch import is_first

if TYPE_CHECKING:
    from fasthessian.app.report.result import Result
    from fasthessian.study.sgd import OnStep

EVERY = 15.0  # seconds between lines if stderr is no terminal, on which a bar can be redrawn


def stderr() -> Console:
    """The terminal or log that standard error goes to; of several ranks, rank 0 has it alone."""
    return Console(stderr=True) if is_first() else Console(file=io.StringIO(), quiet=True)


class Stages:
    """Shows one bar per stage on a terminal, or a line every fifteen seconds in a log.

    ``stage(title)`` closes the stage before it and returns a callback for (done, total). If the
    total is not known before the end, ``at_most`` is its bound, and the time left is a bound too.
    """

    def __init__(self, console: Console):
        """Show on ``console``; nothing appears before the first stage."""
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[bound]}"),
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

    def stage(self, title: str, at_most: int | None = None) -> OnStep:
        """Open a stage; ``at_most`` bounds its steps if it does not know their total."""
        self.finish()
        return (self.bar if self.console.is_terminal else self.lines)(title, at_most)

    def bar(self, title: str, at_most: int | None) -> OnStep:
        """A bar; when the stage is over, its total becomes the steps that were made."""
        task = self.bars.add_task(title, total=None, bound="")
        last = 0

        def progress(done: int, total: int | None) -> None:
            nonlocal last
            last = done
            whole, bound = bounded(total, at_most)
            self.bars.update(task, completed=done, total=whole, bound=bound)

        self.finish = lambda: self.bars.update(task, completed=last, total=last, bound="")
        return progress

    def lines(self, title: str, at_most: int | None) -> OnStep:
        """A line at the first step, every fifteen seconds, and when the stage is over.

        There is none before the first step, so that bad input gets its error line alone.
        """
        start = printed = time.monotonic()
        last = 0

        def progress(done: int, total: int | None) -> None:
            nonlocal printed, last
            if last == 0:
                self.say(f"{title} ...")
                self.finish = lambda: self.say(f"{title}: {last} in {seconds(start)}")
            last = done
            if time.monotonic() - printed < EVERY or done == 0:
                return
            printed = time.monotonic()
            whole, bound = bounded(total, at_most)
            if whole is None:
                self.say(f"{title}: {done}")
            else:
                left = (printed - start) * (whole - done) / done
                self.say(f"{title}: {done} of {whole}, {bound} {left:.0f} s left")

        self.finish = lambda: None
        return progress

    def say(self, text: str) -> None:
        """Print one line without any markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def bounded(total: int | None, at_most: int | None) -> tuple[int | None, str]:
    """The steps to expect, and whether they and the time left are an estimate or a bound."""
    return (at_most, "at most") if total is None else (total, "about")


def seconds(start: float) -> str:
    """The time since ``start`` on the monotonic clock."""
    return f"{time.monotonic() - start:.1f} s"


def show_summary(console: Console, result: Result, out: str | None) -> None:
    """Show the summary table of a result, its notes, and the path of the report."""
    from fasthessian.app.report.summary import summary, title

    table = Table(title=title(result), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in summary(result):
        table.add_row(Text(name), Text(value))
    console.print(table)
    for note in result.analysis.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    if out is not None:
        console.print(Text(f"report: {out}"), soft_wrap=True)
