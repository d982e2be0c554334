"""Progress with an honest time estimate: a bar on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


if TYPE_CHECKING:
    from subjattn.run.plan import Stage

_LINE_EVERY = 20.0
_STAGE_EVERY = 5.0


class Progress:
    """Counts units of work, one being the forward pass of one prompt; told of stages as `run.events.Events` are.

    The estimate scales what is left by the speed since the work was planned or first begun; work found finished
    on disk counts as done, but not for the speed. Several stages at a time count together.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.total = self.left = self.done = 0.0
        self._start = self._line_at = time.monotonic()
        self._began: float | None = None
        self._running: dict[str, float] = {}
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
        """Work that lies ahead."""
        self.total += units
        self.left += units
        self._began = time.monotonic()

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

    def note(self, text: str) -> None:
        """Something a reader should know, in one line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def planned(self, stages: list[Stage]) -> None:
        self.plan(sum(stage.cost for stage in stages))

    def reused(self, stage: Stage) -> None:
        self.skip(stage.cost)

    def started(self, stage: Stage) -> None:
        if not self.done and not self._running:
            self._began = time.monotonic()
        self._running[stage.name] = 0.0
        self._text = ", ".join(self._running)
        self._show(force=time.monotonic() - self._line_at > _STAGE_EVERY or self.left == self.total)

    def advanced(self, stage: Stage, done: float) -> None:
        """A stage may turn out to cost more or less than was thought; more does not count before it has ended."""
        done = min(done, stage.cost)
        self.advance(done - self._running[stage.name])
        self._running[stage.name] = done

    def ended(self, stage: Stage) -> None:
        self.advance(stage.cost - self._running.pop(stage.name))
        self._text = ", ".join(self._running)

    def remaining(self) -> str:
        """A reader's words for the time left."""
        elapsed = 0.0 if self._began is None else time.monotonic() - self._began
        if not self.done or elapsed < 5:
            return "estimating …"
        seconds = max(0.0, self.left) * elapsed / max(self.done, 1e-9)
        return f"about {clock(seconds)} left"

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
            elapsed = clock(time.monotonic() - self._start)
            self.console.print(
                f"[{share:4.0%} {elapsed}] {self._text} ({self.remaining()})", highlight=False, markup=False
            )


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
