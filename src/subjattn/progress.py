"""Progress of a study with a time estimate: a bar on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


log = logging.getLogger(__name__)

_LINE_EVERY = 20.0


class Progress:
    """Counts units of work, one being the forward pass of one prompt.

    The estimate scales what is left by the speed of what was done just now; work found finished on disk
    counts as done, but not for the speed.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.total = self.left = self.done = 0.0
        self._start = self._planned = self._line_at = time.monotonic()
        self._text = ""
        self._bar: RichProgress | None = None
        if self.console.is_terminal:
            self._bar = RichProgress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=None, left="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def plan(self, units: float) -> None:
        """Work that lies ahead; the time it takes is counted from here."""
        self.total += units
        self.left += units
        self._planned = time.monotonic()

    def stage(self, text: str) -> None:
        """Name what begins now."""
        self._text = text
        self._show(force=True)

    def advance(self, units: float) -> None:
        """Work done just now."""
        self.left -= units
        self.done += units
        self._show()

    def skip(self, units: float) -> None:
        """Work found finished."""
        self.left -= units
        self._show()

    def remaining(self) -> str:
        """A reader's words for the time left."""
        elapsed = time.monotonic() - self._planned
        if not self.done or elapsed < 5:
            return "estimating …"
        seconds = max(0.0, self.left) * elapsed / max(self.done, 1e-9)
        return f"about {_clock(seconds)} left"

    def _show(self, force: bool = False) -> None:
        if self._bar:
            self._bar.update(
                self._task,
                description=self._text,
                completed=self.total - max(self.left, 0.0),
                total=self.total or None,
                left=self.remaining(),
            )
        elif force or time.monotonic() - self._line_at > _LINE_EVERY:
            self._line_at = time.monotonic()
            share = 1 - max(self.left, 0.0) / self.total if self.total else 0.0
            elapsed = _clock(time.monotonic() - self._start)
            self.console.print(
                f"[{share:4.0%} {elapsed}] {self._text} ({self.remaining()})", highlight=False, markup=False
            )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes}:{seconds:02d}"
