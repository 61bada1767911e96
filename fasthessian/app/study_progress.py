"""What the command ``fasthessian study`` shows on stderr: the whole study, and the task of now."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fasthessian.app.progress import EVERY


class Overview:
    """Two bars on a terminal, or a line every fifteen seconds and at each task in a log.

    One is for the tasks of the whole study, with the time left; one is for the running task.
    """

    def __init__(self, console: Console):
        """Show on ``console``."""
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._whole = self._bars.add_task("study", total=None, left="")
        self._now = self._bars.add_task("", total=None, left="", visible=False)
        self._words, self._counts, self._printed = "", "", 0.0

    def __enter__(self) -> Overview:
        """Start drawing."""
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop drawing."""
        self._bars.stop()

    def begin(self, words: str, ended: int, whole: int) -> None:
        """A task begins; so many of the whole study have ended."""
        self._bars.update(self._whole, completed=ended, total=whole)
        self._bars.reset(self._now, description=words, total=None, visible=True)
        counts = f"study {ended} of {whole}"
        if not self.console.is_terminal and (words, counts) != (self._words, self._counts):
            self.say(f"{counts}: {words}")
            self._printed = time.monotonic()
        self._words, self._counts = words, counts

    def step(self, done: int, total: int | None, left: float | None) -> None:
        """So much of the task is done; the study takes ``left`` seconds more, if that is known."""
        rest = "" if left is None else f"about {duration(left)} left"
        self._bars.update(self._whole, left=rest)
        self._bars.update(self._now, completed=done, total=total)
        if self.console.is_terminal or time.monotonic() - self._printed < EVERY:
            return
        self._printed = time.monotonic()
        part = f" {done / total:.0%}" if total else ""
        self.say(f"{self._counts}: {self._words}{part}{', ' * bool(rest)}{rest}")

    def say(self, text: str) -> None:
        """One line that stays, without any markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time in words, with one or two units.

    Example:
        >>> duration(42), duration(150), duration(8000), duration(200000)
        ('42 s', '2 min 30 s', '2 h 13 min', '2 d 7 h')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
