"""What a run says while it works: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Advance", "Console"]

Advance = Callable[[float, str], None]
"""Tells a bar how far the work is: fraction done in [0, 1], and what is being done."""


class Console:
    """Prints stages and progress.

    On a terminal a running stage shows a bar; elsewhere it prints a line at its start, at most one line
    every `interval` seconds while it runs, and one line at its end, so that a log stays readable.

    Arguments:
        quiet: Print nothing.
        interval: Seconds between two plain progress lines.
    """

    def __init__(self, *, quiet: bool = False, interval: float = 15.0) -> None:
        self.quiet = quiet
        self.interval = interval
        self.terminal = sys.stderr.isatty() and not quiet

    def say(self, text: str) -> None:
        """Print one line."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Print one line of warning."""
        self.say(f"warning: {text}")

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[Advance]:
        """One stage of a run; gives the function that reports its progress."""
        begin = time.monotonic()
        with (self._bar if self.terminal else self._lines)(name, text) as advance:
            yield advance
        self.say(f"  {name:<10} done in {time.monotonic() - begin:.1f} s")

    @contextmanager
    def _bar(self, name: str, text: str) -> Iterator[Advance]:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.fields[name]:<10}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=RichConsole(stderr=True), transient=True) as progress:
            task = progress.add_task(text, total=1.0, name=name)

            def advance(fraction: float, what: str = "") -> None:
                progress.update(task, completed=fraction, description=what or text)

            yield advance

    @contextmanager
    def _lines(self, name: str, text: str) -> Iterator[Advance]:
        self.say(f"  {name:<10} {text}")
        last = time.monotonic()

        def advance(fraction: float, what: str = "") -> None:
            nonlocal last
            if time.monotonic() - last > self.interval:
                last = time.monotonic()
                self.say(f"  {name:<10} {100 * fraction:3.0f} %  {what}")

        yield advance
