"""What a run tells while it goes on; a display of it is somebody else's."""

from __future__ import annotations

from typing import Protocol

from subjattn.run.plan import Stage


class Events(Protocol):
    """Told of stages as they begin, go on and end."""

    def planned(self, stages: list[Stage]) -> None:
        """These stages will be looked at, in this order."""
        ...

    def reused(self, stage: Stage) -> None:
        """The stage was found finished."""
        ...

    def started(self, stage: Stage) -> None: ...

    def advanced(self, stage: Stage, done: float) -> None:
        """So much of the stage's cost is done by now."""
        ...

    def ended(self, stage: Stage) -> None: ...

    def note(self, text: str) -> None:
        """Something a reader should know, in one line."""
        ...


class Silent:
    """Tells nobody."""

    def planned(self, stages: list[Stage]) -> None: ...
    def reused(self, stage: Stage) -> None: ...
    def started(self, stage: Stage) -> None: ...
    def advanced(self, stage: Stage, done: float) -> None: ...
    def ended(self, stage: Stage) -> None: ...
    def note(self, text: str) -> None: ...
